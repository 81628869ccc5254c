"""Write a network for an edge runtime, prove that the file is what it should be, and load it again.

```python
artifact = export(module, "tflite", "artifacts/net.tflite", inputs=images[:1])
logits, = load("artifacts/net.tflite")(images)
```
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast, final, get_args, get_origin, get_type_hints

from torch import nn

from lightning_edge.errors import EdgeError, ExportError, RunnerError, check_installed
from lightning_edge.exporters import checks, schemes
from lightning_edge.exporters.base import (
    Artifact,
    Contents,
    Runner,
    Target,
    TensorSpec,
    compressed_bytes,
    first_line,
    in_file_form,
    in_plain_order,
    size_bytes,
)
from lightning_edge.exporters.checks import ExportWarning
from lightning_edge.exporters.staging import StagedPath, writing
from lightning_edge.measure import Tolerance
from lightning_edge.network import Deployable, Inputs, Precision

__all__ = [
    "TARGETS",
    "Artifact",
    "Contents",
    "ExportWarning",
    "Runner",
    "Staged",
    "TensorSpec",
    "check_options",
    "check_target_installed",
    "deployable",
    "export",
    "load",
    "options_of",
    "stage",
    "target",
]

TARGETS = {
    "executorch": "lightning_edge.exporters.executorch",
    "coreml": "lightning_edge.exporters.coreml",
    "tflite": "lightning_edge.exporters.tflite",
    "onnx": "lightning_edge.exporters.onnx",
}


def target(name: str) -> Target:
    """Import a target's module.

    Args:
        name: A key of `TARGETS`.

    Raises:
        ValueError: If there is no such target.
    """
    if name not in TARGETS:
        raise ValueError(f"target={name!r} is not one of {', '.join(map(repr, TARGETS))}")
    return cast(Target, import_module(TARGETS[name]))


def check_target_installed(name: str) -> None:
    """Make sure that what a target needs is installed, without importing it.

    Raises:
        MissingExtraError: Naming the first module that is missing, and how to install it.
        ValueError: If there is no such target.
    """
    module = target(name)
    for needed in getattr(module, "NEEDS", ()):
        check_installed(needed, module.EXTRA)


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


def options_of(name: str, precision: Precision, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Give a target's options for a file of this precision.

    Args:
        name: A key of `TARGETS`.
        precision: Precision of the file; a float one has no part in what says something of int8 networks only.
        options: Options by target.
    """
    chosen = dict(options.get(name, {}))
    if precision == "fp32" and chosen:
        chosen = {option: value for option, value in chosen.items() if option not in target(name).INT8_OPTIONS}
    if precision == "int8":
        chosen.pop("scheme", None)
    return chosen


def deployable(model: nn.Module, inputs: Any = None) -> Deployable:
    """Make what an exporter takes of a module: its converted int8 graph, or a float copy in eval mode.

    Args:
        model: A `Deployable` (returned as it is), a module with a quantized network, or any module.
        inputs: One call's arguments: a tensor, a tuple of positional or a mapping of keyword arguments, or `Inputs`.
            Needed for a module that is not quantized; a quantized one keeps a sample of its own.

    Raises:
        ExportError: If a weight is not finite.
        ValueError: If inputs are needed and not given, or given beside a `Deployable`.
    """
    if isinstance(model, Deployable):
        if inputs is not None:
            raise ValueError("a Deployable holds its own sample of inputs; leave inputs out")
        return model
    from lightning_edge import quantization

    checks.check_numbers(model)
    if any(quantization.is_quantized(part) for part in model.modules()):
        return quantization.convert(model)
    if inputs is None:
        raise ValueError(
            f"inputs are missing: to export {type(model).__name__} in float, give one call's arguments, "
            "for example inputs=images[:1] or inputs={'input_ids': ids}"
        )
    # A LightningModule holds its Trainer, and that everything else: the copy goes without.
    trainer = model.__dict__.get("_trainer")
    network = copy.deepcopy(model, {id(trainer): None}).cpu().float().eval().requires_grad_(False)
    sample = Inputs.of(inputs).map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    return Deployable(in_plain_order(network), sample, "fp32")


