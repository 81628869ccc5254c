"""The task of anomaly detection: an autoencoder learns normal windows, and rebuilds others worse."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from lightning_edge.zoo.tensors import Batch


class AnomalyDetector(L.LightningModule):
    """Train an autoencoder by mean squared error; logs ``train_loss``, ``val_loss`` and ``test_auc``.

    The score of a clip is the mean squared error over all its windows. ``test_auc`` is the area under the ROC curve of
    all clips together; MLPerf Tiny averages that of each machine.

    Args:
        network: Maps windows (B, F) to windows of the same shape.
        learning_rate: Adam's learning rate.
    """

    def __init__(self, network: nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate
        self.test_area = BinaryAUROC()

    def forward(self, windows: Tensor) -> Tensor:
        """Rebuild windows (B, F)."""
        rebuilt: Tensor = self.network(windows)
        return rebuilt

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean squared error of one batch."""
        loss = self._error(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean squared error on normal windows."""
        self.log("val_loss", self._error(batch), prog_bar=True, batch_size=len(batch[0]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log how well the scores tell anomalies from normal clips; a batch is one clip."""
        error = self._error(batch)
        # Between 0 and 1 in the same order, as torchmetrics wants scores.
        self.test_area((error / (1 + error))[None], batch[1])
        self.log("test_auc", self.test_area, batch_size=1)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the score of a clip."""
        return self._error(batch)

    def _error(self, batch: Batch) -> Tensor:
        windows, _ = batch
        return nn.functional.mse_loss(self(windows), windows)

    def configure_optimizers(self) -> Any:
        """Build Adam, as the reference does."""
        return torch.optim.Adam(self.parameters(), self.learning_rate)
