"""What a file says of itself that no format is needed to understand: what goes in and out, and what runs where.

Knows no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Place = Literal["delegate", "neural engine", "gpu", "cpu", "cpu or gpu", "any unit"]
# The runtime decides on the device, and the CPU is one of its choices.
_UNDECIDED = ("cpu or gpu", "any unit")
Told = Literal["the file", "the runtime", "compute plan", "op support"]


@dataclass(frozen=True)
class Endpoint:
    """One input or output as the file itself declares it.

    Attributes:
        name: Its name; ``None`` in a format that numbers them only.
        shape: Its shape, in the file's own layout; that of one sample where the batch is free.
        dtype: Its type by PyTorch's name without ``torch.``: ``"int8"``, ``"float32"``.
        scale: For a quantized one, the step: real value = ``scale`` * (integer - ``zero_point``).
        zero_point: For a quantized one, the integer that stands for 0.
    """

    name: str | None
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True)
class Placement:
    """The operations of one kind that run at one place.

    Attributes:
        op: Their kind, as the format names it.
        place: Where they run: handed to the runtime's delegate, on an accelerator, or on the runtime's own CPU kernels;
            ``"cpu or gpu"`` and ``"any unit"`` where the runtime decides that on the device.
        count: How many there are.
        macs: Multiply-accumulates of all of them in one call with one sample.
    """

    op: str
    place: Place
    count: int
    macs: int


@dataclass(frozen=True)
class Placements:
    """Where the operations of a file run.

    Attributes:
        told_by: How that is known: ``"the file"`` names what is handed over, ``"the runtime"`` was asked after it had
            loaded the file, the ``"compute plan"`` is Core ML's own, and ``"op support"`` is what the documentation of
            the runtime says of operations of this kind.
        ops: The operations by kind and place.
    """

    told_by: Told
    ops: tuple[Placement, ...] = ()

    @classmethod
    def of(cls, told_by: Told, ops: Iterable[tuple[str, Place, int]]) -> Placements:
        """Sum up single operations, each given as its kind, place and multiply-accumulates."""
        counts: Counter[tuple[str, Place]] = Counter()
        macs: Counter[tuple[str, Place]] = Counter()
        for op, place, cost in ops:
            counts[op, place] += 1
            macs[op, place] += cost
        return cls(told_by, tuple(Placement(*key, counts[key], macs[key]) for key in sorted(counts)))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all operations."""
        return sum(entry.macs for entry in self.ops)

    @property
    def fallback(self) -> tuple[Placement, ...]:
        """The operations on the runtime's own CPU kernels that hold multiply-accumulates, the costliest first."""
        found = [entry for entry in self.ops if entry.place == "cpu" and entry.macs]
        return tuple(sorted(found, key=lambda entry: -entry.macs))

    @property
    def fallback_share(self) -> float | None:
        """Share of the multiply-accumulates on the runtime's own CPU kernels; ``None`` where that is not known."""
        if any(entry.place in _UNDECIDED and entry.macs for entry in self.ops):
            return None
        return sum(entry.macs for entry in self.fallback) / self.macs if self.macs else 0.0
