"""Images that fit in memory, read a batch at a time. Knows torch only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor]


class ImageTensors(Dataset[Batch]):
    """Images and labels held as tensors; images come out as floats of the same values.

    Args:
        images: (N, C, H, W), any type.
        labels: (N,), int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """Take one image (C, H, W) and its label."""
        return self.images[index].float(), self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Take a whole batch (B, C, H, W), which the DataLoader asks for in one call where this method exists."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen].float(), self.labels[chosen]


def check_batch_size(batch_size: int) -> None:
    """Refuse batches of no images.

    Raises:
        ValueError: If ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not allowed; give 1 or more")


def loader(dataset: Dataset[Batch], batch_size: int, shuffle: bool = False) -> DataLoader[Batch]:
    """Load batches of a data set with ``__getitems__`` in this process: sending them from a worker costs more."""
    # By keyword: Lightning makes a second loader of these arguments for predict, and trips over positional ones.
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
