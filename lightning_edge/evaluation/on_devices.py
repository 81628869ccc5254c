"""Files that were accepted, on the user's devices: how fast they are there, and whether they still compute the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, final

from lightning_edge.comparison import Comparison
from lightning_edge.devices.conversation import Conversation
from lightning_edge.devices.device import Device
from lightning_edge.devices.named import named
from lightning_edge.devices.remote import RemoteRunner, Times, runs_on_devices
from lightning_edge.devices.runner import MAX_CALLS, RUNTIMES
from lightning_edge.errors import AgreementError, DeviceError, EdgeError
from lightning_edge.evaluation.reference import Reference
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.validation import Validation
from lightning_edge.exporters import Artifact
from lightning_edge.exporters.run.not_run import NotRun
from lightning_edge.exporters.verify.judge import judge
from lightning_edge.measure import Tolerance, latency_of
from lightning_edge.network import Deployable, Inputs, sort_keywords
from lightning_edge.reporting.devices import DeviceRow, Endurance, Point, failures
from lightning_edge.reporting.report import Report, Row

# Stretches of a long run, and how many times of each are logged.
_STRETCHES = 60
_KEPT_TIMES = 2000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceFile:
    """A file that was accepted here, and what its values are held against.

    Attributes:
        row: What was found of it here.
        artifact: The file, without a runner.
        network: The network that it came from.
        reference: That network's outputs.
        tolerance: How far it may lie from them.
    """

    row: Row
    artifact: Artifact
    network: Deployable
    reference: Reference
    tolerance: Tolerance

    @classmethod
    def of(
        cls, row: Row, artifact: Artifact, network: Deployable, reference: Reference, tolerance: Tolerance
    ) -> DeviceFile:
        """Keep a file for devices, and let go of what runs it here."""
        waiting = NotRun(artifact.path.name, artifact.contents, "it runs on devices")
        return cls(row, replace(artifact, runner=waiting), network, reference, tolerance)


def check_devices(settings: EvaluationSettings) -> list[str]:
    """See before a training whether the devices will do after it: ask each what it is and what it lacks.

    Returns:
        What is wrong, a line each.

    Raises:
        DeviceError: If a device is not described.
    """
    problems = []
    for name, device in named(settings.devices, settings.on_devices.file).items():
        try:
            device.check()
            with Conversation(name, device) as asked:
                missing = {*asked.about.missing}
        except EdgeError as error:
            problems.append(str(error) if str(error).startswith(f"{name}: ") else f"{name}: {error}")
            continue
        needed = ["numpy", *(RUNTIMES[target][0] for target in settings.targets if runs_on_devices(target))]
        if lacking := [module for module in needed if module in missing]:
            packages = " ".join(module.replace("_", "-") for module in lacking)
            problems.append(f"{name}: install on the device: {' '.join(device.python)} -m pip install {packages}")
    return problems


def require_devices(settings: EvaluationSettings) -> None:
    """Raise one error with what `check_devices` finds.

    Raises:
        DeviceError: If there is something.
    """
    if problems := check_devices(settings):
        raise DeviceError("\n".join(problems))


def left_out(settings: EvaluationSettings) -> list[str]:
    """Say which targets of an evaluation do not run on devices."""
    others = [target for target in settings.targets if not runs_on_devices(target)]
    if not settings.devices or not others:
        return []
    return [f"Devices run the files of {' and '.join(RUNTIMES)}; those of {' and '.join(others)} were run here only."]


def run_on_devices(
    files: Sequence[DeviceFile],
    validation: Validation,
    settings: EvaluationSettings,
    tell: Callable[[str], None] = _log.info,
) -> tuple[DeviceRow, ...]:
    """Run every file on every device. One that fails is a row with an error, and does not stop the others.

    Args:
        files: The files; those of targets without a runtime for devices are passed over.
        validation: The loop that gives the metrics.
        settings: The devices, what is measured there, and how calls are timed.
        tell: Is called with a line before each step.
    """
    rows: list[DeviceRow] = []
    files = [file for file in files if runs_on_devices(file.row.target)]
    try:
        devices = named(settings.devices, settings.on_devices.file)
    except EdgeError as error:  # they were there before the training: it is not lost for that
        names = [device if isinstance(device, str) else device.label for device in settings.devices]
        return tuple(device_row(name, file.row, str(error)) for name in names for file in files)
    for name, device in devices.items():
        refused: str | None = None
        for file in files:
            measured = _OnDevice(name, device, file, validation, settings)
            if refused is None:
                tell(f"Running {measured.row.label}")
                refused = measured.run()
            else:
                measured.row = replace(measured.row, error=refused)
            rows.append(measured.row)
    return tuple(rows)


def raise_device_failures(report: Report) -> None:
    """Raise one error that names every file that did not run on a device as it should.

    Raises:
        DeviceError: If there is one.
    """
    if failed := failures(report.devices):
        raise DeviceError("\n  ".join(["not everything ran on the devices; the report has the rest:", *failed]))


def device_row(device: str, row: Row, error: str | None = None) -> DeviceRow:
    """Begin the row of a file on a device."""
    return DeviceRow(device, row.target, row.precision, row.source, error, row.path)


@final
class _OnDevice:
    """One file on one device: the row of what was found so far, whatever fails later."""

    def __init__(
        self, name: str, device: Device, file: DeviceFile, validation: Validation, settings: EvaluationSettings
    ) -> None:
        self._device, self._file = device, file
        self._validation, self._settings = validation, settings
        self.row = device_row(name, file.row)

    def run(self) -> str | None:
        """Measure, and give the reason why this device need not be tried again, if there is one."""
        try:
            self._measure()
        except DeviceError as error:
            self.row = replace(self.row, error=str(error))
            return str(error)
        except EdgeError as error:
            self.row = replace(self.row, error=str(error))
        except Exception as error:
            # Not one of ours: still no reason to lose the other files and devices after a long training.
            _log.error("%s failed", self.row.label, exc_info=True)
            self.row = replace(self.row, error=f"{type(error).__name__}: {error}")
        return None

    def _measure(self) -> None:
        given, timing, measure = self._file.artifact, self._settings.timing, self._settings.on_devices.measure
        with RemoteRunner(
            self.row.device,
            self._device,
            given.target,
            given.path,
            given.contents,
            timing.threads,
            timing.time_limit_s,
        ) as runner:
            session = _flat(runner.session)
            self.row = replace(
                self.row, about=runner.about, runtime=runner.runtime, session=session, load_ms=runner.load_ms
            )
            artifact = replace(given, runner=runner, load_ms=runner.load_ms)
            if "latency" in measure:
                self._time(artifact, runner)
            if self._settings.on_devices.sustained is not None:
                self._sustain(artifact, runner, self._settings.on_devices.sustained.minutes * 60)
            if "accuracy" in measure:
                self._validate(artifact)
            self.row = replace(self.row, peak_memory_bytes=runner.peak_memory_bytes())

    def _time(self, artifact: Artifact, runner: RemoteRunner) -> None:
        """Time the first call and warm ones, in stretches, so that some are here if the device is lost."""
        timing = self._settings.timing
        sample = artifact.ready(sort_keywords(self._file.reference.call).tensors)
        wanted = 1 + timing.warmup + timing.repeats
        ns: list[int] = []
        while len(ns) < wanted:
            found = runner.times(sample, wanted - len(ns))
            ns += found.ns
            self._fill_times(ns, found)

    def _fill_times(self, ns: list[int], found: Times) -> None:
        before = found.before if self.row.first_ms is None else self.row.before
        self.row = replace(self.row, first_ms=ns[0] / 1e6, before=before, after=found.after)
        warm = ns[1 + self._settings.timing.warmup :]
        if warm:
            latency = latency_of(warm)
            self.row = replace(
                self.row,
                p50_ms=latency.p50_ms,
                p95_ms=latency.p95_ms,
                p99_ms=latency.p99_ms,
                throughput=latency.throughput,
                repeats=len(warm),
            )

    def _sustain(self, artifact: Artifact, runner: RemoteRunner, seconds: float) -> None:
        """Make calls without a pause; the row has every stretch as soon as it is over."""
        sample = artifact.ready(sort_keywords(self._file.reference.call).tensors)
        points: list[Point] = []
        start = time.monotonic()
        while (left := start + seconds - time.monotonic()) > 0:
            found = runner.times(sample, MAX_CALLS, min(left, seconds / _STRETCHES), keep=_KEPT_TIMES)
            latency = latency_of(found.ns)
            at_s = time.monotonic() - start
            points.append(Point(at_s, found.calls, latency.p50_ms, latency.p95_ms, found.after))
            self.row = replace(self.row, sustained=Endurance.of(points))

    def _validate(self, artifact: Artifact) -> None:
        """Validate the file there in its network's place, and say so where it computes something else."""
        network, reference = self._file.network, self._file.reference
        scales = network.output_scales if network.precision == "int8" else ()
        comparison = Comparison(scales, class_scores=not reference.reconstructs)
        validation = limited(self._validation, reference, self._settings.on_devices.limit_samples)
        try:
            metrics = validation.run(reference.answers(artifact, comparison, artifact.sees))
        except EdgeError:
            with suppress(ValueError):  # not one sample came back
                self._fill_agreement(comparison)
            raise
        self.row = replace(self.row, metrics=metrics)
        self._fill_agreement(comparison)
        judgement = judge(
            comparison.result(),
            network.precision,
            self._file.tolerance,
            names=network.output_names(),
            rounding=lambda: reference.rounding(network, validation.run, artifact.sees),
        )
        self.row = replace(self.row, verdict=judgement.grade, verdict_reason="; ".join(judgement.reasons) or None)
        if judgement.grade == "broken" and self._file.row.verdict != "broken":
            raise AgreementError(
                f"{self.row.device}: {artifact.path.name} computes something else there than the network it came from, "
                f"and not here: {'; '.join(judgement.reasons)} (over {self.row.samples} samples). Try another version "
                "of the runtime on the device"
            )

    def _fill_agreement(self, comparison: Comparison) -> None:
        found = comparison.result()
        self.row = replace(
            self.row,
            samples=found.samples,
            top1=found.top1,
            max_steps=found.max_steps,
            mean_steps=found.mean_steps,
            max_relative=found.max_relative,
        )


def _flat(session: Mapping[str, Any]) -> dict[str, str]:
    """Settings of a session by name, whatever group they are in."""
    found: dict[str, str] = {}
    for name, value in session.items():
        found.update(_flat(value) if isinstance(value, Mapping) else {name: str(value)})
    return found


def limited(validation: Validation, reference: Reference, samples: int | None) -> Validation:
    """Give a loop over the first batches of a split, as many as hold so many samples; all of it for ``None``."""
    if samples is None or not reference.calls:
        return validation
    first: Inputs = reference.calls[0]
    batches = ceil(samples / max(1, first.batch_size))
    before = validation.limit_batches
    if isinstance(before, float) and before < 1.0:
        with suppress(TypeError):  # a loader without a length
            before = int(len(validation.dataloaders) * before)
    if isinstance(before, int):
        batches = min(batches, before)
    return replace(validation, limit_batches=batches)
