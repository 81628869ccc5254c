"""Evaluate a trained network on the user's own validation: in torch, quantized, and as each target's file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from lightning_edge.comparison import Comparison
from lightning_edge.contents import Precision
from lightning_edge.cores import cores
from lightning_edge.errors import EdgeError, first_line
from lightning_edge.evaluation.by_layer import layer_rows
from lightning_edge.evaluation.counted import CountedValidation
from lightning_edge.evaluation.device_file import DeviceFile
from lightning_edge.evaluation.file_rows import Candidate, FileRow, metric_change
from lightning_edge.evaluation.hooks import call_hooks
from lightning_edge.evaluation.journal import Journal
from lightning_edge.evaluation.notes import metrics_note
from lightning_edge.evaluation.on_devices import left_out, run_on_devices
from lightning_edge.evaluation.original import sizes
from lightning_edge.evaluation.quantization_loss import noise_warning, training_warning
from lightning_edge.evaluation.reference import Reference, compared_with
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.side_by_side import SideBySide
from lightning_edge.evaluation.validation import Validation
from lightning_edge.exporters import deployable, options_of
from lightning_edge.exporters import target as target_module
from lightning_edge.exporters.jobs import Pending, Writers
from lightning_edge.exporters.program import check_numbers
from lightning_edge.exporters.verify.exact import exact
from lightning_edge.interrupts import unwinding
from lightning_edge.measure import interleaved_latency, module_bytes, stopwatch, torch_threads
from lightning_edge.network import Deployable, Inputs
from lightning_edge.one_run import only_run
from lightning_edge.pruning import Prune
from lightning_edge.pruning.cutting import channels_of
from lightning_edge.quantization import check_calibration, convert, float_copy, is_quantized, quantize
from lightning_edge.quantization.calibration_check import in_words
from lightning_edge.quantization.phase import as_trained
from lightning_edge.record import changes_of
from lightning_edge.reporting.monitor import Monitor, choose
from lightning_edge.reporting.report import Report, Row, Source, installed_versions
from lightning_edge.reporting.rows import (
    judged,
    timed,
    without_gain,
    write,
)
from lightning_edge.surgery import find_network
from lightning_edge.user_warnings import warn
from lightning_edge.wording import counted

# Share of values outside their range that a report speaks of: more than the outliers that calibration leaves out.
_CLIPPED = 0.05

_log = logging.getLogger(__name__)


def evaluate_module(
    validation: Validation,
    settings: EvaluationSettings,
    *,
    calibration: Callable[[], Sequence[Inputs]] | None = None,
    baseline: nn.Module | None = None,
    watched: Sequence[Monitor] = (),
    recipe: str | None = None,
    phases: Mapping[str, Mapping[str, Any]] | None = None,
    tell: Callable[[str], None] = _log.info,
    resume: bool = False,
) -> Report:
    """Export a trained network to every target, validate and time each file, and write report and manifest beside them.

    The int8 network is the one in the module if it was trained with quantizers; else the trained network is quantized
    after training, from ``calibration``. A file that loads and runs is kept, with its verdict. A target that fails is
    a row with an error and does not stop the others: follow this with `refusals.raise_failures`.

    Args:
        validation: The user's module and the loop that gives its metrics.
        settings: Which files are made, and how they are tested, timed and judged.
        calibration: Gives the inputs for post-training quantization; without it there is none.
        baseline: The float network that quantization-aware training began with; the present weights if not given.
        watched: What the training watched, the first choice where ``settings`` names no monitor.
        recipe: Text of the configuration, for the manifest.
        phases: Settings of the phases that it was trained with, by name.
        tell: Is called with a line before each step.
        resume: Whether to measure on devices only what is missing of an evaluation into the same folder that broke off
            there.

    Raises:
        EdgeError: If the network is not found, holds values that are no numbers or is not called by the loop, another
            run evaluates into the folder at the same time, there is nothing to resume, or the report cannot be written.
    """
    with unwinding(), only_run(Path(settings.dirpath)):
        journal = Journal(settings, resume)
        report = _Evaluation(validation, settings, tell, journal).run(calibration, baseline, watched)
        written = write(replace(report, phases=phases or {}), Path(settings.dirpath), recipe)
    call_hooks(settings.hooks, written, Path(settings.dirpath))
    return written


@final
class _Evaluation:
    """One evaluation: the rows so far, and the call by which each of them is timed."""

    def __init__(
        self, validation: Validation, settings: EvaluationSettings, tell: Callable[[str], None], journal: Journal
    ) -> None:
        self._validation = validation
        self._settings = settings
        self._tell = tell
        self._journal = journal
        self._rows: list[Row] = []
        self._timed: dict[int, Callable[[], int]] = {}
        self._warnings: list[str] = []
        self._notes: list[str] = left_out(settings)
        self._accepted: list[DeviceFile] = []
        self._monitor: Monitor | None = None

    def run(
        self,
        calibration: Callable[[], Sequence[Inputs]] | None,
        baseline: nn.Module | None,
        watched: Sequence[Monitor],
    ) -> Report:
        settings = self._settings
        trained = find_network(self._validation.pl_module, self._validation.module)
        check_numbers(trained)
        float_network = (float_copy(trained) if baseline is None else baseline).cpu().float().eval()
        self._notes.append(metrics_note(self._validation))
        if baseline is not None:
            self._notes.append(
                "fp32, and with it post-training quantization, is the network as it was when quantization-aware "
                "training began; what training went on to learn is in the trained network only."
            )

        float_reference = Reference(float_network)
        self._counted = CountedValidation(self._validation, float_reference)
        metrics = self._torch_row("fp32", "float", float_reference, float_network)
        self._choose_monitor(watched)
        floats = Candidate(deployable(float_network, float_reference.call), "float", float_reference, metrics, metrics)
        calibration_batches, int8 = self._int8_candidates(trained, floats, calibration)
        self._compare_quantizations()
        candidates = [floats] * settings.fp32_files + int8[-1:]
        to_ship = int8[-1].network if int8 else None
        now, original = sizes(trained, float_network, float_reference.call)
        layers, unmeasured = layer_rows(trained, float_network, float_reference.calls, to_ship)
        self._notes += [unmeasured] if unmeasured is not None else []

        self._file_rows([(target, candidate) for target in settings.targets for candidate in candidates])
        self._time()
        on_devices = run_on_devices(self._accepted, self._validation, settings, self._tell, self._journal)
        self._notes += without_gain(self._rows)
        monitor = self._monitor
        seed = os.environ.get("PL_GLOBAL_SEED")
        return Report(
            model=type(self._validation.pl_module).__name__,
            split=self._validation.split,
            rows=tuple(judged(self._rows, settings.budget, monitor, on_devices)),
            parameters=now.parameters,
            macs=now.macs,
            original=original,
            monitor=monitor.metric if monitor else None,
            warmup=settings.timing.warmup,
            repeats=settings.timing.repeats,
            threads=settings.timing.threads,
            calibration_batches=calibration_batches,
            seed=int(seed) if seed else None,
            warnings=tuple(self._warnings),
            notes=tuple(self._notes),
            channels=channels_of(change for change in changes_of(trained) if change["phase"] == Prune.name),
            versions=installed_versions(),
            devices=on_devices,
            layers=tuple(layers),
        )

    def _int8_candidates(
        self, trained: nn.Module, floats: Candidate, calibration: Callable[[], Sequence[Inputs]] | None
    ) -> tuple[int, list[Candidate]]:
        """Give the number of calibration batches, and the int8 networks there are, the one to ship last."""
        found: list[Candidate] = []
        batches = 0
        if calibration is not None:
            self._tell("Quantizing after training")
            try:
                inputs = calibration()
                batches = len(inputs)
                quantized = quantize(floats.network.graph, inputs, **as_trained(changes_of(trained)))
                if findings := check_calibration(quantized, floats.reference.calls, max_clipped=_CLIPPED):
                    self._warnings.append(in_words(findings))
                found.append(self._int8_candidate(convert(quantized), "post-training", floats))
            except EdgeError as error:
                if is_quantized(trained):
                    self._warn(f"The network could not be quantized after training as well, to compare: {error}")
                else:
                    self._rows.append(Row("torch", "int8", "post-training", error=str(error)))
                    self._tell(f"FAILED: {self._rows[-1].label}: {first_line(error)}")
        elif not is_quantized(trained):
            self._notes.append("There is no int8 network: none was trained, and no calibration data was given.")
        if is_quantized(trained):
            found.append(self._int8_candidate(convert(trained), "trained", floats))
        return batches, found

    def _int8_candidate(self, network: Deployable, source: Source, floats: Candidate) -> Candidate:
        reference = Reference(exact(network))
        comparison = Comparison(class_scores=not floats.reference.reconstructs)
        metrics = self._torch_row("int8", source, reference, network.graph, floats.reference, comparison)
        change = metric_change(self._monitor, floats.metrics, metrics)
        label, float_network, calls = self._rows[-1].label, floats.reference.network, floats.reference.calls
        if message := noise_warning(label, comparison.result(), change, float_network, calls):
            self._warn(message)
        return Candidate(network, source, reference, metrics, floats.metrics)

    def _torch_row(
        self,
        precision: Precision,
        source: Source,
        reference: Reference,
        held: nn.Module,
        floats: Reference | None = None,
        comparison: Comparison | None = None,
    ) -> Mapping[str, float]:
        """Add the row of a network in torch, compared with the float one where that is given; gives its metrics."""
        row = Row("torch", precision, source, runtime=f"PyTorch {torch.__version__}", size_bytes=module_bytes(held))
        self._tell(f"Validating {row.label}")
        answer = reference.answers()
        if floats is not None and comparison is not None:
            answer = compared_with(floats.answers(), answer, comparison)
        metrics, classes = self._counted.run(answer)
        # A converted graph in torch computes on float numbers in int8 steps, at a speed that means nothing.
        self._rows.append(replace(row, metrics=metrics, classes=classes, is_reference=precision == "int8"))
        if precision == "fp32":
            call = reference.call
            self._timed[len(self._rows) - 1] = stopwatch(lambda: reference.network(*call.args, **call.kwargs))
        return metrics

    def _file_rows(self, wanted: Sequence[tuple[str, Candidate]]) -> None:
        """Add a row for each file. They are written and run side by side, where there are cores for it."""
        settings = self._settings
        shared = self._counted, settings, self._monitor, self._tell
        files = [FileRow(target, candidate, *shared) for target, candidate in wanted]
        with ExitStack() as stack:
            writers = stack.enter_context(Writers(settings.writing_jobs, self._tell))
            begun = [self._begin(writers, target, candidate) for target, candidate in wanted]
            for file, pending in zip(files, begun, strict=True):
                file.stage(pending, stack)
            running = [file.artifact for file in files if file.artifact is not None]
            together = stack.enter_context(SideBySide(running, cores() // settings.timing.threads))
            for file in files:
                file.finish(together)
        for file in files:
            self._warnings += file.warnings
            if file.timed is not None:
                self._timed[len(self._rows)] = file.timed
            if file.on_devices is not None:
                self._accepted.append(file.on_devices)
            self._rows.append(file.row)

    def _begin(self, writers: Writers, target: str, candidate: Candidate) -> Pending:
        settings, precision = self._settings, candidate.network.precision
        return writers.begin(
            candidate.network,
            target,
            Path(settings.dirpath) / f"{settings.name}-{precision}{target_module(target).suffix}",
            label=Row(target, precision, candidate.source).label,
            running=settings.running(target, precision),
            max_fallback=settings.max_fallback,
            interface=settings.interface,
            **options_of(target, precision, settings.options),
        )

    def _time(self) -> None:
        self._tell(f"Measuring latency of {counted(len(self._timed), 'candidate')}")
        runs = {str(index): run for index, run in self._timed.items()}
        failures: dict[str, EdgeError] = {}
        timing = self._settings.timing
        with torch_threads(timing.threads), torch.inference_mode():
            found = interleaved_latency(runs, timing.warmup, timing.repeats, failures)
        # The processes of the runtimes end here.
        self._timed.clear()
        for index, latency in found.items():
            self._rows[int(index)] = timed(self._rows[int(index)], latency)
        for index, error in failures.items():
            self._rows[int(index)] = replace(self._rows[int(index)], error=f"while it was timed: {error}")

    def _choose_monitor(self, watched: Sequence[Monitor]) -> None:
        """Choose the metric that decides among those of the float network."""
        names = list(self._rows[-1].metrics)
        asked = self._settings.monitor
        if asked is not None and asked.metric not in names:
            self._warn(f"metric={asked.metric!r} is not among the metrics of {self._validation.step}: {names}")
            asked = None
        self._monitor = asked or choose(names, watched)

    def _compare_quantizations(self) -> None:
        """Warn where the deciding metric says that training with quantizers was worse than without."""
        rows = {row.source: row for row in self._rows if row.target == "torch" and row.error is None}
        if "trained" not in rows or "post-training" not in rows:
            return
        if self._monitor is None:
            self._notes.append(
                "Trained and post-training quantization were not compared: no metric's name tells whether higher is "
                "better; give metric=... and mode=..."
            )
        elif message := training_warning(
            self._monitor, rows["trained"].metrics, rows["post-training"].metrics, self._validation.split
        ):
            self._warn(message)

    def _warn(self, message: str) -> None:
        self._warnings.append(message)
        warn(message)
