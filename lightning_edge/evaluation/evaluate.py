"""Every form of a trained network, each on the user's own validation: in torch, quantized, and as files."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from lightning_edge.comparison import Comparison
from lightning_edge.contents import Precision
from lightning_edge.errors import BudgetError, EdgeError, ExportError
from lightning_edge.evaluation.reference import Reference
from lightning_edge.evaluation.validation import Validation
from lightning_edge.exporters import TARGETS, check_options, deployable, options_of, stage
from lightning_edge.exporters import target as target_module
from lightning_edge.exporters.program import check_numbers
from lightning_edge.exporters.verify import schemes
from lightning_edge.exporters.verify.agreement import check_agreement
from lightning_edge.exporters.verify.exact import exact
from lightning_edge.interface import Interface
from lightning_edge.measure import Timing, Tolerance, interleaved_latency, module_bytes, parameter_count, stopwatch
from lightning_edge.network import Deployable, Inputs, sort_keywords
from lightning_edge.quantization import check_calibration, convert, float_copy, is_quantized, quantize
from lightning_edge.quantization.calibration_check import in_words
from lightning_edge.reporting.budget import Budget
from lightning_edge.reporting.monitor import Monitor, choose
from lightning_edge.reporting.report import Report, Row, Source, digest, installed_versions
from lightning_edge.reporting.rows import compared, described, judged, over_budget, recorded, timed, without_gain, write
from lightning_edge.surgery import find_network

# Share of values outside their range that a report speaks of: more than the outliers that calibration leaves out.
_CLIPPED = 0.05

_log = logging.getLogger(__name__)


def evaluate_module(
    validation: Validation,
    targets: Sequence[str],
    dirpath: str | Path,
    *,
    calibration: Callable[[], Sequence[Inputs]] | None = None,
    baseline: nn.Module | None = None,
    tolerance: Tolerance | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    timing: Timing | None = None,
    fp32_files: bool = True,
    monitor: Monitor | None = None,
    watched: Sequence[Monitor] = (),
    tell: Callable[[str], None] = _log.info,
    name: str = "model",
    budget: Budget | None = None,
    max_fallback: float | None = None,
    recipe: str | None = None,
    interface: Interface | None = None,
) -> Report:
    """Export a trained network to every target, validate and time each file, and write report and manifest beside them.

    The int8 network is the one in the module if it was trained with quantizers; else the trained network is quantized
    after training, from ``calibration``. A target that fails is a row with an error and does not stop the others:
    follow this with `raise_failures`.

    Args:
        validation: The user's module and the loop that gives its metrics.
        targets: Keys of `exporters.TARGETS`.
        dirpath: Folder for ``<name>-<precision><suffix>``, ``report.json`` and ``report.md``.
        calibration: Gives the inputs for post-training quantization; without it there is none.
        baseline: The float network that quantization-aware training began with; the present weights if not given.
        tolerance: How far each file may lie from the network it came from over the whole split.
        options: Options of targets, by target.
        timing: Warm-up, repeats and threads of the latency measurement.
        fp32_files: Whether to export the float network as well.
        monitor: The metric that decides between post-training and trained quantization; found by itself if not given.
        watched: What the training watched, the first choice where ``monitor`` is not given.
        tell: Is told what is done next.
        name: How the files are named.
        budget: What each file may cost; see `raise_over_budget`.
        max_fallback: Largest share of the multiply-accumulates that a file may leave to its runtime's own CPU kernels.
        recipe: Text of the configuration, for the manifest.
        interface: How the files are called.

    Raises:
        ValueError: If a target is unknown.
        EdgeError: If the network is not found, holds values that are no numbers or is not called by the loop, or the
            report cannot be written.
    """
    check_targets(targets, options)
    writing: dict[str, Any] = {"max_fallback": max_fallback, "interface": interface}
    report = _Evaluation(
        validation, Path(dirpath), tolerance or Tolerance(), options or {}, timing or Timing(), tell, name, writing
    ).run(targets, calibration, baseline, fp32_files, monitor, watched, budget)
    return write(report, Path(dirpath), recipe)


def check_targets(targets: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Refuse targets that there are not, twice the same, and options for a target that is not asked for.

    Raises:
        ValueError: Naming what was given and what is allowed.
    """
    allowed = ", ".join(map(repr, TARGETS))
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets={targets!r}: give a list of one or more of {allowed}")
    for name in targets:
        if name not in TARGETS:
            raise ValueError(f"targets={list(targets)}: {name!r} is not one of {allowed}")
    if len(set(targets)) < len(targets):
        raise ValueError(f"targets={list(targets)} names a target twice")
    for name, chosen in (options or {}).items():
        if name not in targets:
            raise ValueError(f"options are given for {name!r}, which is not one of targets={list(targets)}")
        check_options(name, chosen)


def raise_failures(report: Report) -> None:
    """Raise one error that names every file that could not be made.

    Raises:
        ExportError: If there is one.
    """
    if report.failures:
        lines = "\n".join(f"  {row.label}: {row.error}" for row in report.failures)
        raise ExportError(f"{len(report.failures)} of the files could not be made; the report has the others:\n{lines}")


