"""Numbers: how far outputs may lie apart, how long a call takes, how much a module holds. Knows torch only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lightning_edge.contents import Precision
from lightning_edge.errors import EdgeError
from lightning_edge.wording import counted

# Steps come from outputs in float32, and three of them come to 3.000001.
_ROUNDING_STEPS = 1e-3
# What an int8 file may lie off by where the network itself is not as far from itself, with what a verdict calls it; and
# how much further than that: the same values are not tipped in both.
_STEPS = {
    "max_steps": ("largest difference", math.inf),
    "most_steps": ("difference of all but 0.1 % of the values", 3.0),
    "worst_mean_steps": ("mean difference at the worst position", 3.0),
    "mean_steps": ("mean difference", 0.6),
}
_OVER_OWN = 1.5
# How long calls are made in a row before one counts.
_WARM_AFTER_NS = 1_000_000
# Of the times of all calls so many are kept: the shortest, the longest, and between them in steps of 5 %.
_QUANTILES = 21


@dataclass(frozen=True)
class Tolerance:
    """How far an exported file may lie from the network it came from and be close; for int8, in every output.

    A runtime rounds some values to the neighboring step, and later layers amplify that. No default gets stricter with
    the number of samples. The largest difference of all does, so that it has no limit unless you set one.

    Attributes:
        max_steps: int8: largest difference of any output value, in quantization steps of that output; any if ``None``.
        mean_steps: int8: mean difference, in quantization steps. ``None`` for 0.6, or for 1.5 times what the network's
            own rounding moves the output by on average on the same samples, if that is more: how far it lies in
            float32, as it was trained, from itself in float64.
        top1: Smallest share of samples whose largest output is the same class; ``None`` if the outputs are no classes.
        max_relative: fp32: largest difference over the largest absolute output.
        most_steps: int8: difference that 99.9 % of an output's values stay within; in a small set, all but as many as
            could be beyond it by chance (three standard deviations): none of 90 values, 3 of 640. ``None`` for 3, or
            for 1.5 times what the network's own rounding moves as many values by, if that is more.
        worst_mean_steps: int8: mean difference over the samples, at the position of an output where it is largest: one
            class of a thousand, one pixel. ``None`` as for ``most_steps``.

    Raises:
        ValueError: If a value is negative or not a number, or ``top1`` is above 1.
    """

    max_steps: float | None = None
    mean_steps: float | None = None
    top1: float | None = 0.98
    max_relative: float = 1e-3
    most_steps: float | None = None
    worst_mean_steps: float | None = None

    def __post_init__(self) -> None:
        for name in (*_STEPS, "max_relative"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"Tolerance({name}={value!r}) is not allowed; give a number of 0 or more")
        if self.top1 is not None and not 0 <= self.top1 <= 1:
            raise ValueError(f"Tolerance(top1={self.top1!r}) is not allowed; give a share from 0 to 1, or None")

    def violations(
        self, agreement: Agreement, precision: Precision, names: Sequence[str] = (), rounding: Agreement | None = None
    ) -> list[str]:
        """Say in one line each what lies outside this tolerance; an empty list if nothing does.

        Args:
            agreement: What was found.
            precision: Precision of the network.
            names: Names of the outputs; their positions where there are none.
            rounding: What the network's own rounding moves its outputs by, where it was looked at.
        """
        found = []
        for position, output in enumerate(agreement.outputs):
            name = names[position] if position < len(names) else str(position)
            at = f"output {name!r}: " if len(agreement.outputs) > 1 else ""
            own = None if rounding is None else rounding.outputs[position]
            found += [f"{at}{line}" for line in self._of_output(output, precision, own)]
        if self.top1 is not None and agreement.top1 is not None and not agreement.top1 >= self.top1:
            found.append(
                f"same top class for {agreement.top1:.2%} of {counted(agreement.samples or 0, 'sample')}, allowed "
                f"from {self.top1:.2%} (top1=None if the outputs are not class scores)"
            )
        return found

    def steps(self, name: str, own: OutputAgreement | None = None) -> float:
        """Give a limit in steps: the user's, or ours, wider where the network's own rounding moves an output further.

        Args:
            name: Which: ``"max_steps"``, ``"most_steps"``, ``"worst_mean_steps"`` or ``"mean_steps"``.
            own: What the network's own rounding moves the output by, where it was looked at.
        """
        given: float | None = getattr(self, name)
        if given is not None:
            return given
        rounded = None if own is None else getattr(own, name)
        least = _STEPS[name][1]
        return least if rounded is None else max(least, _OVER_OWN * rounded)

    def _of_output(self, output: OutputAgreement, precision: Precision, own: OutputAgreement | None) -> list[str]:
        found = []
        if precision == "int8":
            for name, (said, _) in _STEPS.items():
                value, limit = getattr(output, name), self.steps(name, own)
                if value is not None and not value <= limit + _ROUNDING_STEPS:
                    found.append(f"{said} {value:.4g} quantization steps, allowed {limit:.4g}{_own_words(name, own)}")
        if (precision == "fp32" or output.max_steps is None) and not output.max_relative <= self.max_relative:
            found.append(
                f"largest difference {output.max_relative:.3g} of the largest output, allowed {self.max_relative:g}"
            )
        return found


def _own_words(name: str, own: OutputAgreement | None) -> str:
    value = None if own is None else getattr(own, name)
    return "" if value is None else f" (the network's own rounding in float32: {value:.3g})"


@dataclass(frozen=True)
class OutputAgreement:
    """How far one output of two networks lay apart over a set of samples.

    Attributes:
        max_abs: Largest absolute difference.
        max_relative: That over the largest absolute reference value.
        max_steps: Largest difference in quantization steps of the output, ``None`` for float networks.
        mean_steps: Mean difference in quantization steps, ``None`` for float networks.
        most_steps: Difference that the bulk of the values stays within, see `Tolerance`; ``None`` for float networks.
        worst_mean_steps: Mean difference over the samples where it is largest, see `Tolerance`; ``None`` for float
            networks, and where outputs have a free size or more than a million values a sample.
        snr_db: Signal to noise, decibels: the variance of the reference over the mean squared difference. ``None``
            where the reference has no variance.
        not_finite: Whether a value was not finite where the reference was, or otherwise than it.
    """

    max_abs: float = 0.0
    max_relative: float = 0.0
    max_steps: float | None = None
    mean_steps: float | None = None
    most_steps: float | None = None
    worst_mean_steps: float | None = None
    snr_db: float | None = None
    not_finite: bool = False


@dataclass(frozen=True)
class Agreement:
    """How far two networks' outputs lay apart over a set of samples.

    Attributes:
        samples: Number of samples compared.
        top1: Share of samples with the same largest output; ``None`` if no output is a row of class scores.
        outputs: Each output, in the order in which they are flattened.
    """

    samples: int
    top1: float | None
    outputs: tuple[OutputAgreement, ...] = ()

    @property
    def max_relative(self) -> float:
        """That of the output that lies furthest off."""
        return max((output.max_relative for output in self.outputs), default=0.0)

    @property
    def max_steps(self) -> float | None:
        """That of the output that lies furthest off."""
        return self._furthest([output.max_steps for output in self.outputs])

    @property
    def mean_steps(self) -> float | None:
        """That of the output that lies furthest off."""
        return self._furthest([output.mean_steps for output in self.outputs])

    @property
    def most_steps(self) -> float | None:
        """That of the output that lies furthest off."""
        return self._furthest([output.most_steps for output in self.outputs])

    @staticmethod
    def _furthest(values: Sequence[float | None]) -> float | None:
        return max((value for value in values if value is not None), default=None)


@dataclass(frozen=True)
class Timing:
    """How latency is measured.

    Attributes:
        warmup: Calls before timing.
        repeats: Calls timed.
        threads: Threads of torch and of every runtime.
        time_limit_s: Seconds that a runtime may take to load a file or to run one sample, before it counts as hung.

    Raises:
        ValueError: If ``warmup`` is negative, ``repeats`` or ``threads`` below 1, or the limit not above 0.
    """

    warmup: int = 10
    repeats: int = 100
    threads: int = 1
    time_limit_s: float = 60.0

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("repeats", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Timing({name}={getattr(self, name)!r}) is not allowed; give {least} or more")
        if not self.time_limit_s > 0:
            raise ValueError(f"Timing(time_limit_s={self.time_limit_s!r}) is not allowed; give more than 0 seconds")


@dataclass(frozen=True)
class Latency:
    """How long one call takes.

    Attributes:
        p50_ms: Median wall time, milliseconds.
        p95_ms: 95th percentile, milliseconds.
        p99_ms: 99th percentile, milliseconds.
        jitter_ms: Standard deviation, milliseconds.
        throughput: Calls per second, one after the other, at the median.
        warmup: Calls made before timing.
        repeats: Calls timed.
        quantiles_ms: Quantiles from 0 (the shortest call) to 1 (the longest) in steps of 0.05, milliseconds.
    """

    p50_ms: float
    p95_ms: float
    p99_ms: float
    jitter_ms: float
    throughput: float
    warmup: int
    repeats: int
    quantiles_ms: tuple[float, ...] = ()


def stopwatch(run: Callable[[], object]) -> Callable[[], int]:
    """Give a function that calls ``run`` and tells how many nanoseconds that took.

    Calls of less than a millisecond are made in a row until one has passed, and the last is told: whatever had its turn
    before has taken the caches. It is in rows that runtimes' own benchmarks call, too.
    """

    def timed() -> int:
        first = start = time.perf_counter_ns()
        run()
        end = time.perf_counter_ns()
        while end - first < _WARM_AFTER_NS:
            start = time.perf_counter_ns()
            run()
            end = time.perf_counter_ns()
        return end - start

    return timed


def latency(run: Callable[[], object], warmup: int = 10, repeats: int = 100) -> Latency:
    """Time single calls of ``run``.

    Raises:
        ValueError: If ``warmup`` is negative or ``repeats`` is below 1.
    """
    return interleaved_latency({"": stopwatch(run)}, warmup, repeats)[""]


def interleaved_latency(
    runs: Mapping[str, Callable[[], int]],
    warmup: int = 10,
    repeats: int = 100,
    failures: dict[str, EdgeError] | None = None,
) -> dict[str, Latency]:
    """Time single calls of several candidates in turn, so that a noisy machine slows all of them alike.

    Args:
        runs: Each makes one call of a candidate and tells how many nanoseconds it took, as `stopwatch` does.
        warmup: Calls of each before timing.
        repeats: Calls of each that count.
        failures: Takes the error of a candidate that fails, which then has no more turns and no latency.

    Raises:
        EdgeError: If a candidate fails and ``failures`` is not given.
        ValueError: If ``warmup`` is negative or ``repeats`` is below 1.
    """
    if warmup < 0 or repeats < 1:
        raise ValueError(f"warmup={warmup!r}, repeats={repeats!r}: give a warmup of 0 or more and at least 1 repeat")
    times_ns: dict[str, list[int]] = {name: [] for name in runs}
    # All calls in the order they are made: each candidate's warm-up, then rounds.
    for name in [*(name for name in runs for _ in range(warmup)), *list(runs) * repeats]:
        if name in times_ns:
            try:
                times_ns[name].append(runs[name]())
            except EdgeError as error:
                if failures is None:
                    raise
                failures[name] = error
                del times_ns[name]
    return {name: latency_of(times[warmup:], warmup) for name, times in times_ns.items()}


def latency_of(times_ns: Sequence[int], warmup: int = 0) -> Latency:
    """Sum up the times of single calls.

    Args:
        times_ns: Nanoseconds that each call took, at least one.
        warmup: Calls that were made before.
    """
    milliseconds = torch.tensor(times_ns, dtype=torch.float64) / 1e6
    p50, p95, p99 = torch.quantile(milliseconds, torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64)).tolist()
    quantiles = torch.quantile(milliseconds, torch.linspace(0, 1, _QUANTILES, dtype=torch.float64)).tolist()
    jitter = float(milliseconds.std(correction=0))
    return Latency(p50, p95, p99, jitter, 1000 / max(p50, 1e-9), warmup, len(times_ns), tuple(quantiles))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Within this context, torch computes with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parameter_count(module: nn.Module) -> int:
    """Count the elements of all parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def module_bytes(module: nn.Module) -> int:
    """Sum the bytes of all parameters and buffers as stored in memory; a shared one counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {*module.parameters(), *module.buffers()})
