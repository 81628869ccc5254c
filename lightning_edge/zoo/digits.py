"""scikit-learn's 1,797 handwritten digits of 8x8 pixels, which come with the library: no download."""

from __future__ import annotations

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_edge.errors import require
from lightning_edge.zoo.tensors import Batch, ImageTensors, check_batch_size, loader


class DigitsDataModule(L.LightningDataModule):
    """Digits in three parts: 1,077 to train on, 360 to validate and 360 to test.

    Batches are images (B, 1, 8, 8) with values 0..1 and labels (B,).

    Args:
        batch_size: Images in a batch.
        seed: Seed of the split.

    Raises:
        ValueError: If ``batch_size`` is below 1.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        check_batch_size(batch_size)
        self.batch_size = batch_size
        self.seed = seed
        self._parts: list[ImageTensors] = []

    def setup(self, stage: str) -> None:
        """Split the digits.

        Raises:
            MissingExtraError: If scikit-learn is not installed.
        """
        if self._parts:
            return
        pixels, labels = require("sklearn.datasets", "recipes").load_digits(return_X_y=True)
        images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        targets = torch.as_tensor(labels, dtype=torch.int64)
        self._parts = [ImageTensors(images[part], targets[part]) for part in order.split([1077, 360, 360])]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Load the training images, shuffled."""
        return loader(self._parts[0], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Load the validation images."""
        return loader(self._parts[1], self.batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Load the test images."""
        return loader(self._parts[2], self.batch_size)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Load the test images."""
        return self.test_dataloader()
