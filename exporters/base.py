"""What every target shares: the artifact that comes out, what it says of itself, and the contract of a target.

Knows no file format and no runtime.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_edge.anatomy import Endpoint, Placements
from lightning_edge.errors import EdgeError, ExportError, RunnerError, require
from lightning_edge.exporters.calls import TensorSpec, conform, stack
from lightning_edge.exporters.front import as_file_sees, as_file_takes, as_network_takes, network_dtype, network_shape
from lightning_edge.interface import Interface
from lightning_edge.measure import Agreement
from lightning_edge.network import Deployable, Inputs, Precision

Result = TypeVar("Result")

_COLOR = re.compile(r"\x1b\[[\d;]*m")
_OPERATOR = re.compile(r"\b(?:aten|torchvision|quantized_decomposed|torchao|prims)(?:::|\.)\w[\w.]*")


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


class Runner(Protocol):
    """Runs one loaded file on one sample, or on several at once where the file is written for that.

    Attributes:
        runtime: What runs it, with version, delegate and thread count; says so where it is not the target's own.
        is_reference: Whether this is a reference interpreter, whose latency means nothing for the target.
        inputs: What it takes, in the file's own layout and in the order of `Inputs.tensors` with keyword arguments
            sorted by name.
    """

    runtime: str
    is_reference: bool
    inputs: tuple[TensorSpec, ...]

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one call, mostly one sample; float inputs and outputs are real values."""
        ...


@dataclass(frozen=True, eq=False)
class Artifact:
    """An exported file, loaded: call it as the network it came from, batch of any size.

    Attributes:
        target: Name of the target, a key of `exporters.TARGETS`.
        path: The file, or the folder of a Core ML package.
        size_bytes: Bytes on disk, summed over a package's files.
        compressed_bytes: Bytes of a zip (deflate) of it, what an app download pays.
        contents: What the file says of itself.
        runner: Runs one sample.
        load_ms: Wall time from the path to a runner that is ready, milliseconds; ``None`` where there is none.
        floor_bytes: Bytes that the values of the network it was written from need by themselves; ``None`` for a file
            that was only loaded.
        agreement: How far it lay from that network; ``None`` for a file that was not compared.
        not_run: Why nothing on this machine can run it, and calling it is an error; ``None`` where it runs.
    """

    target: str
    path: Path
    size_bytes: int
    compressed_bytes: int
    contents: Contents
    runner: Runner = field(repr=False)
    load_ms: float | None
    floor_bytes: int | None = None
    agreement: Agreement | None = None
    not_run: str | None = None

    @property
    def precision(self) -> Precision:
        """Precision of the weights, read from the file."""
        return self.contents.precision

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it is called with, in the network's own layout."""
        interface = self.contents.interface
        return tuple(
            TensorSpec(network_shape(spec.shape, interface), network_dtype(spec.shape, spec.dtype, interface))
            for spec in self.runner.inputs
        )

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Run on a batch, sample by sample or as many at once as the file takes; gives the outputs, batch first.

        Raises:
            RunnerError: If number, shape or type of the inputs is not what the file takes, or it fails to run.
        """
        if any(
            hasattr(leaf, "__array__") and not isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))
        ):
            raise RunnerError(f"{self.path.name} was given a numpy array; give tensors, torch.as_tensor(array)")
        inputs = sort_keywords(Inputs(args, kwargs)).map(lambda tensor: tensor.detach().cpu())
        if not any(tensor.dim() for tensor in inputs.tensors):
            return stack([self.run(inputs.tensors)])
        if inputs.batch_size == 0:
            raise RunnerError(f"{self.path.name} was given a batch of 0 samples; give at least one")
        most = self.contents.interface.max_batch
        return stack([self.run(inputs.sample(start, most).tensors) for start in range(0, inputs.batch_size, most)])

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one call, after checking them against the file.

        Raises:
            RunnerError: If number, shape or type of the inputs is not what the file takes, or it fails to run.
        """
        ready = self.ready(tensors)
        return self.guarded(lambda: self.runner(ready))

    def ready(self, tensors: list[Tensor]) -> list[Tensor]:
        """Check the flattened inputs of one call, and make of them what the file itself takes.

        Where that is pixels, images may be given as uint8 as well, in the network's own layout.

        Raises:
            RunnerError: If number, shape or type of the inputs is not what the network took, or a file that takes
                pixels is given values that are none.
        """
        interface = self.contents.interface
        values = [as_network_takes(tensor, interface) for tensor in tensors]
        given = conform(values, self.inputs, self.path.name, interface.max_batch)
        try:
            return [as_file_takes(tensor, interface) for tensor in given]
        except ValueError as error:
            raise RunnerError(f"{self.path.name}: {error}") from error

    def sees(self, inputs: Inputs) -> Inputs:
        """Give a call of the network with the values that the file makes of it: whole pixels, if it takes those.

        Raises:
            RunnerError: If it takes pixels and values are none.
        """
        try:
            return inputs.map(lambda tensor: as_file_sees(tensor, self.contents.interface))
        except ValueError as error:
            raise RunnerError(f"{self.path.name}: {error}") from error

    def guarded(self, call: Callable[[], Result]) -> Result:
        """Make a call of the runner.

        Raises:
            RunnerError: If it fails, whatever the runtime raises.
        """
        try:
            with torch.no_grad():
                return call()
        except EdgeError:
            raise
        except Exception as error:
            raise RunnerError(f"{self.path.name} failed in {self.runner.runtime}: {first_line(error)}") from error


