"""What was found of a file on a device: a row of the report, and how these rows look. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from lightning_edge.verdict import Grade

# From here on a stretch of calls counts as slower than the fastest one.
SLOWER = 1.2
LEFT_OUT = "-"


@dataclass(frozen=True)
class State:
    """What a device says of itself at one moment; ``None`` where it does not.

    Attributes:
        temperature_c: The hottest of its temperatures, degrees Celsius.
        frequency_mhz: The frequency of its fastest core.
    """

    temperature_c: float | None = None
    frequency_mhz: float | None = None


@dataclass(frozen=True)
class About:
    """What a device says it is; ``None`` where it does not.

    Attributes:
        machine: Its architecture, such as ``aarch64``.
        system: Operating system and version of its kernel.
        model: Name of the board, or of the CPU.
        cores: Cores that the runner may use.
        governor: What sets its frequency: ``performance``, ``ondemand``.
        memory_bytes: Its memory.
        python: Version of its Python.
        features: Of an x86 CPU's features those that decide which kernels a runtime takes.
        missing: Modules that files need and its Python lacks.
        state: Temperature and frequency when it was asked.
    """

    machine: str | None = None
    system: str | None = None
    model: str | None = None
    cores: int | None = None
    governor: str | None = None
    memory_bytes: int | None = None
    python: str | None = None
    features: Sequence[str] = ()
    missing: Sequence[str] = ()
    state: State = field(default_factory=State)

    def __str__(self) -> str:
        """Say it in one line."""
        said = [self.model, self.machine, self.system, self.cores and f"{self.cores} cores"]
        said += [self.governor and f"governor {self.governor}", self.python and f"Python {self.python}"]
        said += [f"{self.state.temperature_c:.0f} °C"] if self.state.temperature_c is not None else []
        said += [f"{self.state.frequency_mhz:.0f} MHz"] if self.state.frequency_mhz is not None else []
        return ", ".join(str(part) for part in said if part) or "it says nothing of itself"


@dataclass(frozen=True)
class Point:
    """A stretch of a long run of calls.

    Attributes:
        at_s: Seconds from the beginning of the run to the end of the stretch.
        calls: Calls made in it.
        p50_ms: Median latency in it, milliseconds.
        p95_ms: 95th percentile.
        state: Temperature and frequency at its end.
    """

    at_s: float
    calls: int
    p50_ms: float
    p95_ms: float
    state: State = field(default_factory=State)


@dataclass(frozen=True)
class Endurance:
    """How a file's latency went over a long run of calls.

    Attributes:
        points: The stretches of the run.
        cold_p50_ms: Median latency of the first stretch, milliseconds.
        warm_p50_ms: Median of the medians of the last fifth.
        slower_after_s: Seconds after which every stretch, to the end of the run, took more than `SLOWER` times as long
            as the fastest one; ``None`` where it did not come to that.
    """

    points: Sequence[Point]
    cold_p50_ms: float
    warm_p50_ms: float
    slower_after_s: float | None

    @classmethod
    def of(cls, points: Sequence[Point]) -> Endurance:
        """Sum up the stretches of a run, at least one."""
        limit = SLOWER * min(point.p50_ms for point in points)
        within = [index for index, point in enumerate(points) if point.p50_ms <= limit]
        kept = within[-1]  # the fastest is within
        slower = points[kept].at_s if kept + 1 < len(points) else None
        last = points[-max(1, len(points) // 5) :]
        return cls(tuple(points), points[0].p50_ms, median(point.p50_ms for point in last), slower)

    def __str__(self) -> str:
        """Say it in one line."""
        last = self.points[-1]
        said = f"p50 {self.cold_p50_ms:.3f} ms at first, {self.warm_p50_ms:.3f} ms at the end of {last.at_s:.0f} s"
        heat = _from_to(self.points[0].state.temperature_c, last.state.temperature_c)
        said += "" if heat == LEFT_OUT else f", {heat} °C"
        if self.slower_after_s is None:
            return f"{said}; it did not slow down for good"
        return f"{said}; from {self.slower_after_s:.0f} s on it took more than {SLOWER:g} times its best"


@dataclass(frozen=True)
class DeviceRow:
    """One file on one device. ``None`` is what was not asked for or could not be known.

    Attributes:
        device: Name of the device.
        target: Target of the file.
        precision: ``"fp32"`` or ``"int8"``.
        source: Where its weights and ranges come from, as in `Row`.
        error: Why nothing more was measured; the other fields hold what was found before that.
        path: The file, relative to the report.
        about: What the device says it is.
        runtime: Runtime on the device, its version and threads.
        session: Settings that the runtime was given, by name.
        metrics: The user's own metrics, of the samples that ran on the device.
        change_to_host: By how much each differs from that of the file on this machine, over the same samples.
        change_to_float: By how much each differs from that of the float network, over the same samples.
        samples: Samples compared with the network the file came from.
        top1: Share of them with the same largest output.
        max_steps: Largest difference in quantization steps.
        mean_steps: Mean difference in quantization steps, of the output that lies furthest off.
        max_relative: Largest difference over the largest absolute output.
        load_ms: Milliseconds from the path to a runtime that is ready, on the device.
        first_ms: Latency of the first call, milliseconds.
        p50_ms: Median latency of one sample after warm-up, milliseconds, measured on the device.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        jitter_ms: Standard deviation of the latency of the calls timed, milliseconds.
        throughput: Samples per second, one at a time.
        repeats: Calls timed.
        preprocess_ms: Making the file's inputs of a sample on this machine (layout, pixels, quantizing), milliseconds,
            median.
        transfer_ms: The way of a sample to the device and of its outputs back, milliseconds, median.
        postprocess_ms: Making real numbers of its outputs on this machine, milliseconds, median.
        fallback_share: Share of the multiply-accumulates outside the runtime's delegate, as it is here; ``None`` where
            another version of the runtime ran the file here, or something else.
        peak_memory_bytes: Peak of the resident memory of the whole process on the device, Python and runtime included.
        before: Temperature and frequency before the calls that were timed.
        after: The same after them.
        energy_mj: Millijoules of an inference by a counter, less what the device takes when it waits.
        energy_note: What told the energy and how, or why it was not measured.
        sustained: How latency went over a long run of calls.
        verdict: What its agreement there comes to, as in `Row`.
        verdict_reason: Why it is that.
    """

    device: str
    target: str
    precision: Literal["fp32", "int8"]
    source: str
    error: str | None = None
    path: str | None = None
    about: About | None = None
    runtime: str | None = None
    session: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    change_to_host: Mapping[str, float] = field(default_factory=dict)
    change_to_float: Mapping[str, float] = field(default_factory=dict)
    samples: int | None = None
    top1: float | None = None
    max_steps: float | None = None
    mean_steps: float | None = None
    max_relative: float | None = None
    load_ms: float | None = None
    first_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    jitter_ms: float | None = None
    throughput: float | None = None
    repeats: int | None = None
    preprocess_ms: float | None = None
    transfer_ms: float | None = None
    postprocess_ms: float | None = None
    fallback_share: float | None = None
    peak_memory_bytes: int | None = None
    before: State = field(default_factory=State)
    after: State = field(default_factory=State)
    energy_mj: float | None = None
    energy_note: str | None = None
    sustained: Endurance | None = None
    verdict: Grade | None = None
    verdict_reason: str | None = None

    @property
    def label(self) -> str:
        """What this row is, in words."""
        return f"{self.device}: {self.target} {self.precision}"

    def flat(self) -> Iterator[tuple[str, float]]:
        """Give every number as ``edge/<device>/<target>/<name>``, those of a float file as ``fp32_<name>``."""
        prefix = "fp32_" if self.precision == "fp32" else ""
        for name, value in self.figures().items():
            yield f"edge/{self.device}/{self.target}/{prefix}{name}", value

    def figures(self) -> dict[str, float]:
        """Give every number that is known, by name."""
        values: dict[str, float | None] = {
            "load_ms": self.load_ms,
            "latency_first_ms": self.first_ms,
            "latency_p50_ms": self.p50_ms,
            "latency_p95_ms": self.p95_ms,
            "latency_p99_ms": self.p99_ms,
            "latency_jitter_ms": self.jitter_ms,
            "throughput": self.throughput,
            "preprocess_ms": self.preprocess_ms,
            "transfer_ms": self.transfer_ms,
            "postprocess_ms": self.postprocess_ms,
            "fallback_share": self.fallback_share,
            "peak_memory_bytes": self.peak_memory_bytes,
            "energy_mj": self.energy_mj,
            "temperature_before_c": self.before.temperature_c,
            "temperature_after_c": self.after.temperature_c,
            "top1_agreement": self.top1,
            "max_steps": self.max_steps,
            "mean_steps": self.mean_steps,
            "max_relative": self.max_relative,
            "sustained_cold_p50_ms": self.sustained.cold_p50_ms if self.sustained else None,
            "sustained_warm_p50_ms": self.sustained.warm_p50_ms if self.sustained else None,
            **self.metrics,
            **{f"{name}_change_to_host": change for name, change in self.change_to_host.items()},
            **{f"{name}_change_to_float": change for name, change in self.change_to_float.items()},
        }
        return {name: float(value) for name, value in values.items() if value is not None}


HEADERS = (
    "Verdict",
    "First ms",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "Jitter ms",
    "Samples/s",
    "Load ms",
    "Peak",
    "°C",
    "MHz",
)
APART_HEADERS = ("Pre ms", "Transfer ms", "Post ms", "Off the delegate")
FIDELITY_HEADERS = ("Samples", "Same top class", "Max steps", "Mean steps", "Max relative")


def cells(row: DeviceRow) -> list[str]:
    """What `HEADERS` names, as text."""
    return [
        row.verdict or LEFT_OUT,
        _number(row.first_ms, 3),
        _number(row.p50_ms, 3),
        _number(row.p95_ms, 3),
        _number(row.p99_ms, 3),
        _number(row.jitter_ms, 3),
        _number(row.throughput, 1),
        _number(row.load_ms, 1),
        LEFT_OUT if row.peak_memory_bytes is None else f"{row.peak_memory_bytes:,}",
        _from_to(row.before.temperature_c, row.after.temperature_c),
        _from_to(row.before.frequency_mhz, row.after.frequency_mhz),
    ]


def apart_cells(row: DeviceRow) -> list[str]:
    """What `APART_HEADERS` names, as text."""
    return [
        _number(row.preprocess_ms, 3),
        _number(row.transfer_ms, 3),
        _number(row.postprocess_ms, 3),
        LEFT_OUT if row.fallback_share is None else f"{row.fallback_share:.2%}",
    ]


def fidelity_cells(row: DeviceRow) -> list[str]:
    """What `FIDELITY_HEADERS` names, as text."""
    return [
        LEFT_OUT if row.samples is None else f"{row.samples:,}",
        LEFT_OUT if row.top1 is None else f"{row.top1:.2%}",
        _number(row.max_steps, 2),
        _number(row.mean_steps, 4),
        LEFT_OUT if row.max_relative is None else f"{row.max_relative:.1e}",
    ]


def metric_names(rows: Sequence[DeviceRow]) -> list[str]:
    """Names of the user's metrics in these rows."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def metric_cells(row: DeviceRow, names: Sequence[str]) -> list[str]:
    """The user's metrics by name, as text."""
    return [_number(row.metrics.get(name), 4) for name in names]