@final
class Staged:
    """A file that is written and loaded, but not yet in its place: `accept` puts it there, `discard` removes it.

    As a context it discards at the end whatever was not accepted.

    Attributes:
        network: What was exported.
        artifact: The file, loaded from where it waits.
    """

    def __init__(self, network: Deployable, artifact: Artifact, place: StagedPath) -> None:
        self.network = network
        self.artifact = artifact
        self._place = place

    def accept(self) -> Artifact:
        """Put the file in its place, replacing what was there, and return it as it is loaded now.

        Raises:
            ExportError: If it cannot be put there; the old file is then as it was and the new one is removed.
        """
        self._place.accept()
        return replace(self.artifact, path=self._place.path)

    def discard(self) -> None:
        """Remove the file; what was in its place stays. Does nothing after `accept`."""
        self._place.discard()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Discard what was not accepted."""
        self.discard()


def stage(
    model: nn.Module, target: str, path: str | Path, *, inputs: Any = None, threads: int = 1, **options: Any
) -> Staged:
    """Write a network beside ``path``, read back what the file holds, and load it.

    Args:
        model: As for `deployable`.
        target: A key of `TARGETS`.
        path: Where the file shall be in the end, with the target's suffix; missing folders are made.
        inputs: As for `deployable`.
        threads: Threads to run it with.
        options: The target's own options.

    Returns:
        The file, to be accepted or discarded.

    Raises:
        ExportError: If the target refuses the network, writes something else than asked, or cannot write.
        RunnerError: If the file does not load.
        ValueError: If an argument is not allowed.
    """
    module = _target(target)
    path = Path(path)
    _check_path(path, target, module)
    check_options(target, options)
    _check_threads(threads)
    network = deployable(model, inputs)
    checks.check_activations(network, target, module.ACTIVATION_BITS)
    scheme = options.get("scheme")
    if scheme is not None and network.precision == "int8":
        raise ValueError(f"scheme={scheme!r} is for float networks, and this one is int8 already; leave it out")
    place = StagedPath(path)
    try:
        with writing(path):
            module.write(in_file_form(network), place.staged, **options)
        contents = _inspect(module, place.staged, path.name)
        checks.check_contents(network, contents, target)
        if scheme is not None:
            checks.tell_of(target, schemes.check_scheme(contents, scheme, target))
        return Staged(network, _open(target, module, place.staged, contents, threads), place)
    except BaseException:
        place.discard()
        raise


def export(
    model: nn.Module,
    target: str,
    path: str | Path,
    *,
    inputs: Any = None,
    batches: Iterable[Any] | None = None,
    tolerance: Tolerance | None = None,
    threads: int = 1,
    **options: Any,
) -> Artifact:
    """Write a network for a target, prove it, and put the file in place.

    The file is written beside ``path``, its own contents are inspected, it is loaded and run, and its outputs are
    compared with the network's; only then does it replace what was at ``path``.

    Args:
        model: A `Deployable`, a module trained with quantization (converted on a copy), or any module (exported in
            float, a copy in eval mode).
        target: A key of `TARGETS`.
        path: The file to write, with the target's suffix; missing folders are made.
        inputs: One call's arguments, for a module that is not quantized.
        batches: Inputs to compare on, each what `Inputs.of` reads; the network's own sample if not given.
        tolerance: How far the file may lie from the network; by its scheme if not given.
        threads: Threads to run it with.
        options: The target's own options; for a float network also ``scheme="fp16"``, ``"int8_weight_only"``,
            ``"int4_weight_only"``, ``"int8_dynamic"`` or ``"int4_dynamic"``, as far as the target has it.

    Returns:
        The file, loaded.

    Raises:
        AgreementError: If the file computes something else than the network.
        ExportError: If the target refuses the network, writes something else than asked, or cannot write.
        RunnerError: If the file does not load or run.
        ValueError: If an argument is not allowed.
    """
    with stage(model, target, path, inputs=inputs, threads=threads, **options) as staged:
        agreement = checks.agreement_of(staged.network, staged.artifact, batches)
        scheme = options.get("scheme")
        allowed = tolerance or (Tolerance() if scheme is None else schemes.tolerance(scheme))
        checks.check_agreement(staged.network, staged.artifact, agreement, allowed)
        return staged.accept()


def load(path: str | Path, *, threads: int = 1) -> Artifact:
    """Load an exported file; its suffix says the target.

    Args:
        path: The file, or the folder of a Core ML package.
        threads: Threads to run it with.

    Raises:
        RunnerError: If it is missing, cut short, or not what its suffix says.
        ValueError: If the suffix belongs to no target.
    """
    path = Path(path)
    name = next((name for name in TARGETS if path.suffix == target(name).SUFFIX), None)
    if name is None:
        known = ", ".join(f"{target(name).SUFFIX} ({name})" for name in TARGETS)
        raise ValueError(f"{path} has the suffix {path.suffix!r}; load() reads {known}")
    _check_threads(threads)
    if not path.exists():
        raise RunnerError(f"{path} does not exist; export() writes it")
    module = target(name)
    return _open(name, module, path, _inspect(module, path, path.name), threads)


# `stage` and `export` take an argument of that name.
_target = target


def _inspect(module: Target, path: Path, name: str) -> Contents:
    try:
        return module.inspect(path)
    except EdgeError:
        raise
    except Exception as error:
        raise RunnerError(f"{name} is no {module.SUFFIX} file: {first_line(error)}. Export it again") from error


def _open(name: str, module: Target, path: Path, contents: Contents, threads: int) -> Artifact:
    start = time.perf_counter()
    try:
        runner = module.open(path, threads)
    except EdgeError:
        raise
    except Exception as error:
        raise RunnerError(f"{path.name} does not load: {first_line(error)}. Export it again") from error
    load_ms = (time.perf_counter() - start) * 1000
    return Artifact(name, path, size_bytes(path), compressed_bytes(path), contents, runner, load_ms)


def _check_path(path: Path, name: str, module: Target) -> None:
    if path.suffix != module.SUFFIX:
        raise ValueError(f"path={str(path)!r} has the suffix {path.suffix!r}; {name} writes {module.SUFFIX}")
    if path.is_dir() and name != "coreml":
        raise ExportError(f"cannot write {path}: a folder is there. Remove it or choose another name.")


def _check_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f"threads={threads!r} is not allowed; give 1 or more")