def held_call(runner: Runner, tensors: list[Tensor]) -> Callable[[], object]:
    """Give a call of a runner on one sample, to be timed.

    A runner may offer ``hold(tensors)``, which does beforehand what is this package's own and no part of the file: an
    app that has int8 values does not quantize any.
    """
    hold: Callable[[list[Tensor]], Callable[[], object]] | None = getattr(runner, "hold", None)
    return (lambda: runner(tensors)) if hold is None else hold(tensors)


class Target(Protocol):
    """One module per target offers these names and nothing else is asked of it.

    One whose files take images as such and not as tensors may say ``IMAGES = True``: the pixels of such inputs come
    into its graph as float32, in NCHW whatever the layout.

    A target may also say ``RUNTIME``, the modules that running a file takes, so that importing them is no part of
    loading it, and ``IN_PROCESS = True`` if this package's own code runs its files, which needs no process of its own.
    One whose runtime tells where it runs a file's operations may also offer ``placements(path)``, which gives
    `Placements` or ``None``. One whose files may be for another machine offers ``not_run_here(contents)``, which says
    why this one cannot run a file, or gives ``None``.

    Attributes:
        SUFFIX: Ending of its files.
        EXTRA: The extra of lightning-edge that brings what it needs.
        NEEDS: The top-level modules it needs.
        INT8_OPTIONS: Those of its options that say something of int8 networks only.
        ACTIVATION_BITS: Widths of quantized activations that its runtime has kernels for.
    """

    SUFFIX: str
    EXTRA: str
    NEEDS: tuple[str, ...]
    INT8_OPTIONS: frozenset[str]
    ACTIVATION_BITS: frozenset[int]

    def write(self, network: Deployable, path: Path, **options: Any) -> None:
        """Write the network to exactly ``path``, which does not exist yet (a staging path).

        Its keyword-only parameters are the target's options.
        """
        ...

    def inspect(self, path: Path) -> Contents:
        """Read what the file holds from the file itself."""
        ...

    def open(self, path: Path, threads: int) -> Runner:
        """Load the file into its runtime."""
        ...


def import_runtime(module: Any) -> None:
    """Import what running a target's files takes.

    Raises:
        MissingExtraError: If it is not installed.
    """
    for name in getattr(module, "RUNTIME", ()):
        require(name, module.EXTRA)


def sort_keywords(inputs: Inputs) -> Inputs:
    """Put keyword arguments in the order of their names, the one order every file is written in.

    Files name their inputs by position, some of them only so; callers are free to write keywords in any order.
    """
    return Inputs(inputs.args, dict(sorted(inputs.kwargs.items())))


def size_bytes(path: Path) -> int:
    """Count the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in _files(path))


def compressed_bytes(path: Path) -> int:
    """Count the bytes of a zip (deflate) of a file or folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in _files(path):
            archive.write(file, file.relative_to(path.parent))
    return len(buffer.getvalue())


def first_line(error: BaseException) -> str:
    """Give the first line an exception says, without colors, or its type where it says nothing."""
    lines = [line.strip() for line in _COLOR.sub("", str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def explain(target: str, error: BaseException, advice: str) -> ExportError:
    """Turn what a converter raised into one error: innermost message, operator, what to try.

    Args:
        target: Name of the target.
        error: What the converter raised.
        advice: What to try, one sentence.
    """
    innermost = error
    while (
        below := innermost.__cause__ or (None if innermost.__suppress_context__ else innermost.__context__)
    ) is not None:
        innermost = below
    found = _OPERATOR.search(str(innermost)) or _OPERATOR.search(str(error))
    operator = f" (operator {found.group().rstrip('.')})" if found else ""
    outer = "" if innermost is error else f" The converter said: {first_line(error)}."
    if "data-dependent" in str(error).lower():
        advice = "The network's control flow depends on its values: write it without if and .item() on tensors."
    return ExportError(f"{target}: {first_line(innermost).rstrip('.')}{operator}.{outer} {advice}")


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