def change_headers(names: Sequence[str]) -> list[str]:
    """What `change_cells` shows of these metrics."""
    return [f"{name} {of}" for name in names for of in ("to host", "to float")]


def change_cells(row: DeviceRow, names: Sequence[str]) -> list[str]:
    """By how much the user's metrics differ from those of the file here and of the float network, as text."""
    changes = [change.get(name) for name in names for change in (row.change_to_host, row.change_to_float)]
    return [LEFT_OUT if change is None else f"{change:+.4f}" for change in changes]


def described(rows: Sequence[DeviceRow]) -> list[str]:
    """Say in one line each what the devices are, and which runtimes ran there."""
    lines = []
    for device in dict.fromkeys(row.device for row in rows):
        own = [row for row in rows if row.device == device]
        about = next((row.about for row in own if row.about is not None), None)
        runtimes = dict.fromkeys(row.runtime for row in own if row.runtime is not None)
        said = "it was not reached" if about is None else str(about)
        lines.append(f"{device}: {'; '.join([said, *runtimes])}")
    for row in rows:
        if row.energy_note is not None:
            energy = "" if row.energy_mj is None else f"{row.energy_mj:.4g} mJ an inference; "
            lines.append(f"{row.label}, energy: {energy}{row.energy_note}")
    return [*lines, *(f"{row.label}, one call after another: {row.sustained}" for row in rows if row.sustained)]


def failures(rows: Sequence[DeviceRow]) -> list[str]:
    """Say in one line each which rows have an error; one that holds for a whole device is said once."""
    reasons: dict[tuple[str, str], list[DeviceRow]] = {}
    for row in rows:
        if row.error is not None:
            reasons.setdefault((row.device, row.error), []).append(row)
    return [
        f"{', '.join(row.label for row in failed)}: {error.removeprefix(f'{device}: ')}"
        for (device, error), failed in reasons.items()
    ]


def _number(value: float | None, digits: int) -> str:
    return LEFT_OUT if value is None else f"{value:.{digits}f}"


def _from_to(before: float | None, after: float | None) -> str:
    if before is None and after is None:
        return LEFT_OUT
    return f"{_number(before, 0)} to {_number(after, 0)}"
