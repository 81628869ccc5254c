"""The steps of an export: `stage` writes, checks and loads a file beside its place; `export` proves and accepts it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_edge.contents import Contents
from lightning_edge.errors import AgreementError
from lightning_edge.exporters.artifact import Artifact, check_kernels, open_file
from lightning_edge.exporters.order import Order, ordered
from lightning_edge.exporters.run.child import Child
from lightning_edge.exporters.run.isolated import DEFAULT_TIME_LIMIT_S
from lightning_edge.exporters.run.running import Kernels, Running
from lightning_edge.exporters.staged import Staged
from lightning_edge.exporters.verify import schemes
from lightning_edge.exporters.verify.agreement import advice, agreement_of, check_batches, judge_file, rounding_of
from lightning_edge.exporters.verify.contents import (
    check_contents,
    check_fallback,
    warn_if,
    warn_not_run,
)
from lightning_edge.exporters.writer import JUST_WRITTEN, written
from lightning_edge.files import StagedPath
from lightning_edge.interface import Interface
from lightning_edge.interrupts import unwinding
from lightning_edge.measure import Agreement, Tolerance
from lightning_edge.quiet import quiet_libraries
from lightning_edge.verdict import Judgement, Strict, check_strict
from lightning_edge.wording import counted


def stage(
    model: nn.Module,
    target: str,
    path: str | Path,
    *,
    inputs: Any = None,
    threads: int = 1,
    isolated: bool = True,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    kernels: Kernels = "delegate",
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
        kernels: As for `load`.
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
    quiet_libraries()
    running = Running(threads, isolated, time_limit_s, kernels)
    asked = ordered(model, target, path, inputs=inputs, max_fallback=max_fallback, interface=interface, **options)
    return stage_order(asked, running)


def stage_order(asked: Order, running: Running) -> Staged:
    """Write, read back and load what was ordered; errors as for `stage`."""
    check_kernels(asked.target, running.kernels, asked.max_fallback)
    place = StagedPath(asked.path)
    try:
        contents = written(asked.module, asked.prepared(), asked.path, place.staged, asked.options)
        return opened(asked, place, contents, running)
    except BaseException:
        place.discard()
        raise


def opened(
    asked: Order,
    place: StagedPath,
    contents: Contents,
    running: Running,
    child: Child | None = None,
) -> Staged:
    """Make sure that a file is what was asked for, and load it.

    Args:
        asked: What was asked for.
        place: Where the file waits.
        contents: What it holds.
        running: How it is run.
        child: As for `open_file`.

    Raises:
        AgreementError: As for `stage`.
        ExportError: If it is something else than was asked for.
        RunnerError: If it does not load.
    """
    options, target = asked.options, asked.target
    check_contents(asked.network, contents, target, wants_delegate=options.get("backend") != "portable")
    if options.get("scheme") is not None:
        warn_if(target, schemes.check_scheme(contents, options["scheme"], target))
    # A microcontroller has no delegate to hand anything to.
    placements = contents.placements if running.kernels == "delegate" else None
    check_fallback(placements, asked.max_fallback, target)
    artifact = open_file(target, place.staged, contents, running, JUST_WRITTEN, child)
    warn_not_run(artifact)
    check_batches(asked.network, artifact)
    return Staged(asked.network, artifact, place)


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
    kernels: Kernels = "delegate",
    max_fallback: float | None = None,
    interface: Interface | None = None,
    strict: Strict = True,
    **options: Any,
) -> Artifact:
    """Write a network for a target, prove it, and put the file in place.

    The file is written beside ``path``, its own contents are inspected, it is loaded and run, and its outputs are
    compared with the network's; only then does it replace what was at ``path``. What came of that is the artifact's
    ``judgement``: a file that differs is an `ExportWarning`, one that is broken an error. A file that nothing on this
    machine can run (ExecuTorch's for Core ML or Vulkan) is only inspected: that is an `ExportWarning`, its ``not_run``
    says why, and it has no ``agreement``.

    Args:
        model: A `Deployable`, a module trained with quantization (converted on a copy), or any module (exported in
            float, a copy in eval mode).
        target: A key of `TARGETS`.
        path: The file to write, with the target's suffix; missing folders are made.
        inputs: One call's arguments, for a module that is not quantized.
        batches: Inputs to compare on, each what `Inputs.of` reads, or ``(inputs, target)``. If not given: those a
            quantized module was calibrated on, as far as it keeps them, else the network's own sample.
        tolerance: How far a close file may lie from the network; by its scheme if not given.
        threads: Threads to run it with.
        isolated: As for `load`.
        time_limit_s: As for `load`.
        kernels: As for `load`.
        max_fallback: Largest share of the multiply-accumulates, 0 to 1, that may run on the runtime's own CPU kernels
            and not in the target's delegate; any if not given.
        interface: How the file is called: names, layout, pixels, labels. As the converters do it if not given;
            `load` takes what the network takes either way.
        strict: The worst grade that is no error: ``"exact"`` or ``"close"``; ``True`` refuses broken files only, and
            ``False`` none.
        options: The target's own options; for a float network also ``scheme="fp16"``, ``"int8_weight_only"``,
            ``"int4_weight_only"``, ``"int8_dynamic"`` or ``"int4_dynamic"``, as far as the target has it.

    Returns:
        The file, loaded.

    Raises:
        AgreementError: If the file is worse than ``strict`` allows; nothing is written then.
        ExportError: If the target refuses the network, writes something else than asked, or cannot write.
        RunnerError: If the file does not load or run.
        ValueError: If an argument is not allowed.
    """
    check_strict(strict)
    running: dict[str, Any] = {"threads": threads, "isolated": isolated, "time_limit_s": time_limit_s}
    running |= {"kernels": kernels, "max_fallback": max_fallback, "interface": interface}
    with unwinding(), stage(model, target, path, inputs=inputs, **running, **options) as staged:
        return proved(staged, batches, tolerance, strict, options.get("scheme"))


def proved(
    staged: Staged,
    batches: Iterable[Any] | None = None,
    tolerance: Tolerance | None = None,
    strict: Strict = True,
    scheme: schemes.Scheme | None = None,
) -> Artifact:
    """Compare a file with its network, judge it, and put it in place; arguments and errors as for `export`.

    Args:
        staged: The file.
        batches: As for `export`.
        tolerance: As for `export`.
        strict: As for `export`.
        scheme: The scheme that it was written in, if any.
    """
    if staged.artifact.not_run is not None:
        return staged.accept()
    compared = staged.network, staged.artifact
    kept = staged.network.calibration
    calls = list(batches) if batches is not None else None if kept is None else [kept]
    allowed = tolerance or (Tolerance() if scheme is None else schemes.tolerance(scheme))
    agreement = None
    try:
        agreement = agreement_of(*compared, calls)
        judgement = judge_file(*compared, agreement, allowed, lambda: rounding_of(*compared, calls))
    except AgreementError as error:
        judgement = Judgement("broken", (str(error),))
    _raise_or_warn(staged, agreement, judgement, strict)
    return replace(staged.accept(), agreement=agreement, judgement=judgement)


def _raise_or_warn(staged: Staged, agreement: Agreement | None, judgement: Judgement, strict: Strict) -> None:
    """Raise or warn of a file that is not close.

    Raises:
        AgreementError: If it is worse than ``strict`` allows.
    """
    file = f"{staged.artifact.target}: {staged.artifact.path.name}"
    samples = 0 if agreement is None else agreement.samples
    verdict = f"{judgement} (over {counted(samples, 'sample')})"
    if not judgement.allowed(strict):
        raise AgreementError(
            f"{file} computes something else than the network it came from: {verdict}. Nothing was written. "
            f"{advice(staged.network)}."
        )
    if judgement.grade in ("differs", "broken"):
        warn_if(staged.artifact.target, f"{staged.artifact.path.name} {verdict}. {advice(staged.network)}")
