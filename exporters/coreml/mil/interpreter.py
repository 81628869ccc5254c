"""A reference interpreter of Core ML's MIL, in torch: the program as plain values, and what runs it.

For machines without Core ML. It reuses torch's kernels, so it tests what was written into the file, not Apple's
kernels. Where the program says ``fp16`` every operation computes in float32 and its result is rounded to half.
A program with 8-bit activations computes in float64 instead: int8 kernels sum integers, and sums in float32 depend on
their order, which tips values that lie between two integers (see `exact`, which an int8 file is held against).
Knows nothing of coremltools: `package.read` makes the `Program`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor

from lightning_edge.errors import RunnerError
from lightning_edge.exporters.coreml.mil.operations import MOVES, OPS
from lightning_edge.exporters.coreml.mil.values import DTYPES, FLOATS, tensor

SUPPORTED_OPS = tuple(sorted(["const", *OPS]))
"""Every MIL operation the interpreter runs."""

_EXACT = MOVES | {"relu", "relu6", "max_pool", "maximum", "minimum", "abs"}


@dataclass(frozen=True, eq=False)
class Variable:
    """A value the program computes or is fed: its name, MIL type and shape, -1 where that is free."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Constant:
    """A value written into the program: an array, or a string."""

    value: numpy.ndarray[Any, Any] | str
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the array, zero for a string."""
        return 0 if isinstance(self.value, str) else self.value.nbytes


Operand: TypeAlias = "Variable | Constant | tuple[Variable | Constant, ...]"


@dataclass(frozen=True, eq=False)
class Operation:
    """One step of the program: what it does, what it reads by MIL's names, what it makes."""

    kind: str
    name: str
    inputs: Mapping[str, Operand]
    outputs: tuple[Variable, ...]

    def operands(self) -> Iterator[Variable | Constant]:
        """Every value it reads, tuples opened."""
        for operand in self.inputs.values():
            yield from operand if isinstance(operand, tuple) else (operand,)


