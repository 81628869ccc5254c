"""The tensors of one call of a file: what it takes, and what comes out of several calls as one. Knows torch only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_edge.errors import RunnerError


@dataclass(frozen=True)
class TensorSpec:
    """What a runner takes as one input.

    Attributes:
        shape: Shape of one sample, batch of one first; also where a call may have several.
        dtype: Type the runner takes; a float type also where the file itself holds quantized integers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def has_batch(self) -> bool:
        """Whether the first dimension is the batch."""
        return self.shape[:1] == (1,)

    def takes(self, tensor: Tensor, samples: int) -> bool:
        """Whether a tensor is of this kind and of the shape for so many samples; what has no batch keeps its own."""
        shape = (samples, *self.shape[1:]) if self.has_batch else self.shape
        return tuple(tensor.shape) == shape and tensor.dtype.is_floating_point == self.dtype.is_floating_point


@dataclass(frozen=True)
class Samples:
    """The flattened inputs of several samples, joined as a batch.

    Attributes:
        tensors: The inputs, batch first.
        carries: Of each, whether its first dimension is the batch; any other is the same for all samples.
        count: How many samples there are.
    """

    tensors: list[Tensor]
    carries: list[bool]
    count: int

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Samples:
        """Take a call's tensors, of which the first with a dimension carries the batch, and those of the same size."""
        count = next(tensor.shape[0] for tensor in tensors if tensor.dim())
        return cls(tensors, [tensor.dim() > 0 and tensor.shape[0] == count for tensor in tensors], count)

    def part(self, start: int, size: int) -> Samples:
        """Take up to ``size`` samples from position ``start`` on."""
        tensors = [
            tensor[start : start + size] if carries else tensor
            for tensor, carries in zip(self.tensors, self.carries, strict=True)
        ]
        return Samples(tensors, self.carries, min(size, self.count - start))

    @property
    def size_bytes(self) -> int:
        """Bytes of one sample."""
        whole = sum(tensor.nbytes for tensor, carries in zip(self.tensors, self.carries, strict=True) if carries)
        return whole // max(1, self.count)


def conform(tensors: list[Tensor], specs: tuple[TensorSpec, ...], name: str, max_batch: int = 1) -> list[Tensor]:
    """Check one call's tensors against what a file takes, and convert float to float and integer to integer.

    Args:
        tensors: The flattened inputs of one call.
        specs: What the file takes, for one sample.
        name: Name of the file, for the message.
        max_batch: The most samples that it takes in a call.

    Raises:
        RunnerError: If number, shape or kind of the tensors differ from ``specs``.
    """
    given = ", ".join(f"{list(tensor.shape)} {_short(tensor.dtype)}" for tensor in tensors) or "nothing"
    expected = ", ".join(f"{list(spec.shape)} {_short(spec.dtype)}" for spec in specs)
    pairs = list(zip(tensors, specs, strict=False))
    samples = next((tensor.shape[0] for tensor, spec in pairs if tensor.dim() and spec.has_batch), 1)
    fits = len(tensors) == len(specs) and 1 <= samples <= max_batch
    fits = fits and all(spec.takes(tensor, samples) for tensor, spec in pairs)
    if not fits:
        per, most = ("per sample", "") if max_batch == 1 else ("in a call", f", for {max_batch} samples at most")
        raise RunnerError(
            f"{name} was given {given} {per} but takes {expected}{most}. "
            "Call it as the network it came from: same arguments, batch first, keyword arguments by name"
        )
    return converted(tensors, specs)


def converted(tensors: list[Tensor], specs: tuple[TensorSpec, ...]) -> list[Tensor]:
    """Convert the tensors of a call to the types that a file takes."""
    return [tensor.to(spec.dtype).contiguous() for tensor, spec in zip(tensors, specs, strict=True)]


def of_one_sample(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Give the shape of one sample, of a shape that leaves the batch free: anything but a number of 0 or more."""
    free = bool(shape) and not (isinstance(shape[0], int) and shape[0] >= 0)
    return (1, *shape[1:]) if free else tuple(shape)


def stack(samples: list[list[Tensor]]) -> list[Tensor]:
    """Join the outputs of several calls, batch first; an output without dimensions becomes one value per call."""
    return [
        torch.cat([part.reshape(1) if part.dim() == 0 else part for part in parts])
        for parts in zip(*samples, strict=True)
    ]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
