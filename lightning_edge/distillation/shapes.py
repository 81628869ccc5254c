"""Which dimension of a feature is which, and how two features come to one size."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lightning_edge.errors import CompressionError

_POOLS: dict[int, Any] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def channel_axis(feature: Tensor, given: int | None) -> int:
    """Give the dimension of the channels: the one given, else 1, and the last of three (N, T, C).

    Raises:
        CompressionError: If the feature has no such dimension behind the batch.
    """
    axis = given if given is not None else (2 if feature.dim() == 3 else 1)
    axis = axis + feature.dim() if axis < 0 else axis
    if not 1 <= axis < feature.dim():
        raise CompressionError(
            f"a feature of shape {tuple(feature.shape)} has no dimension {given if given is not None else axis} of "
            "channels behind its batch; set channel_dim, or name a layer with an output of shape (N, C, ...)"
        )
    return axis


def same_shape(loss: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse to compare what broadcasting would compare wrongly.

    Raises:
        CompressionError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise CompressionError(
            f"{loss} compares the student's {tuple(student.shape)} with the teacher's {tuple(teacher.shape)}, and the "
            "two must have one shape. Give a teacher of the same task, or name other outputs or layers."
        )


def same_places(loss: str, student: Tensor, teacher: Tensor, channel_dim: int | None) -> tuple[Tensor, Tensor]:
    """Average the larger of two features to the spatial size of the smaller.

    Raises:
        CompressionError: If they differ in the batch, in the number of dimensions or of tokens.
    """
    axis = channel_axis(student, channel_dim)
    fits = student.dim() == teacher.dim() and student.shape[0] == teacher.shape[0]
    if fits:
        sizes = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        if axis == 1 and len(sizes) in _POOLS:
            return _pooled(student, sizes), _pooled(teacher, sizes)
        fits = all(s == t for i, (s, t) in enumerate(zip(student.shape, teacher.shape, strict=True)) if i != axis)
    if not fits:
        raise CompressionError(
            f"{loss} compares features of shapes {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher),"
            f" which differ in more than channels (dimension {axis}) and spatial size. Name layers that see the same "
            "batch and tokens; for features of shape (N, C, T) set channel_dim=1."
        )
    return student, teacher


def _pooled(feature: Tensor, sizes: list[int]) -> Tensor:
    if list(feature.shape[2:]) == sizes:
        return feature
    pooled: Tensor = _POOLS[len(sizes)](feature, sizes)
    return pooled