@dataclass(frozen=True, eq=False)
class Program:
    """A straight-line MIL function; ``outputs`` may be constants or inputs as well as results.

    Attributes:
        inputs: What it takes.
        operations: What it computes, in order.
        outputs: What it gives.
        notes: Texts that the package it was read from keeps by name.
    """

    inputs: tuple[Variable, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[Variable | Constant, ...]
    notes: Mapping[str, str] = field(default_factory=dict)


def decode(constant: Constant, floating: torch.dtype = torch.float32) -> Any:
    """Give a constant in the form the functions of `mil_ops` read: numbers, strings, lists, or tensors of data.

    Args:
        constant: The constant.
        floating: Type of a tensor of real numbers.
    """
    if isinstance(constant.value, str):
        return constant.value
    array = numpy.asarray(constant.value)
    if array.ndim == 0:
        return array.item()
    if constant.dtype in FLOATS:
        return torch.from_numpy(array.astype(numpy.float32)).to(floating)
    if constant.dtype in ("int8", "uint8"):
        return torch.from_numpy(array.astype(constant.dtype))
    return array.tolist()


@dataclass
class _Step:
    """An operation bound to the slots it reads and writes."""

    operation: Operation
    function: Callable[..., Any]
    fixed: dict[str, Any]
    reads: list[tuple[str, int]]
    gathers: list[tuple[str, list[tuple[int | None, Any]]]]
    writes: list[int]
    halves: list[bool]
    floating: torch.dtype
    releases: list[int] = field(default_factory=list)

    def run(self, values: list[Any]) -> None:
        """Compute into ``values``, rounding half-precision results.

        Raises:
            RunnerError: If torch refuses the operation.
        """
        named = dict(self.fixed)
        for key, slot in self.reads:
            # What is quantized as it is fed is so in float32, by a device as by the network.
            named[key] = values[slot] if self.operation.kind == "quantize" else self._typed(values[slot])
        for key, parts in self.gathers:
            named[key] = [self._typed(value if slot is None else values[slot]) for slot, value in parts]
        try:
            result = self.function(**named)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise RunnerError(
                f"the reference interpreter cannot run {self.operation.kind!r} ({self.operation.name!r}): {error}"
            ) from error
        results = result if isinstance(result, tuple) else (result,)
        for slot, half, value in zip(self.writes, self.halves, results, strict=True):
            values[slot] = self._typed(value.half() if half else value)
        for slot in self.releases:
            values[slot] = None

    def _typed(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.floating) if real else value


class Interpreter:
    """Runs a MIL program operation by operation in torch.

    Everything that depends on constants alone is computed here, once.

    Args:
        program: The program; see `package.read`.

    Raises:
        RunnerError: If the program holds an operation that is not in `SUPPORTED_OPS`.
    """

    def __init__(self, program: Program) -> None:
        unknown = sorted({operation.kind for operation in program.operations} - set(SUPPORTED_OPS))
        if unknown:
            raise RunnerError(
                f"the program holds operations the reference interpreter does not know: {', '.join(unknown)}. "
                f"It knows: {', '.join(SUPPORTED_OPS)}. Run the package on macOS, where Core ML itself runs it, "
                "or write the network with other operations."
            )
        self._program = program
        quantizes = any(operation.kind == "quantize" for operation in program.operations)
        self._floating = torch.float64 if quantizes else torch.float32
        self._slots: dict[Variable, int] = {}
        self._initial: list[Any] = []
        self._steps: list[_Step] = []
        self._checked = False
        known: dict[Variable, Any] = {}
        for variable in program.inputs:
            self._slot(variable)
        with torch.no_grad():
            for operation in program.operations:
                self._bind(operation, known)
        self._outputs = [self._output(output, known) for output in program.outputs]
        self._plan_releases()

    def _slot(self, variable: Variable) -> int:
        if variable not in self._slots:
            self._slots[variable] = len(self._initial)
            self._initial.append(None)
        return self._slots[variable]

    def _output(self, output: Variable | Constant, known: Mapping[Variable, Any]) -> tuple[int | None, Any]:
        if isinstance(output, Constant):
            return None, tensor(decode(output, self._floating))
        return (None, known[output]) if output in known else (self._slots[output], None)

    def _bind(self, operation: Operation, known: dict[Variable, Any]) -> None:
        fixed: dict[str, Any] = {}
        reads: list[tuple[str, int]] = []
        gathers: list[tuple[str, list[tuple[int | None, Any]]]] = []

        def part(operand: Variable | Constant) -> tuple[int | None, Any]:
            if isinstance(operand, Constant):
                return None, decode(operand, self._floating)
            return (None, known[operand]) if operand in known else (self._slots[operand], None)

        for key, operand in operation.inputs.items():
            if isinstance(operand, tuple):
                parts = [part(element) for element in operand]
                if any(slot is not None for slot, _ in parts):
                    gathers.append((key, parts))
                else:
                    fixed[key] = [value for _, value in parts]
                continue
            slot, value = part(operand)
            if slot is None:
                fixed[key] = value
            else:
                reads.append((key, slot))
        halves = [output.dtype == "fp16" and operation.kind not in _EXACT for output in operation.outputs]
        step = _Step(operation, OPS[operation.kind], fixed, reads, gathers, [], halves, self._floating)
        if not reads and not gathers:
            slots: list[Any] = [None] * len(operation.outputs)
            step.writes = list(range(len(slots)))
            step.run(slots)
            self._check(operation, slots)
            known.update(zip(operation.outputs, slots, strict=True))
            return
        step.writes = [self._slot(output) for output in operation.outputs]
        self._steps.append(step)

    def _plan_releases(self) -> None:
        kept = {slot for slot, _ in self._outputs}
        for step in reversed(self._steps):
            slots = {slot for _, slot in step.reads} | {slot for _, parts in step.gathers for slot, _ in parts}
            for slot in sorted({slot for slot in slots | set(step.writes) if slot is not None} - kept):
                step.releases.append(slot)
                kept.add(slot)

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run on the inputs in the program's order.

        Args:
            tensors: One tensor for each input, of the shape the program states.

        Returns:
            The outputs in the program's order; half-precision ones as float32.

        Raises:
            RunnerError: If number or shape of the tensors is not the program's, or an operation fails.
        """
        values = list(self._initial)
        if len(tensors) != len(self._program.inputs):
            names = ", ".join(variable.name for variable in self._program.inputs)
            raise RunnerError(f"the program takes {len(self._program.inputs)} inputs ({names}), {len(tensors)} given")
        for variable, given in zip(self._program.inputs, tensors, strict=True):
            if not _is_of(given, variable):
                raise RunnerError(
                    f"input {variable.name!r} has shape {list(variable.shape)}, a tensor of {list(given.shape)} was "
                    "given; give one sample of the shape the network was exported with"
                )
            values[self._slots[variable]] = given.detach().to(DTYPES[variable.dtype])
        with torch.no_grad():
            for step in self._steps:
                if self._checked:
                    step.run(values)
                else:
                    self._run_checked(step, values)
        self._checked = True
        outputs = [value if slot is None else values[slot] for slot, value in self._outputs]
        return [output.float() if output.is_floating_point() else output for output in outputs]

    def _run_checked(self, step: _Step, values: list[Any]) -> None:
        releases, step.releases = step.releases, []
        try:
            step.run(values)
            self._check(step.operation, [values[slot] for slot in step.writes])
        finally:
            step.releases = releases
        for slot in releases:
            values[slot] = None

    def _check(self, operation: Operation, results: Sequence[Any]) -> None:
        """Hold what an operation gave against what the program declares, so that a wrong reading cannot pass."""
        for output, result in zip(operation.outputs, results, strict=True):
            value = tensor(result)
            declared = self._floating if output.dtype in FLOATS else DTYPES.get(output.dtype, value.dtype)
            if not _is_of(value, output) or value.dtype != declared:
                raise RunnerError(
                    f"{operation.kind!r} ({operation.name!r}) gave {value.dtype} {list(value.shape)}, but the program "
                    f"declares {output.dtype} {list(output.shape)}; the reference interpreter reads this form of it "
                    "wrongly"
                )


def _is_of(value: Tensor, variable: Variable) -> bool:
    """Whether a tensor has the shape of a variable, where that is not free."""
    return value.dim() == len(variable.shape) and all(
        size in (-1, found) for size, found in zip(variable.shape, value.shape, strict=True)
    )
