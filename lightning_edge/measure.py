"""Numbers: how far outputs lie apart, how long a call takes, how much a module holds. Knows torch only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_edge.errors import AgreementError, EdgeError
from lightning_edge.network import Precision

# An output that an int8 network leaves unquantized has no step; int8 would spread 255 steps over -max..max.
_STEPS_PER_LARGEST = 127.5


@dataclass(frozen=True)
class Tolerance:
    """How far an exported file may lie from the network it came from.

    The mean is the sharp limit. A runtime rounds some values to the neighboring step, later layers amplify that, and
    the largest difference grows with the number of samples: ResNet-8 over 10,000 images came to 5 steps at a mean of
    0.6, a file with a fault (a dropout left in the graph) to 22 steps at a mean of 10.

    Attributes:
        max_steps: int8: largest difference of any output value, in quantization steps of that output.
        mean_steps: int8: mean difference, in quantization steps.
        top1: Smallest share of samples whose largest output is the same class; ``None`` if the outputs are no classes.
        max_relative: fp32: largest difference over the largest absolute output.

    Raises:
        ValueError: If a value is negative or not a number, or ``top1`` is above 1.
    """

    max_steps: float = 8.0
    mean_steps: float = 1.0
    top1: float | None = 0.98
    max_relative: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("max_steps", "mean_steps", "max_relative"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"Tolerance({name}={value!r}) is not allowed; give a number of 0 or more")
        if self.top1 is not None and not 0 <= self.top1 <= 1:
            raise ValueError(f"Tolerance(top1={self.top1!r}) is not allowed; give a share from 0 to 1, or None")

    def violations(self, agreement: Agreement, precision: Precision) -> list[str]:
        """Say in one line each what lies outside this tolerance; an empty list if nothing does."""
        found = []
        if precision == "int8":
            for name, value, limit in (
                ("largest difference", agreement.max_steps, self.max_steps),
                ("mean difference", agreement.mean_steps, self.mean_steps),
            ):
                if value is not None and not value <= limit:
                    found.append(f"{name} {value:.4g} quantization steps, allowed {limit:g}")
        if (precision == "fp32" or agreement.max_steps is None) and not agreement.max_relative <= self.max_relative:
            found.append(
                f"largest difference {agreement.max_relative:.3g} of the largest output, allowed {self.max_relative:g}"
            )
        if self.top1 is not None and agreement.top1 is not None and not agreement.top1 >= self.top1:
            found.append(
                f"same top class for {agreement.top1:.2%} of {agreement.samples} samples, allowed from {self.top1:.2%}"
                " (top1=None if the outputs are not class scores)"
            )
        return found


@dataclass(frozen=True)
class Agreement:
    """How far two networks' outputs lay apart over a set of samples.

    Attributes:
        samples: Number of samples compared.
        top1: Share of samples with the same largest output; ``None`` if no output is a row of class scores.
        max_steps: Largest difference in quantization steps of the output, ``None`` for float networks.
        mean_steps: Mean difference in quantization steps, ``None`` for float networks.
        max_abs: Largest absolute difference.
        max_relative: Largest absolute difference of an output over its largest absolute reference value.
    """

    samples: int
    top1: float | None
    max_steps: float | None
    mean_steps: float | None
    max_abs: float
    max_relative: float


class Comparison:
    """Collects how far a candidate's outputs lie from a reference's, batch by batch.

    Class scores are the first floating-point output of shape ``(batch, classes)`` with at least two classes. Where the
    reference's largest score is shared by several classes, any of them counts as the same class.

    Args:
        output_scales: Quantization step of each output; ``None`` where an int8 network leaves it unquantized, for
            which a step is the largest absolute reference value over 127.5. Empty for float networks: no steps.
        class_scores: Whether to look for class scores at all.
    """

    def __init__(self, output_scales: Sequence[float | None] = (), class_scores: bool = True) -> None:
        self._scales = list(output_scales)
        self._class_scores = class_scores
        self._outputs: list[_OutputDifference] = []
        self._samples = 0
        self._scored = 0
        self._same_class = 0

    def update(self, reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> None:
        """Add a batch of flattened outputs, each batch first.

        Raises:
            AgreementError: If the number of outputs or a shape differs.
        """
        shapes = [tuple(tensor.shape) for tensor in reference]
        given = [tuple(tensor.shape) for tensor in candidate]
        if shapes != given:
            raise AgreementError(
                f"the outputs have shapes {given}, those of the network it came from {shapes}. A file runs one sample "
                "at a time and its outputs are joined: what the network gives once for a whole batch, such as a mean "
                "over it, cannot be among its outputs"
            )
        if self._scales and len(self._scales) != len(shapes):
            raise AgreementError(f"{len(self._scales)} output scales for {len(shapes)} outputs; give one for each")
        if not self._outputs:
            self._outputs = [_OutputDifference() for _ in shapes]
        pairs = [
            (before.detach().cpu().double(), after.detach().cpu().double())
            for before, after in zip(reference, candidate, strict=True)
        ]
        for output, (before, after) in zip(self._outputs, pairs, strict=True):
            output.update(before, after)
        self._samples += next((shape[0] for shape in shapes if shape), 1)
        if self._class_scores:
            self._update_classes(
                next(
                    (
                        pair
                        for pair, tensor in zip(pairs, reference, strict=True)
                        if tensor.is_floating_point() and tensor.dim() == 2 and tensor.shape[1] > 1
                    ),
                    None,
                )
            )

    def _update_classes(self, scores: tuple[Tensor, Tensor] | None) -> None:
        if scores is None:
            return
        before, after = scores
        chosen = before.gather(1, after.argmax(dim=1, keepdim=True)).squeeze(1)
        same = (chosen == before.amax(dim=1)) & after.isfinite().all(dim=1)
        self._same_class += int(same.sum())
        self._scored += len(before)

    def result(self) -> Agreement:
        """Sum up all batches so far.

        Raises:
            ValueError: If there was none.
        """
        if not self._samples:
            raise ValueError("nothing was compared; call update() with at least one batch")
        max_steps = mean_steps = None
        if self._scales:
            steps = [
                output.largest / _STEPS_PER_LARGEST if scale is None else scale
                for scale, output in zip(self._scales, self._outputs, strict=True)
            ]
            pairs = list(zip(self._outputs, steps, strict=True))
            max_steps = max(_ratio(output.max_abs, step) for output, step in pairs)
            mean_steps = sum(_ratio(output.sum_abs, step) for output, step in pairs) / max(
                1, sum(output.count for output in self._outputs)
            )
        return Agreement(
            samples=self._samples,
            top1=self._same_class / self._scored if self._scored else None,
            max_steps=max_steps,
            mean_steps=mean_steps,
            max_abs=max((output.max_abs for output in self._outputs), default=0.0),
            max_relative=max((_ratio(output.max_abs, output.largest) for output in self._outputs), default=0.0),
        )


class _OutputDifference:
    """Running sums of one output."""

    def __init__(self) -> None:
        self.max_abs = 0.0
        self.sum_abs = 0.0
        self.count = 0
        self.largest = 0.0

    def update(self, before: Tensor, after: Tensor) -> None:
        if not before.numel():
            return
        # Equal infinities agree; anything else that is not a finite difference is infinitely far apart.
        difference = torch.where(before == after, 0.0, (after - before).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.sum_abs += float(difference.sum())
        self.count += difference.numel()
        finite = before[before.isfinite()]
        if finite.numel():
            self.largest = max(self.largest, float(finite.abs().max()))


def _ratio(difference: float, unit: float) -> float:
    if difference == 0:
        return 0.0
    return difference / unit if unit else math.inf


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
        throughput: Calls per second, over the sum of all timed calls.
        warmup: Calls made before timing.
        repeats: Calls timed.
    """

    p50_ms: float
    p95_ms: float
    p99_ms: float
    throughput: float
    warmup: int
    repeats: int


def stopwatch(run: Callable[[], object]) -> Callable[[], int]:
    """Give a function that calls ``run`` and tells how many nanoseconds that took."""

    def timed() -> int:
        start = time.perf_counter_ns()
        run()
        return time.perf_counter_ns() - start

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
    return {name: _latency(times[warmup:], warmup) for name, times in times_ns.items()}


def _latency(times_ns: list[int], warmup: int) -> Latency:
    milliseconds = torch.tensor(times_ns, dtype=torch.float64) / 1e6
    p50, p95, p99 = torch.quantile(milliseconds, torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64)).tolist()
    total = max(float(milliseconds.sum()), 1e-9)
    return Latency(p50, p95, p99, 1000 * len(times_ns) / total, warmup, len(times_ns))


def parameter_count(module: nn.Module) -> int:
    """Count the elements of all parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def module_bytes(module: nn.Module) -> int:
    """Sum the bytes of all parameters and buffers as stored in memory; a shared one counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {*module.parameters(), *module.buffers()})
