"""One file of an evaluation: its row, from being written to being accepted, whatever fails on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import final

from lightning_edge.errors import AgreementError, EdgeError
from lightning_edge.evaluation.counted import CountedValidation
from lightning_edge.evaluation.device_file import Beside, DeviceFile, limited
from lightning_edge.evaluation.reference import Reference
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.side_by_side import SideBySide
from lightning_edge.exporters import Artifact, Staged, options_of
from lightning_edge.exporters.jobs import Pending
from lightning_edge.exporters.verify.agreement import judge_file
from lightning_edge.measure import Agreement
from lightning_edge.network import Deployable, sort_keywords
from lightning_edge.reporting.monitor import Monitor
from lightning_edge.reporting.report import Row, Source, digest
from lightning_edge.reporting.rows import compared, described, given_verdict, recorded
from lightning_edge.verdict import Judgement, MetricChange

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A network that files are made of, where its weights come from, and its outputs and metrics over the split.

    The last are the float network's metrics.
    """

    network: Deployable
    source: Source
    reference: Reference
    metrics: Mapping[str, float]
    float_metrics: Mapping[str, float]


@final
class FileRow:
    """A file that is staged, then validated and accepted.

    Args:
        target: Its target.
        candidate: What it is made of.
        validation: The loop that gives the metrics.
        settings: How it is tested and judged.
        monitor: The metric that decides, if there is one.
        tell: Is called with a line before each step, and with what came of it.

    Attributes:
        row: What is known of it so far.
        warnings: What writing it warned of.
        artifact: The file, loaded, where it runs here and nothing has failed.
        timed: Runs it once and tells the nanoseconds, if its latency is to be measured.
        on_devices: What devices are given, if there are some.
    """

    def __init__(
        self,
        target: str,
        candidate: Candidate,
        validation: CountedValidation,
        settings: EvaluationSettings,
        monitor: Monitor | None,
        tell: Callable[[str], None],
    ) -> None:
        options = options_of(target, candidate.network.precision, settings.options)
        self.row = Row(target, candidate.network.precision, candidate.source, scheme=options.get("scheme"))
        self.warnings: list[str] = []
        self.artifact: Artifact | None = None
        self.timed: Callable[[], int] | None = None
        self.on_devices: DeviceFile | None = None
        self._candidate = candidate
        self._validation = validation
        self._settings = settings
        self._monitor = monitor
        self._tell = tell
        self._tolerance = settings.tolerance_for(options.get("scheme"))
        self._staged: Staged | None = None
        self._beside = Beside({}, candidate.float_metrics)

    def stage(self, file: Pending, stack: ExitStack) -> None:
        """Wait until the file is written and loaded; what is not accepted goes with ``stack``."""
        self._tell(f"Exporting {self.row.label}")

        def staged() -> None:
            with recorded() as caught:
                self._staged = stack.enter_context(file.staged())
            self.warnings += [f"{self.row.label}: {warning}" for warning in caught]
            self.row = described(self.row, self._staged.artifact)
            # Where a file cannot run here, its contents are all that can be told; the warnings say so.
            if self._staged.artifact.not_run is None:
                self.artifact = self._staged.artifact

        self._guarded(staged, lambda: file.announced)

    def finish(self, files: SideBySide) -> None:
        """Validate the file, judge it, and put it in its place."""
        if self._staged is None or self.row.error is not None:
            return
        self._tell(f"Validating {self.row.label}")
        self._guarded(lambda: self._accept(files))
        if self.row.error is None and self.row.verdict is not None:
            self._tell(f"{self.row.label} {self.row.judgement}")

    def _guarded(self, work: Callable[[], None], told: Callable[[], bool] = lambda: False) -> None:
        """Do a part of it; whatever goes wrong with the file is the row's error, told at once."""
        try:
            work()
            return
        except EdgeError as error:
            self.row = replace(self.row, error=str(error))
        except Exception as error:
            # Not one of ours: still no reason to lose the other targets after a long training.
            _log.error("%s failed", self.row.label, exc_info=True)
            self.row = replace(self.row, error=f"{type(error).__name__}: {error}")
        self.artifact = None
        if not told():
            self._tell(f"FAILED: {self.row.label}, there is no such file: {self.row.error}")

    def _accept(self, files: SideBySide) -> None:
        assert self._staged is not None
        if self.artifact is not None:
            self._validate(self.artifact, files)
        artifact = self._staged.accept()
        self.row = replace(self.row, path=artifact.path.name, sha256=digest(artifact.path))
        if self.artifact is None:
            return
        reference = self._candidate.reference
        if not artifact.runner.is_reference:
            self.timed = artifact.timed_call(sort_keywords(reference.call).tensors)
        if self._settings.devices:
            given = self._candidate.network, reference, self._tolerance, self._beside
            self.on_devices = DeviceFile.of(self.row, artifact, *given)

    def _validate(self, artifact: Artifact, files: SideBySide) -> None:
        """Validate a file in its network's place, and judge it."""
        network, reference = self._candidate.network, self._candidate.reference
        comparison = reference.comparison(network)
        try:
            answers = reference.answers(files.answers(artifact), comparison, artifact.sees)
            metrics, classes = self._validation.run(answers)
        except AgreementError as error:
            self.row = given_verdict(self.row, Judgement("broken", (str(error),)))
            return
        agreement = comparison.result()
        memory = artifact.runner.peak_memory_bytes()
        self.row = compared(replace(self.row, metrics=metrics, classes=classes, peak_memory_bytes=memory), agreement)

        def rounding() -> Agreement:
            return reference.rounding(network, self._validation.loop.run, artifact.sees)

        change = metric_change(self._monitor, self._candidate.metrics, metrics)
        judgement = judge_file(network, artifact, agreement, self._tolerance, rounding, change)
        self.row = given_verdict(self.row, judgement)
        self._beside = self._beside_devices(artifact)

    def _beside_devices(self, artifact: Artifact) -> Beside:
        """Find the metrics that those of devices are held against: over the samples that devices get."""
        loop, reference, settings = self._validation.loop, self._candidate.reference, self._settings.on_devices
        whole = settings.limit_samples is None or (self.row.samples or 0) <= settings.limit_samples
        if whole or not self._settings.devices or "accuracy" not in settings.measure:
            return Beside(self.row.metrics, self._candidate.float_metrics)
        part = limited(loop, reference, settings.limit_samples)
        here = part.run(reference.answers(artifact, sees=artifact.sees))
        return Beside(here, part.run(self._validation.floats.answers()))


def metric_change(
    monitor: Monitor | None, before: Mapping[str, float], after: Mapping[str, float]
) -> MetricChange | None:
    """Give the metric that decides, before and after; ``None`` where there is none."""
    if monitor is None or (name := monitor.metric) not in before or name not in after:
        return None
    return MetricChange(name, before[name], after[name], monitor.mode == "max")
