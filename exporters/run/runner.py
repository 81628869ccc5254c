"""What runs a file: the abstract class of all runtimes, and the values inside a file that some of them tell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_edge.exporters.run.calls import Samples, TensorSpec, stack
from lightning_edge.measure import stopwatch


@dataclass(frozen=True)
class Intermediate:
    """A quantized value inside a file, as its runtime computed it.

    Attributes:
        operation: What computed it, in the words of the file.
        scale: Its quantization step.
        zero_point: The integer that stands for zero.
        values: The integers of one sample, batch of one first.
    """

    operation: str
    scale: float
    zero_point: int
    values: Tensor


def as_int8(operation: str, scale: float, zero_point: int, values: Tensor) -> Intermediate:
    """Make an `Intermediate` of what a file holds: uint8 is int8 that lies 128 higher."""
    if values.dtype == torch.uint8:
        values, zero_point = (values.short() - 128).to(torch.int8), zero_point - 128
    return Intermediate(operation, scale, zero_point, values)


class Runner(ABC):
    """Runs one loaded file on one sample.

    Attributes:
        runtime: Name and version of the runtime, its delegate and thread count; it says so where it is not the
            target's own.
        inputs: What the file takes, in the file's own layout and in the order of `Inputs.tensors` with keyword
            arguments sorted by name.
        is_reference: Whether this is a reference interpreter, whose latency says nothing about the target.
    """

    runtime: str
    inputs: tuple[TensorSpec, ...]
    is_reference: bool = False

    @abstractmethod
    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one sample; float inputs and outputs are real values."""

    def run_all(self, samples: Samples, most: int) -> list[Tensor]:
        """Run on several samples, ``most`` in a call, one call after the other; returns the outputs, batch first."""
        return stack([self(samples.part(start, most).tensors) for start in range(0, samples.count, most)])

    def prepare(self, tensors: list[Tensor]) -> Callable[[], object]:
        """Return a call on one sample that is ready to be timed.

        A runner overrides this to do beforehand what is not part of the file: an app that has int8 values does not
        quantize any.
        """
        return lambda: self(tensors)

    def timed_call(self, tensors: list[Tensor]) -> Callable[[], int]:
        """Return a function that runs one sample and returns the nanoseconds it took."""
        return stopwatch(self.prepare(tensors))

    def intermediates(self, tensors: list[Tensor]) -> list[Intermediate] | None:
        """Run on one sample and return the quantized values inside the file; ``None`` if the runtime hides them."""
        return None

    def peak_memory_bytes(self) -> int | None:
        """Return what the file took of memory at its peak; ``None`` if it does not run in a process of its own."""
        return None

    def close(self) -> None:
        """End what runs in another process, at once; safe to call twice. Afterwards a call is an error there."""
        return None
