"""What a file holds, whatever its format: its weights, its inputs and outputs, and where its operations run.

Knows no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_edge.interface import Interface

Precision = Literal["fp32", "int8"]

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


@dataclass(frozen=True)
class Contents:
    """What a file holds, read from the file itself and not from what was asked for.

    Attributes:
        int8_weight_bytes: Bytes of weights of convolution and linear operations stored as 8-bit integers.
        float_weight_bytes: Bytes of such weights stored in a float type.
        half_weight_bytes: Those of them in a 16-bit one.
        int4_weight_bytes: Bytes of such weights stored as 4-bit integers, two to a byte.
        ops: Every operation of the file with its count.
        float_compute_ops: Convolution, linear and matmul operations that compute in float.
        float_ops: The other operations that compute in float (an int8 file's float islands).
        delegated_ops: Operations handed to the target's delegate; ``None`` where the file does not tell.
        undelegated_ops: Names of operations left to the runtime's own kernels; ``None`` where the file does not tell.
        planned_memory_bytes: Memory the file plans for activations, ``None`` where it does not tell.
        palette_weight_bytes: Bytes of such weights stored as indices into a table of values, without the tables.
        sparse_weight_bytes: Bytes of such weights stored as their values that are not zero and one bit for each place;
            where these values are integers, they are among the integers and only the bits are here.
        inputs: What the file takes, in its own order and layout.
        outputs: What it gives.
        placements: Where its operations run, as far as the file tells; ``None`` where it does not.
        interface: How it is called, as it was told when it was written.
        delegates: What it hands operations to, where it can hold graphs for several.
    """

    int8_weight_bytes: int
    float_weight_bytes: int
    ops: Mapping[str, int]
    float_compute_ops: tuple[str, ...] = ()
    float_ops: tuple[str, ...] = ()
    delegated_ops: int | None = None
    undelegated_ops: tuple[str, ...] | None = None
    planned_memory_bytes: int | None = None
    half_weight_bytes: int = 0
    int4_weight_bytes: int = 0
    palette_weight_bytes: int = 0
    sparse_weight_bytes: int = 0
    inputs: tuple[Endpoint, ...] = ()
    outputs: tuple[Endpoint, ...] = ()
    placements: Placements | None = None
    interface: Interface = field(default_factory=Interface)
    delegates: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, if it keeps any."""
        return self.interface.labels

    @property
    def precision(self) -> Precision:
        """``"int8"`` if any weight is stored as an integer, else ``"fp32"``."""
        return "int8" if self.int8_weight_bytes or self.int4_weight_bytes else "fp32"
