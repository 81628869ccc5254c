"""The task of the recipes: a classifier with cross-entropy, AdamW and a cosine schedule."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_edge.zoo.tensors import Batch


class Classifier(L.LightningModule):
    """Train a network to classify; logs ``train_loss``, ``val_loss``, ``val_acc``, ``test_loss`` and ``test_acc``.

    Args:
        network: Maps a batch of images (B, C, H, W) to logits (B, ``num_classes``).
        num_classes: Number of classes.
        learning_rate: Where the cosine schedule starts; it ends at 0 with the last step.
        weight_decay: AdamW's weight decay.
    """

    def __init__(
        self, network: nn.Module, num_classes: int = 10, learning_rate: float = 1e-3, weight_decay: float = 1e-4
    ) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, ``num_classes``)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of one batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log accuracy and cross-entropy on the validation images."""
        self._judge(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log accuracy and cross-entropy on the test images."""
        self._judge(batch, "test", self.test_accuracy)

    def _judge(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}_acc", accuracy, prog_bar=True)
        self.log(f"{stage}_loss", nn.functional.cross_entropy(logits, labels), batch_size=len(labels))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the class of each image, (B,)."""
        images, _ = batch
        classes: Tensor = self(images).argmax(1)
        return classes

    def configure_optimizers(self) -> Any:
        """Build AdamW with a cosine schedule over all steps of this training."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
