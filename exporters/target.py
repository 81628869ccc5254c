"""`Target`, the abstract class of all targets; `TARGETS`, the table of them; and the check of their options."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch

from lightning_edge.contents import Contents, Placements, Precision
from lightning_edge.errors import ExportError, RunnerError, check_installed, first_line, require
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.interface import Interface
from lightning_edge.network import Deployable

_OPERATOR = re.compile(
    r"\b(?:aten|torchvision|quantized_decomposed|torchao|prims)(?:::|\.)\w[\w.]*"
    r"|(?<=\bnode )\w+(?=,| \(| got)|(?<='Builder' has no attribute ')\w+"  # of coremltools
)

# torch.onnx wraps what it raises into a list of things that its own developers may do.
_STEPS = re.compile(r"This is step \d/\d of exporting")


class Target(ABC):
    """A file format and its runtime: how a network is written, what a file holds, and how it is run.

    Each target is a package with one instance named ``TARGET``, and one line in `TARGETS`.

    Attributes:
        suffix: Ending of its files.
        extra: The extra of lightning-edge that installs what it needs.
        needs: The top-level modules it needs.
        runtime_modules: Modules that running a file takes. They are imported before a load is timed.
        reader_modules: Modules that `inspect` takes. They are imported before the time limit of reading begins.
        schemes: Names of the `schemes` that it has for float networks.
        int8_options: Those of its options that concern int8 networks only.
        activation_bits: Widths of quantized activations that its runtime has kernels for.
        takes_batches: Whether it writes files for several samples a call.
        takes_images: Whether its files take pixels as images: as float32 in NCHW, whatever the layout.
        writes_folder: Whether its file is a folder.
        in_process: Whether its files run in this process, because their runtime is this package's own code.
        has_reference_kernels: Whether `open_reference` runs its files as a microcontroller does.
        mark: Bytes that each of its files has at a place near its beginning, by which another is told before it is
            read; nothing where there are none.
    """

    suffix: ClassVar[str]
    extra: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    runtime_modules: ClassVar[tuple[str, ...]] = ()
    reader_modules: ClassVar[tuple[str, ...]] = ()
    schemes: ClassVar[tuple[str, ...]] = ()
    int8_options: ClassVar[frozenset[str]] = frozenset()
    activation_bits: ClassVar[frozenset[int]] = frozenset({8})
    takes_batches: ClassVar[bool] = False
    takes_images: ClassVar[bool] = False
    writes_folder: ClassVar[bool] = False
    in_process: ClassVar[bool] = False
    has_reference_kernels: ClassVar[bool] = False
    mark: ClassVar[tuple[int, bytes]] = (0, b"")

    def prepare(self, network: Deployable, **options: Any) -> Deployable:
        """Change a network's modules before it is exported: what an exported program cannot be asked any more.

        ``network`` itself is given where nothing changes, so that targets share one program. It imports no converter.

        Args:
            network: The network in the form of a file; it stays as it is.
            options: Those of `write`.

        Raises:
            ExportError: If the target refuses the network.
            ValueError: If an option is not allowed.
        """
        return network

    @abstractmethod
    def write(self, *network_and_path: Any, **options: Any) -> None:
        """Write what `prepare` gave to a path: ``write(network, path, *, option=...)``.

        The network is a `Deployable`. The path does not exist yet, and nothing else is written. The keyword-only
        parameters of a target's own ``write`` are its options.
        """

    @abstractmethod
    def inspect(self, path: Path) -> Contents:
        """Read what the file holds from the file itself.

        Raises:
            ValueError: If it is not a whole file of this format.
        """

    @abstractmethod
    def open(self, path: Path, threads: int) -> Runner:
        """Load the file into its runtime."""

    def open_reference(self, path: Path, threads: int) -> Runner:
        """Load the file into its runtime with the kernels that a microcontroller computes as.

        Raises:
            RunnerError: If the runtime has none.
        """
        raise RunnerError(f"the runtime of {self.suffix} files has no reference kernels")

    def image_input(self, interface: Interface) -> tuple[Interface, torch.dtype]:
        """Say how a file takes images that are pixels: as uint8, or as float32 in NCHW if the target takes images."""
        if interface.pixels is not None and self.takes_images:
            return replace(interface, layout="nchw"), torch.float32
        return interface, torch.uint8

    def placements(self, path: Path) -> Placements | None:
        """Ask the runtime where it runs a file's operations; ``None`` if it does not tell."""
        return None

    def not_run_here(self, contents: Contents) -> str | None:
        """Say why this machine cannot run a file of these contents; ``None`` if it can."""
        return None

    def import_reader(self) -> None:
        """Import what reading a file takes.

        Raises:
            MissingExtraError: If it is not installed.
        """
        for name in self.reader_modules:
            require(name, self.extra)

    def sessions(self, threads: int, machine: str, features: Collection[str]) -> list[dict[str, Any]]:
        """Say how the runner of `devices` opens a file: settings to try in turn; none where it has no such runtime.

        Args:
            threads: Threads to run it with.
            machine: The device's architecture, as ``platform.machine`` names it.
            features: Of its CPU's features those that decide which kernels a runtime takes.
        """
        return []

    def import_runtime(self) -> None:
        """Import what running a file takes.

        Raises:
            MissingExtraError: If it is not installed.
        """
        for name in self.runtime_modules:
            require(name, self.extra)


