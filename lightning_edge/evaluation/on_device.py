"""One file on one device: what is measured there, and what of it is kept when something fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from statistics import median
from typing import Any, final

from torch import Tensor

from lightning_edge.comparison import Comparison
from lightning_edge.devices.device import Device
from lightning_edge.devices.native import time_by_program
from lightning_edge.devices.remote import RemoteRunner, Spent, Times
from lightning_edge.devices.runner import MAX_CALLS
from lightning_edge.errors import AgreementError, DeviceError, EdgeError, RunnerError
from lightning_edge.evaluation.device_file import DeviceFile, limited
from lightning_edge.evaluation.journal import Journal
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.validation import Validation
from lightning_edge.exporters import Artifact
from lightning_edge.exporters.verify.judge import judge
from lightning_edge.measure import latency_of
from lightning_edge.network import sort_keywords
from lightning_edge.reporting.devices import DeviceRow, Endurance, Point
from lightning_edge.reporting.report import Row
from lightning_edge.wording import counted

# Stretches of a long run, and how many times of each are logged.
_STRETCHES = 60
_KEPT_TIMES = 2000
# Samples whose way is timed.
_APART_CALLS = 20
# How often a device that is to cool down is asked, seconds.
_COOL_STEP_S = 5.0

_log = logging.getLogger(__name__)


def device_row(device: str, row: Row, error: str | None = None) -> DeviceRow:
    """Begin the row of a file on a device."""
    return DeviceRow(device, row.target, row.precision, row.source, error, row.path)


@final
class OnDevice:
    """One file on one device: the row of what was found so far, whatever fails later."""

    def __init__(
        self,
        name: str,
        device: Device,
        file: DeviceFile,
        validation: Validation,
        settings: EvaluationSettings,
        journal: Journal,
    ) -> None:
        self._device, self._file = device, file
        self._validation, self._settings = validation, settings
        self._journal = journal
        self.row = device_row(name, file.row)

    def run(self) -> str | None:
        """Measure, and give the reason why this device need not be tried again, if there is one."""
        try:
            self._progress = self._journal.progress(self.row, self._file.row.sha256 or "")
            self.row = self._progress.row or self.row
            if self._file.row.target in self._device.programs:
                self._part("program", self._measure_by_program)
            else:
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

    def _measure_by_program(self) -> None:
        """Have the device's own program time the file: its values are not known then."""
        given = self._file.artifact
        self._cool(self._device.temperature_c)
        runtime, found = time_by_program(self.row.device, self._device, given.target, given.path, self._settings.timing)
        self.row = replace(self.row, runtime=runtime, **asdict(found))

    def _part(self, name: str, measure: Callable[[], None]) -> None:
        """Measure a part, unless that was done before the run broke off."""
        if not self._progress.has(name):
            measure()
            self._progress.add(name, self.row)

    def _parts(self) -> list[str]:
        """What is asked for, as far as the device tells it."""
        settings = self._settings.on_devices
        sustained = ["sustained"] * (settings.sustained is not None)
        return [part for part in (*settings.measure, *sustained) if self._device.times or part == "accuracy"]

    def _measure(self) -> None:
        parts = self._parts()
        if parts and all(map(self._progress.has, parts)):
            if "accuracy" in self._settings.on_devices.measure:  # by the outputs that it gave
                self._validate()
            return
        given, timing = self._file.artifact, self._settings.timing
        with RemoteRunner(
            self.row.device,
            self._device,
            given.target,
            given.path,
            given.contents,
            timing.threads,
            timing.time_limit_s,
        ) as runner:
            session, before = _flat(runner.session), self.row
            told = runner.runtime
            load_ms: float | None = runner.load_ms
            if not self._device.times:
                told, load_ms = f"{told}, emulated: how long it takes says nothing", None
            self.row = replace(self.row, about=runner.about, runtime=told, session=session, load_ms=load_ms)
            _check_same(before, self.row)
            if _version(runner.runtime) == _version(self._file.row.runtime):
                self.row = replace(self.row, fallback_share=self._file.row.fallback_share)
            self._part("load", lambda: None)
            artifact = replace(given, runner=runner, load_ms=runner.load_ms)
            if self._device.times:
                self._measure_speed(artifact, runner)
            if "accuracy" in self._settings.on_devices.measure:
                self._validate(artifact)

    def _measure_speed(self, artifact: Artifact, runner: RemoteRunner) -> None:
        """Time calls, and count the energy that they take, as far as that is asked for."""
        settings = self._settings.on_devices
        sample = artifact.ready(sort_keywords(self._file.reference.call).tensors)

        def cooled(measure: Callable[[], None]) -> Callable[[], None]:
            def measured() -> None:
                self._cool(lambda: runner.state().temperature_c)
                measure()
                self.row = replace(self.row, peak_memory_bytes=runner.peak_memory_bytes())

            return measured

        def latency() -> None:
            self._time(sample, runner)
            self._time_apart(artifact, runner)

        if "latency" in settings.measure:
            self._part("latency", cooled(latency))
        if "energy" in settings.measure:
            self._part("energy", cooled(lambda: self._count_energy(sample, runner)))
        if (sustained := settings.sustained) is not None:
            self._part("sustained", cooled(lambda: self._sustain(sample, runner, sustained.minutes * 60)))

    def _cool(self, temperature_c: Callable[[], float | None]) -> None:
        """Wait until the device is as cool as is asked for.

        Raises:
            RunnerError: If it does not tell, or it takes too long.
        """
        cool = self._settings.on_devices.cool
        if cool is None:
            return
        until = time.monotonic() + cool.minutes * 60
        while True:
            found = temperature_c()
            if found is None:
                raise RunnerError(f"{self.row.device} does not tell how warm it is. Leave cool out")
            if found <= cool.below_c:
                return
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise RunnerError(
                    f"{self.row.device} is at {found:.1f} °C after {cool.minutes:g} minutes of waiting for "
                    f"{cool.below_c:g} °C. Cool it, or give a higher cool.below_c"
                )
            time.sleep(min(left_s, _COOL_STEP_S))

    def _count_energy(self, sample: list[Tensor], runner: RemoteRunner) -> None:
        seconds = self._settings.on_devices.energy_seconds
        idle = self._spent(runner, seconds)
        if idle.joules is None:
            self.row = replace(self.row, energy_note=f"not measured: {idle.source}")
            return
        energy_mj, note = energy_of(idle, self._spent(runner, seconds, sample))
        self.row = replace(self.row, energy_mj=energy_mj, energy_note=note)

    def _spent(self, runner: RemoteRunner, seconds: float, sample: list[Tensor] | None = None) -> Spent:
        """Have the device make calls or wait, with a counter that is read here where there is one."""
        before, start = self._device.energy(), time.monotonic()
        if before is not None and before.joules is None:
            return Spent(0, 0.0, None, before.source)
        found = runner.spent(seconds, sample)
        if before is None or before.joules is None:
            return found
        took, after = time.monotonic() - start, self._device.energy()
        if after is None or after.joules is None:
            return replace(found, joules=None, source=before.source if after is None else after.source)
        return Spent(found.calls, took, after.joules - before.joules, before.source)

    def _time(self, sample: list[Tensor], runner: RemoteRunner) -> None:
        """Time the first call and warm ones, in stretches, so that some are here if the device is lost."""
        timing = self._settings.timing
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
                jitter_ms=latency.jitter_ms,
                throughput=latency.throughput,
                repeats=len(warm),
            )

    def _time_apart(self, artifact: Artifact, runner: RemoteRunner) -> None:
        """Time what a sample takes beside the runtime's own time."""
        tensors = sort_keywords(self._file.reference.call).tensors
        found: list[tuple[float, float, float]] = []
        for _ in range(min(_APART_CALLS, self._settings.timing.repeats)):
            start = time.perf_counter()
            ready = artifact.ready(tensors)
            arranged_ms = (time.perf_counter() - start) * 1000
            apart = runner.apart(ready)
            found.append((arranged_ms + apart.quantize_ms, apart.transfer_ms, apart.dequantize_ms))
        before, way, after = (median(times) for times in zip(*found, strict=True))
        self.row = replace(self.row, preprocess_ms=before, transfer_ms=way, postprocess_ms=after)

    def _sustain(self, sample: list[Tensor], runner: RemoteRunner, seconds: float) -> None:
        """Make calls without a pause; the row has every stretch as soon as it is over."""
        points: list[Point] = []
        start = time.monotonic()
        while (left := start + seconds - time.monotonic()) > 0:
            found = runner.times(sample, MAX_CALLS, min(left, seconds / _STRETCHES), keep=_KEPT_TIMES)
            latency = latency_of(found.ns)
            at_s = time.monotonic() - start
            points.append(Point(at_s, found.calls, latency.p50_ms, latency.p95_ms, found.after))
            self.row = replace(self.row, sustained=Endurance.of(points))

    def _validate(self, artifact: Artifact | None = None) -> None:
        """Validate the file there in its network's place, and say so where it computes something else.

        Args:
            artifact: The file there; ``None`` where all that it gives is known.
        """
        network, reference = self._file.network, self._file.reference
        comparison, sees = reference.comparison(network), self._file.artifact.sees
        validation = limited(self._validation, reference, self._settings.on_devices.limit_samples)
        answers = self._progress.answers(artifact)
        try:
            metrics = validation.run(reference.answers(answers, comparison, sees))
            answers.end()
        except EdgeError:
            with suppress(ValueError):  # not one sample came back
                self._fill_agreement(comparison)
            raise
        beside = self._file.beside
        self.row = replace(
            self.row,
            metrics=metrics,
            change_to_host=_changes(metrics, beside.here),
            change_to_float=_changes(metrics, beside.floats),
        )
        self._fill_agreement(comparison)
        if artifact is not None:
            self.row = replace(self.row, peak_memory_bytes=artifact.runner.peak_memory_bytes())
        self._part("accuracy", lambda: None)
        judgement = judge(
            comparison.result(),
            network.precision,
            self._file.tolerance,
            names=network.output_names(),
            rounding=lambda: reference.rounding(network, validation.run, sees),
        )
        self.row = replace(self.row, verdict=judgement.grade, verdict_reason="; ".join(judgement.reasons) or None)
        if judgement.grade == "broken" and self._file.row.verdict != "broken":
            raise AgreementError(
                f"{self.row.device}: {self.row.path} computes something else there than the network it came from, "
                f"and not here: {'; '.join(judgement.reasons)} (over {counted(self.row.samples or 0, 'sample')}). "
                "Try another version of the runtime on the device"
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


def energy_of(idle: Spent, busy: Spent) -> tuple[float | None, str]:
    """Give the millijoules of a call, less what the device takes when it waits, and how that was found.

    Args:
        idle: What it took while it waited.
        busy: What it took while it made calls.
    """
    if idle.joules is None or busy.joules is None or not busy.calls or idle.seconds <= 0:
        return None, f"not measured: {busy.source if idle.joules is not None else idle.source}"
    idle_w = idle.joules / idle.seconds
    more = busy.joules - idle_w * busy.seconds
    told = f"{busy.joules:.4g} J in {busy.seconds:.1f} s of {busy.calls:,} calls, {idle_w:.3g} W while it waited"
    if idle_w < 0 or more <= 0:
        return None, f"not measured: {busy.source} told {told}. Give a larger energy_seconds"
    return more / busy.calls * 1000, f"{busy.source}: {told}"


def _changes(metrics: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    return {name: value - others[name] for name, value in metrics.items() if name in others}


def _check_same(before: DeviceRow, now: DeviceRow) -> None:
    """Refuse to go on with what another device, or another runtime, has measured.

    Raises:
        EdgeError: Naming both.
    """
    if before.runtime is None:
        return
    then, found = (f"{row.runtime} on {row.about and (row.about.model or row.about.machine)}" for row in (before, now))
    if then != found or before.session != now.session:
        raise EdgeError(
            f"{now.device} is not what it was when the run broke off: {found}, and before {then}. Leave resume out to "
            "measure anew"
        )


def _version(runtime: str | None) -> str | None:
    """Name and version of a runtime, without its delegate and threads."""
    return None if runtime is None else runtime.partition(",")[0]


def _flat(session: Mapping[str, Any]) -> dict[str, str]:
    """Settings of a session by name, whatever group they are in."""
    found: dict[str, str] = {}
    for name, value in session.items():
        found.update(_flat(value) if isinstance(value, Mapping) else {name: str(value)})
    return found
