"""Write a network for an edge runtime, prove that the file is what it should be, and load it again.

```python
artifact = export(module, "tflite", "artifacts/net.tflite", inputs=images[:1])
logits, = load("artifacts/net.tflite")(images)
```
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import torch
from torch import nn

from lightning_edge.errors import ExportError
from lightning_edge.exporters import checks, schemes
from lightning_edge.exporters.agreement import agreement_of, check_agreement, check_batches, rounding_of
from lightning_edge.exporters.base import Artifact, Contents, Runner, Target
from lightning_edge.exporters.calls import TensorSpec
from lightning_edge.exporters.checks import ExportWarning
from lightning_edge.exporters.file_form import in_file_form, in_plain_order
from lightning_edge.exporters.floor import floor_bytes
from lightning_edge.exporters.front import check_interface
from lightning_edge.exporters.isolated import DEFAULT_TIME_LIMIT_S
from lightning_edge.exporters.loading import check_running, contents_of, inspect_file, load, open_file, placed
from lightning_edge.exporters.reach import within_reach
from lightning_edge.exporters.staging import StagedPath, writing
from lightning_edge.exporters.targets import TARGETS, check_options, check_target_installed, options_of, target
from lightning_edge.interface import Interface
from lightning_edge.measure import Tolerance
from lightning_edge.network import Deployable, Inputs
from lightning_edge.surgery import copy_of

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
    "contents_of",
    "deployable",
    "export",
    "load",
    "options_of",
    "stage",
    "target",
]


def deployable(model: nn.Module, inputs: Any = None) -> Deployable:
    """Make what an exporter takes of a module: its converted int8 graph, or a float copy in eval mode.

    Args:
        model: A `Deployable` (returned as it is), a module with a quantized network, or any module.
        inputs: One call's arguments: a tensor, a tuple of positional or a mapping of keyword arguments, or `Inputs`.
            Needed for a module that is not quantized; a quantized one keeps a sample of its own.

    Raises:
        CompressionError: If the module cannot be copied.
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
    network = copy_of(model, {id(trainer): None}).cpu().float().eval().requires_grad_(False)
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
    model: nn.Module,
    target: str,
    path: str | Path,
    *,
    inputs: Any = None,
    threads: int = 1,
    isolated: bool = True,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    max_fallback: float | None = None,
    interface: Interface | None = None,
    **options: Any,
) -> Staged:
    """Write a network beside ``path``, read back what the file holds, and load it.

    Args:
        model: As for `deployable`.
        target: A key of `TARGETS`.
        path: Where the file shall be in the end, with the target's suffix; missing folders are made.
        inputs: As for `deployable`.
        threads: Threads to run it with.
        isolated: As for `load`.
        time_limit_s: As for `load`.
        max_fallback: Largest share of the multiply-accumulates, 0 to 1, that may run outside the target's delegate.
        interface: How the file is called; as the converters do it if not given.
        options: The target's own options.

    Returns:
        The file, to be accepted or discarded.

    Raises:
        AgreementError: If a file for several samples a call gives something else for many than for one.
        ExportError: If the target refuses the network, writes something else than asked, or cannot write.
        RunnerError: If the file does not load.
        ValueError: If an argument is not allowed.
    """
    module = _target(target)
    path = Path(path)
    _check_path(path, target, module)
    check_options(target, options)
    check_running(threads, time_limit_s)
    checks.check_share(max_fallback)
    network = deployable(model, inputs)
    checks.check_activations(network, target, module.ACTIVATION_BITS)
    interface = interface or Interface()
    check_interface(interface, network)
    scheme = options.get("scheme")
    if scheme is not None and network.precision == "int8":
        raise ValueError(f"scheme={scheme!r} is for float networks, and this one is int8 already; leave it out")
    place = StagedPath(path)
    try:
        written = within_reach(network)
        with writing(path):
            form = in_file_form(written, *_written(module, interface))
            module.write(form, place.staged, **options)
        contents = inspect_file(module, place.staged, path.name)
        checks.check_contents(written, contents, target, wants_delegate=options.get("backend") != "portable")
        if scheme is not None:
            checks.tell_of(target, schemes.check_scheme(contents, scheme, target))
        contents = placed(module, place.staged, contents)
        checks.check_fallback(contents.placements, max_fallback, target)
        artifact = open_file(target, place.staged, contents, threads, isolated, time_limit_s)
        checks.tell_not_run(artifact)
        check_batches(network, artifact)
        floor = floor_bytes(written, scheme, sparse=bool(options.get("sparse_weights")))
        return Staged(network, replace(artifact, floor_bytes=floor), place)
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
    isolated: bool = True,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    max_fallback: float | None = None,
    interface: Interface | None = None,
    **options: Any,
) -> Artifact:
    """Write a network for a target, prove it, and put the file in place.

    The file is written beside ``path``, its own contents are inspected, it is loaded and run, and its outputs are
    compared with the network's; only then does it replace what was at ``path``. A file that nothing on this machine
    can run (ExecuTorch's for Core ML or Vulkan) is only inspected: that is an `ExportWarning`, its ``not_run`` says
    why, and it has no ``agreement``.

    Args:
        model: A `Deployable`, a module trained with quantization (converted on a copy), or any module (exported in
            float, a copy in eval mode).
        target: A key of `TARGETS`.
        path: The file to write, with the target's suffix; missing folders are made.
        inputs: One call's arguments, for a module that is not quantized.
        batches: Inputs to compare on, each what `Inputs.of` reads; the network's own sample if not given.
        tolerance: How far the file may lie from the network; by its scheme if not given.
        threads: Threads to run it with.
        isolated: As for `load`.
        time_limit_s: As for `load`.
        max_fallback: Largest share of the multiply-accumulates, 0 to 1, that may run on the runtime's own CPU kernels
            and not in the target's delegate; any if not given.
        interface: How the file is called: names, layout, pixels, labels. As the converters do it if not given;
            `load` takes what the network takes either way.
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
    running: dict[str, Any] = {"threads": threads, "isolated": isolated, "time_limit_s": time_limit_s}
    running |= {"max_fallback": max_fallback, "interface": interface}
    with stage(model, target, path, inputs=inputs, **running, **options) as staged:
        if staged.artifact.not_run is not None:
            return staged.accept()
        compared = staged.network, staged.artifact
        calls = None if batches is None else list(batches)
        agreement = agreement_of(*compared, calls)
        scheme = options.get("scheme")
        allowed = tolerance or (Tolerance() if scheme is None else schemes.tolerance(scheme))
        check_agreement(*compared, agreement, allowed, lambda: rounding_of(*compared, calls))
        return replace(staged.accept(), agreement=agreement)


def _written(module: Target, interface: Interface) -> tuple[Interface, torch.dtype]:
    """How a target's file takes images: as uint8, or as images, which have no layout and come as floats."""
    if interface.pixels is not None and getattr(module, "IMAGES", False):
        return replace(interface, layout="nchw"), torch.float32
    return interface, torch.uint8


# `stage` and `export` take an argument of that name.
_target = target


def _check_path(path: Path, name: str, module: Target) -> None:
    if path.suffix != module.SUFFIX:
        raise ValueError(f"path={str(path)!r} has the suffix {path.suffix!r}; {name} writes {module.SUFFIX}")
    if path.is_dir() and name != "coreml":
        raise ExportError(f"cannot write {path}: a folder is there. Remove it or choose another name.")