TARGETS = {
    "executorch": "lightning_edge.exporters.executorch",
    "coreml": "lightning_edge.exporters.coreml",
    "tflite": "lightning_edge.exporters.tflite",
    "onnx": "lightning_edge.exporters.onnx",
}

# Options that say how a float network's weights are stored.
_OF_SCHEMES = frozenset({"scheme", "group_size", "block_size"})


def target(name: str) -> Target:
    """Import a target.

    Args:
        name: A key of `TARGETS`.

    Raises:
        ValueError: If there is no such target.
    """
    if name not in TARGETS:
        raise ValueError(f"target={name!r} is not one of {', '.join(map(repr, TARGETS))}")
    found = import_module(TARGETS[name]).TARGET
    assert isinstance(found, Target)
    return found


def check_target_installed(name: str) -> None:
    """Make sure that what a target needs is installed, without importing it.

    Raises:
        MissingExtraError: Naming the first module that is missing, and how to install it.
        ValueError: If there is no such target.
    """
    module = target(name)
    for needed in module.needs:
        check_installed(needed, module.extra)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a target does not have, and values that are not of the option's type.

    Raises:
        ValueError: Naming what was given and what is allowed.
    """
    if not options:
        return
    write = target(name).write
    parameters = inspect.signature(write).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option, value in options.items():
        if option not in allowed:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(allowed) or 'none'}")
        hint = get_type_hints(write)[option]
        choices = [get_args(kind) for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
        if choices and value is not None and value not in choices[0]:
            raise ValueError(f"{name}: {option}={value!r} is not one of {choices[0]}")
        if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name}: {option}={value!r} is not a whole number")
        if hint is bool and not isinstance(value, bool):
            raise ValueError(f"{name}: {option}={value!r} is not one of (True, False)")


def options_of(name: str, precision: Precision, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Give a target's options for a file of this precision.

    Args:
        name: A key of `TARGETS`.
        precision: Precision of the file; a float one has no part in what says something of int8 networks only.
        options: Options by target.
    """
    chosen = dict(options.get(name, {}))
    if precision == "fp32" and chosen:
        chosen = {option: value for option, value in chosen.items() if option not in target(name).int8_options}
    if precision == "int8":
        chosen = {option: value for option, value in chosen.items() if option not in _OF_SCHEMES}
    return chosen


def explain(target: str, error: BaseException, owner: str, advice: str | None = None) -> ExportError:
    """Turn what a converter raised into one error: innermost message, operator, what to try.

    Args:
        target: Name of the target.
        error: What the converter raised.
        owner: Whose operations the target has.
        advice: What to try, one sentence. If not given, to replace the operation that the converter names; where it
            names none, the fault is not the network's.
    """
    innermost = error
    while (
        below := innermost.__cause__ or (None if innermost.__suppress_context__ else innermost.__context__)
    ) is not None:
        innermost = below
    said = first_line(innermost).rstrip(".")
    found = _OPERATOR.search(str(innermost)) or _OPERATOR.search(str(error))
    operator = f" (operator {found.group().rstrip('.')})" if found and found.group() not in said else ""
    wrapped = innermost is not error and not _STEPS.search(first_line(error))
    outer = f" The converter said: {first_line(error).rstrip('.')}." if wrapped else ""
    if "data-dependent" in str(error).lower():
        advice = "The network's control flow depends on its values: write it without if and .item() on tensors."
    elif advice is None and found:
        advice = f"Replace that operation by one that {owner} has, or leave the target out."
    elif advice is None:
        advice = (
            "No operation is named, so that this may be no fault of the network: leave the target out and report it."
        )
    return ExportError(f"{target}: {said}{operator}.{outer} {advice}")
