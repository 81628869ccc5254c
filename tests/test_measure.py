"""Agreement, latency and sizes: each number against one worked out by hand."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edge.comparison import Comparison
from lightning_edge.errors import AgreementError, EdgeError, RunnerError
from lightning_edge.measure import (
    Agreement,
    OutputAgreement,
    Timing,
    Tolerance,
    interleaved_latency,
    latency,
    module_bytes,
    parameter_count,
    stopwatch,
)


def agreement_of(reference: Tensor, candidate: Tensor, *scales: float | None) -> Agreement:
    comparison = Comparison(scales)
    comparison.update([reference], [candidate])
    return comparison.result()


def agreed(top1: float | None = 1.0, **output: float) -> Agreement:
    return Agreement(9, top1, (OutputAgreement(**output),))


def test_difference_is_counted_in_steps_of_the_output() -> None:
    found = agreement_of(torch.tensor([[0.0, 2.0], [4.0, 1.0]]), torch.tensor([[0.5, 2.0], [3.0, 1.0]]), 0.5)
    (output,) = found.outputs
    assert (found.samples, found.top1) == (2, 1.0)
    assert output == OutputAgreement(
        max_abs=1.0,
        max_relative=0.25,
        max_steps=2.0,
        mean_steps=0.75,
        most_steps=2.0,
        worst_mean_steps=1.5,  # the first position: 1 step and 2
        snr_db=pytest.approx(10 * math.log10(2.1875 / 0.3125)),  # type: ignore[arg-type]
    )


def test_worst_position_is_that_of_the_largest_mean_over_samples_however_they_are_batched() -> None:
    comparison = Comparison([1.0])
    for _ in range(10):
        comparison.update([torch.zeros(3, 4)], [torch.tensor([[0.0, 0.0, 0.0, 2.0]] * 3)])
    comparison.update([torch.zeros(10, 4)], [torch.cat([torch.full((1, 4), 8.0), torch.zeros(9, 4)])])
    (output,) = comparison.result().outputs
    assert output.worst_mean_steps == pytest.approx((30 * 2 + 8) / 40)


def test_positions_are_not_compared_where_outputs_have_a_free_size() -> None:
    comparison = Comparison([1.0])
    for size in (4, 5):
        comparison.update([torch.zeros(1, size)], [torch.zeros(1, size)])
    assert comparison.result().outputs[0].worst_mean_steps is None


def test_signal_to_noise_does_not_depend_on_batches_and_is_of_what_varies() -> None:
    values = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).double() + 100.0
    comparison = Comparison()
    for part in values.split(7):
        comparison.update([part], [part + 0.1])
    (output,) = comparison.result().outputs
    assert output.snr_db == pytest.approx(10 * math.log10(float(values.var(correction=0)) / 0.01))
    assert agreement_of(torch.zeros(1, 2), torch.ones(1, 2)).outputs[0].snr_db is None
    assert agreement_of(torch.eye(2), torch.eye(2)).outputs[0].snr_db == math.inf


def test_batches_of_different_size_count_by_sample() -> None:
    comparison = Comparison()
    comparison.update([torch.tensor([[1.0, 0.0]] * 3)], [torch.tensor([[1.0, 0.0]] * 3)])
    comparison.update([torch.tensor([[1.0, 0.0]])], [torch.tensor([[0.0, 1.0]])])
    found = comparison.result()
    assert (found.samples, found.top1, found.max_steps, found.mean_steps) == (4, 0.75, None, None)


def test_each_output_has_its_own_step_and_range() -> None:
    comparison = Comparison([0.1, 10.0])
    comparison.update(
        [torch.zeros(1, 2, 2), torch.tensor([[100.0, 0.0]])], [torch.zeros(1, 2, 2), torch.tensor([[110.0, 0.0]])]
    )
    found = comparison.result()
    assert found.max_steps == pytest.approx(1.0)
    assert found.max_relative == pytest.approx(0.1)


def test_unquantized_output_of_an_int8_network_is_counted_in_parts_of_its_range() -> None:
    found = agreement_of(torch.tensor([[127.5, 0.0]]), torch.tensor([[124.5, 0.0]]), None)
    assert found.max_steps == pytest.approx(3.0)


def test_class_that_shares_the_largest_score_counts_as_the_same() -> None:
    assert agreement_of(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])).top1 == 1.0
    assert agreement_of(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])).top1 == 0.0


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2, 2)])
def test_outputs_that_are_no_class_scores_have_no_top1(shape: tuple[int, ...]) -> None:
    assert agreement_of(torch.rand(shape), torch.rand(shape)).top1 is None


def test_top1_can_be_left_out() -> None:
    comparison = Comparison((), class_scores=False)
    comparison.update([torch.rand(2, 3)], [torch.rand(2, 3)])
    assert comparison.result().top1 is None


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_a_violation_and_no_agreement(broken: float) -> None:
    found = agreement_of(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, broken]]), 1.0)
    assert (found.max_steps, found.max_relative, found.top1) == (math.inf, math.inf, 0.0)
    assert len(Tolerance().violations(found, "int8")) == 4
    assert len(Tolerance().violations(found, "fp32")) == 2


def test_equal_infinities_agree() -> None:
    masked = torch.tensor([[1.0, -math.inf]])
    assert agreement_of(masked, masked.clone()).max_relative == 0.0


def test_all_zero_reference_agrees_with_zeros_only() -> None:
    assert agreement_of(torch.zeros(1, 2), torch.zeros(1, 2)).max_relative == 0.0
    assert agreement_of(torch.zeros(1, 2), torch.full((1, 2), 1e-6)).max_relative == math.inf


def test_other_shape_or_number_of_outputs_is_an_error() -> None:
    with pytest.raises(AgreementError, match=r"\(2, 4\).*\(2, 3\).*converter made something else"):
        agreement_of(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(AgreementError, match=r"shapes .* one sample at a time"):
        Comparison().update([torch.zeros(1)], [])
    with pytest.raises(AgreementError, match="2 output scales for 1 outputs"):
        agreement_of(torch.zeros(2, 3), torch.zeros(2, 3), 0.1, 0.1)


def test_nothing_compared_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was compared"):
        Comparison().result()


def test_agreement_at_the_limits_is_no_violation() -> None:
    limit = agreed(0.98, max_steps=3.0000007, mean_steps=0.6, most_steps=3.0000007, max_relative=1e-3)
    assert Tolerance().violations(limit, "int8") == []
    assert Tolerance().violations(limit, "fp32") == []


@pytest.mark.parametrize(
    ("precision", "found", "says"),
    [
        ("int8", agreed(max_steps=3.5, mean_steps=0.1, most_steps=3.5), "3.5 quantization steps, allowed 3"),
        ("int8", agreed(mean_steps=0.1, worst_mean_steps=3.5, max_steps=9.0), "at the worst position 3.5 quant"),
        ("int8", agreed(max_steps=3.0, mean_steps=0.7, most_steps=2.0), "mean difference 0.7"),
        (
            "int8",
            agreed(0.5, max_steps=3.0, mean_steps=0.1, most_steps=2.0),
            "50.00% of 9 samples, allowed from 98.00%",
        ),
        ("int8", agreed(None, max_relative=0.1), "0.1 of the largest output"),
        ("fp32", agreed(max_relative=0.002), "0.002 of the largest output, allowed 0.001"),
    ],
)
def test_each_limit_is_held(precision: str, found: Agreement, says: str) -> None:
    violations = Tolerance().violations(found, precision)  # type: ignore[arg-type]
    assert len(violations) == 1
    assert says in violations[0]


def test_no_default_gets_stricter_with_the_number_of_samples() -> None:
    one_value_far_off = agreed(max_steps=50.0, mean_steps=0.1, most_steps=1.0, worst_mean_steps=0.5)
    assert Tolerance().violations(one_value_far_off, "int8") == []
    (line,) = Tolerance(max_steps=5.0).violations(one_value_far_off, "int8")
    assert "largest difference 50 quantization steps, allowed 5" in line


def test_the_own_rounding_of_an_output_widens_its_limits() -> None:
    def two(*most: float, worst: float = 2.0, mean: float = 0.1) -> Agreement:
        outputs = [OutputAgreement(max_steps=9.0, mean_steps=mean, most_steps=m, worst_mean_steps=worst) for m in most]
        return Agreement(9, 1.0, tuple(outputs))

    found = two(6.0, 2.0)
    told = "output '0': difference of all but 0.1 % of the values 6 quantization steps, allowed 3"
    assert Tolerance().violations(found, "int8") == [told]
    assert Tolerance().violations(found, "int8", rounding=two(4.0, 0.0)) == []  # 1.5 times as far
    # Of another output it says nothing, and of what lies further off not enough.
    assert Tolerance().violations(found, "int8", rounding=two(1.0, 9.0)) == [
        f"{told} (the network's own rounding in float32: 1)"
    ]
    assert "6 quantization steps, allowed 4.5" in Tolerance().violations(found, "int8", (), two(3.0, 0.0))[0]
    # The worst position is held to the worst position, and the mean to the mean.
    worst = two(2.0, worst=7.0)
    (line,) = Tolerance().violations(worst, "int8", (), two(8.0, worst=1.0))
    assert "worst position 7 quantization steps, allowed 3" in line
    assert Tolerance().violations(worst, "int8", (), two(2.0, worst=6.0)) == []
    far = two(2.0, mean=2.3)
    assert Tolerance().violations(far, "int8", (), two(2.0, mean=1.6)) == []
    (line,) = Tolerance().violations(far, "int8", (), two(2.0, mean=1.15))
    assert line.endswith(
        "mean difference 2.3 quantization steps, allowed 1.725 (the network's own rounding in float32: 1.15)"
    )
    (line,) = Tolerance().violations(far, "int8", (), two(9.0, worst=9.0, mean=0.2))
    assert line.endswith("allowed 0.6 (the network's own rounding in float32: 0.2)")
    (line,) = Tolerance().violations(far, "int8")
    assert line.endswith("allowed 0.6")
    # A limit that the user states holds.
    assert len(Tolerance(most_steps=4.0).violations(found, "int8", rounding=two(5.0, 0.0))) == 1
    assert len(Tolerance(mean_steps=0.6).violations(far, "int8", rounding=two(2.0, mean=1.6))) == 1
    assert len(Tolerance(worst_mean_steps=4.0).violations(worst, "int8", rounding=two(2.0, worst=6.0))) == 1


def test_the_output_that_is_off_is_named() -> None:
    # Over both outputs the mean would be 0.5: a large output that is right hid a small one that is not.
    comparison = Comparison([0.5, 10.0])
    comparison.update([torch.zeros(1, 700), torch.zeros(1, 70)], [torch.zeros(1, 700), torch.full((1, 70), 50.0)])
    found = comparison.result()
    assert [output.mean_steps for output in found.outputs] == [0.0, 5.0]
    assert (found.max_steps, found.mean_steps, found.most_steps) == (5.0, 5.0, 5.0)
    violations = Tolerance().violations(found, "int8", ["scores", "boxes"])
    assert len(violations) == 3
    assert all(violation.startswith("output 'boxes': ") for violation in violations)
    assert Tolerance().violations(found, "int8")[0].startswith("output '1': ")


@pytest.mark.parametrize(
    ("values", "far", "most"),
    [(90, 0, 0.0), (90, 1, 5.0), (640, 3, 0.0), (640, 4, 5.0), (100_000, 130, 0.0), (100_000, 131, 5.0)],
)
def test_few_values_may_lie_further_off_and_more_only_of_many(values: int, far: int, most: float) -> None:
    comparison = Comparison([0.1])
    reference, candidate = torch.zeros(values, 1), torch.zeros(values, 1)
    candidate[:far] = 0.5
    for part, other in zip(reference.split(70), candidate.split(70), strict=True):  # however they are batched
        comparison.update([part], [other])
    (output,) = comparison.result().outputs
    assert output.most_steps == pytest.approx(most)
    assert output.max_steps == pytest.approx(5.0 if far else 0.0)


def test_relative_difference_is_not_held_against_int8_and_top1_can_be_switched_off() -> None:
    found = agreed(0.1, max_steps=2.0, mean_steps=0.5, most_steps=2.0, max_relative=0.5)
    assert Tolerance(top1=None).violations(found, "int8") == []


@pytest.mark.parametrize(
    "values", [{"max_steps": -1}, {"mean_steps": math.nan}, {"most_steps": -1}, {"max_relative": -0.1}, {"top1": 1.1}]
)
def test_tolerance_refuses_what_is_no_limit(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Tolerance(**values)


@pytest.mark.parametrize("values", [{"warmup": -1}, {"repeats": 0}, {"threads": 0}, {"time_limit_s": 0}])
def test_timing_refuses_what_cannot_be_timed(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Timing(**values)


@pytest.mark.parametrize(
    ("durations_us", "calls", "told_us"),
    [([1500, 9], 1, 1500), ([900, 200, 9], 2, 200), ([400, 300, 299, 250, 9], 4, 250), ([1000, 9], 1, 1000)],
)
def test_short_calls_are_made_in_a_row_and_the_last_counts(
    durations_us: list[int], calls: int, told_us: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, left = [0], list(durations_us)

    def run() -> None:
        now[0] += left.pop(0) * 1000

    monkeypatch.setattr("lightning_edge.measure.time.perf_counter_ns", lambda: now[0])
    assert stopwatch(run)() == told_us * 1000
    assert len(durations_us) - len(left) == calls


def test_candidates_take_turns_after_all_are_warm() -> None:
    calls: list[str] = []

    def run(name: str) -> int:
        calls.append(name)
        return 1

    runs = {name: partial(run, name) for name in "ab"}
    found = interleaved_latency(runs, warmup=2, repeats=3)
    assert calls == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert {name: (one.warmup, one.repeats) for name, one in found.items()} == {"a": (2, 3), "b": (2, 3)}


def test_candidate_that_fails_has_no_more_turns_and_the_others_go_on() -> None:
    left = [1_000_000] * 3

    def failing() -> int:
        if not left:
            raise RunnerError("gone")
        return left.pop()

    failures: dict[str, EdgeError] = {}
    found = interleaved_latency({"a": failing, "b": lambda: 2_000_000}, 1, 5, failures)
    assert {name: (one.p50_ms, one.repeats) for name, one in found.items()} == {"b": (2.0, 5)}
    assert {name: str(error) for name, error in failures.items()} == {"a": "gone"}
    with pytest.raises(RunnerError, match="gone"):
        interleaved_latency({"a": failing}, 0, 1)


def test_percentiles_are_ordered_and_throughput_is_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    durations_ms = [*range(1, 101)]
    ticks = iter([tick for ms in durations_ms for tick in (0, ms * 1_000_000)])
    monkeypatch.setattr("lightning_edge.measure.time.perf_counter_ns", lambda: next(ticks))
    found = latency(lambda: None, warmup=0, repeats=100)
    assert found.jitter_ms == pytest.approx(28.866, abs=1e-3)  # the standard deviation of 1 to 100
    assert [found.p50_ms, found.p95_ms, found.p99_ms] == pytest.approx([50.5, 95.05, 99.01])
    assert all(low < high for low, high in pairwise([found.p50_ms, found.p95_ms, found.p99_ms]))
    assert found.throughput == pytest.approx(100 / 5.050)


def test_latency_needs_a_call() -> None:
    with pytest.raises(ValueError, match="repeats=0"):
        latency(lambda: None, repeats=0)


def test_sizes_count_shared_tensors_once() -> None:
    tied = nn.Linear(3, 2, bias=False)
    module = nn.ModuleList([tied, nn.BatchNorm1d(2)])
    module.append(nn.Linear(3, 2, bias=False))
    module[2].weight = tied.weight
    assert parameter_count(module) == 6 + 4
    assert module_bytes(module) == 4 * (6 + 4 + 4) + 8