def raise_over_budget(report: Report) -> None:
    """Raise one error that names every file to ship that exceeds its budget.

    Raises:
        BudgetError: If there is one.
    """
    if told := over_budget(report):
        raise BudgetError("\n".join([*told, "Make the network smaller, or state another budget"]))


@final
class _Evaluation:
    """One evaluation: the rows so far and what each of them is timed by."""

    def __init__(
        self,
        validation: Validation,
        dirpath: Path,
        tolerance: Tolerance,
        options: Mapping[str, Mapping[str, Any]],
        timing: Timing,
        tell: Callable[[str], None],
        name: str,
        writing: Mapping[str, Any],
    ) -> None:
        self._validation = validation
        self._dirpath = dirpath
        self._tolerance = tolerance
        self._options = options
        self._timing = timing
        self._tell = tell
        self._name = name
        self._writing = writing
        self._rows: list[Row] = []
        self._timed: dict[int, Callable[[], int]] = {}
        self._warnings: list[str] = []
        self._notes: list[str] = []

    def run(
        self,
        targets: Sequence[str],
        calibration: Callable[[], Sequence[Inputs]] | None,
        baseline: nn.Module | None,
        fp32_files: bool,
        monitor: Monitor | None,
        watched: Sequence[Monitor],
        budget: Budget | None,
    ) -> Report:
        trained = find_network(self._validation.pl_module, self._validation.module)
        check_numbers(trained)
        float_network = (float_copy(trained) if baseline is None else baseline).cpu().float().eval()
        self._note_metrics()
        if baseline is not None:
            self._notes.append(
                "fp32, and with it post-training quantization, is the network as it was when quantization-aware "
                "training began; what training went on to learn is in the trained network only."
            )

        float_reference = Reference(float_network)
        self._torch_row("fp32", "float", float_reference, float_network)
        assert float_reference.sample is not None
        networks: list[tuple[Deployable, Source, Reference]] = []
        if fp32_files:
            networks.append((deployable(float_network, float_reference.sample), "float", float_reference))
        calibration_batches, int8 = self._int8_networks(trained, float_network, calibration, float_reference.calls)
        networks += int8[-1:]

        for target in targets:
            for network, source, reference in networks:
                self._file_row(target, network, source, reference)
        self._time(float_reference.sample)
        self._notes += without_gain(self._rows)
        monitor = self._compare_quantizations(monitor, watched)
        seed = os.environ.get("PL_GLOBAL_SEED")
        return Report(
            model=type(self._validation.pl_module).__name__,
            split=self._validation.split,
            rows=tuple(judged(self._rows, budget, monitor)),
            parameters=parameter_count(float_network),
            monitor=monitor.metric if monitor else None,
            warmup=self._timing.warmup,
            repeats=self._timing.repeats,
            threads=self._timing.threads,
            calibration_batches=calibration_batches,
            seed=int(seed) if seed else None,
            warnings=tuple(self._warnings),
            notes=tuple(self._notes),
            versions=installed_versions(),
        )

    def _note_metrics(self) -> None:
        if self._validation.own_step:
            self._notes.append(f"The metrics are what {self._validation.step} logs with each candidate in its place.")
        elif self._validation.metrics:
            self._notes.append("The metrics were given with metrics=... and updated with (outputs, target).")
        else:
            self._notes.append(
                f"There are no task metrics: the LightningModule has no {self._validation.step}, and metrics=... "
                "was not given."
            )

    def _int8_networks(
        self,
        trained: nn.Module,
        float_network: nn.Module,
        calibration: Callable[[], Sequence[Inputs]] | None,
        validation: Sequence[Inputs],
    ) -> tuple[int, list[tuple[Deployable, Source, Reference]]]:
        """Give the post-training and the trained int8 network, where there are such, the one to ship last."""
        found: list[tuple[Deployable, Source, Reference]] = []
        batches = 0
        if calibration is not None:
            self._tell("Quantizing after training")
            try:
                inputs = calibration()
                batches = len(inputs)
                quantized = quantize(float_network, inputs)
                if findings := check_calibration(quantized, validation, max_clipped=_CLIPPED):
                    self._warnings.append(in_words(findings))
                found.append(self._int8(convert(quantized), "post-training"))
            except EdgeError as error:
                if is_quantized(trained):
                    self._warn(f"There is no post-training baseline to compare with: {error}")
                else:
                    self._rows.append(Row("torch", "int8", "post-training", error=str(error)))
        elif not is_quantized(trained):
            self._notes.append("There is no int8 network: none was trained, and no calibration data was given.")
        if is_quantized(trained):
            found.append(self._int8(convert(trained), "trained"))
        return batches, found

    def _int8(self, network: Deployable, source: Source) -> tuple[Deployable, Source, Reference]:
        reference = Reference(exact(network))
        self._torch_row("int8", source, reference, network.graph)
        return network, source, reference

    def _torch_row(self, precision: Precision, source: Source, reference: Reference, held: nn.Module) -> None:
        row = Row("torch", precision, source, runtime=f"PyTorch {torch.__version__}", size_bytes=module_bytes(held))
        self._tell(f"Validating {row.label}")
        metrics = self._validation.run(reference.answers())
        # A converted graph in torch computes on float numbers in int8 steps, at a speed that means nothing.
        self._rows.append(replace(row, metrics=metrics, is_reference=precision == "int8"))
        if precision == "fp32":
            call = reference.call
            self._timed[len(self._rows) - 1] = stopwatch(lambda: reference.network(*call.args, **call.kwargs))

    def _file_row(self, target: str, network: Deployable, source: Source, reference: Reference) -> None:
        row = Row(target, network.precision, source)
        path = self._dirpath / f"{self._name}-{network.precision}{target_module(target).suffix}"
        self._tell(f"Exporting and validating {row.label}")
        try:
            with ExitStack() as stack:
                with recorded() as caught:
                    options = options_of(target, network.precision, self._options)
                    row = replace(row, scheme=options.get("scheme"))
                    running: dict[str, Any] = {
                        "threads": self._timing.threads,
                        "time_limit_s": self._timing.time_limit_s,
                        **self._writing,
                    }
                    staged = stack.enter_context(stage(network, target, path, **running, **options))
                self._warnings += [f"{row.label}: {warning}" for warning in caught]
                row = described(row, staged.artifact)
                if staged.artifact.not_run is not None:
                    # Its contents are all that can be told; the warning of it is among the report's.
                    artifact = staged.accept()
                    self._rows.append(replace(row, path=artifact.path.name, sha256=digest(artifact.path)))
                    return
                scales = network.output_scales if network.precision == "int8" else ()
                comparison = Comparison(scales, class_scores=not reference.reconstructs)
                metrics = self._validation.run(reference.answers(staged.artifact, comparison, staged.artifact.sees))
                agreement = comparison.result()
                memory = staged.artifact.runner.peak_memory_bytes()
                row = compared(replace(row, metrics=metrics, peak_memory_bytes=memory), agreement)
                with recorded() as caught:
                    check_agreement(
                        network,
                        staged.artifact,
                        agreement,
                        self._tolerance_of(options),
                        lambda: reference.rounding(network, self._validation.run, staged.artifact.sees),
                    )
                self._warnings += [f"{row.label}: {warning}" for warning in caught]
                artifact = staged.accept()
            row = replace(row, path=artifact.path.name, sha256=digest(artifact.path))
            if not artifact.runner.is_reference:
                self._timed[len(self._rows)] = artifact.timed_call(sort_keywords(reference.call).tensors)
        except EdgeError as error:
            row = replace(row, error=str(error))
        except Exception as error:
            # Not one of ours: still no reason to lose the other targets after a long training.
            _log.error("%s failed", row.label, exc_info=True)
            row = replace(row, error=f"{type(error).__name__}: {error}")
        self._rows.append(row)

    def _tolerance_of(self, options: Mapping[str, Any]) -> Tolerance:
        """The user's tolerance, or that of the scheme that the file has."""
        if self._tolerance == Tolerance() and options.get("scheme") is not None:
            return schemes.tolerance(options["scheme"])
        return self._tolerance

    def _time(self, sample: Inputs) -> None:
        self._tell(f"Measuring latency of {len(self._timed)} candidates")
        runs = {str(index): run for index, run in self._timed.items()}
        failures: dict[str, EdgeError] = {}
        with torch_threads(self._timing.threads), torch.inference_mode():
            found = interleaved_latency(runs, self._timing.warmup, self._timing.repeats, failures)
        # The processes of the runtimes end here.
        self._timed.clear()
        for index, latency in found.items():
            self._rows[int(index)] = timed(self._rows[int(index)], latency)
        for index, error in failures.items():
            self._rows[int(index)] = replace(self._rows[int(index)], error=f"while it was timed: {error}")

    def _compare_quantizations(self, monitor: Monitor | None, watched: Sequence[Monitor]) -> Monitor | None:
        rows = {row.source: row for row in self._rows if row.target == "torch" and row.error is None}
        names = list(rows["float"].metrics)
        if monitor is not None and monitor.metric not in names:
            self._warn(f"metric={monitor.metric!r} is not among the metrics of {self._validation.step}: {names}")
            monitor = None
        monitor = monitor or choose(names, watched)
        if "trained" not in rows or "post-training" not in rows:
            return monitor
        if monitor is None:
            self._notes.append(
                "Trained and post-training quantization were not compared: no metric's name tells whether higher is "
                "better; give metric=... and mode=..."
            )
            return None
        trained, after = (rows[source].metrics[monitor.metric] for source in ("trained", "post-training"))
        if monitor.worse(trained, after):
            self._warn(
                f"Quantization-aware training is worse than post-training quantization: {monitor.metric} {trained:.4f} "
                f"against {after:.4f} on the {self._validation.split} split ({monitor.mode} is better). Lower the "
                "learning rate (3 to 10 times), start later, move fold_batch_norm, or keep the most sensitive layers "
                "float (Quantize(skip=[...]); lightning_edge.sensitivity names them). Or ship the post-training one."
            )
        return monitor

    def _warn(self, message: str) -> None:
        self._warnings.append(message)
        warnings.warn(message, stacklevel=2)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute with this many threads while the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
