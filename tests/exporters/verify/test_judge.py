"""The verdict on a file: what decides, in which order, and what a user allows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_edge.exporters.verify.judge import judge
from lightning_edge.measure import Agreement, OutputAgreement, Tolerance
from lightning_edge.verdict import Grade, Judgement, MetricChange, Strict, check_strict

# How MobileNetV3's .onnx lay from its network: one value of 5,000 lay 5 steps off.
ONE_VALUE = {"max_relative": 0.04, "max_steps": 5.0, "mean_steps": 0.005, "most_steps": 1.0, "worst_mean_steps": 0.01}
FAR = {"max_relative": 0.1, "max_steps": 20.0, "mean_steps": 1.3, "most_steps": 6.0, "worst_mean_steps": 2.0}
NOISY = {**FAR, "mean_steps": 4.0}


def agreed(top1: float | None = 1.0, **output: Any) -> Agreement:
    return Agreement(500, top1, (OutputAgreement(**output),))


def accuracy(network: float, file: float) -> MetricChange:
    return MetricChange("val_acc", network, file, higher_is_better=True)


def loss(network: float, file: float) -> MetricChange:
    return MetricChange("val_loss", network, file, higher_is_better=False)


@pytest.mark.parametrize(
    ("agreement", "change", "grade"),
    [
        (agreed(max_relative=0.0, max_steps=0.0, mean_steps=0.0), None, "exact"),
        (agreed(None, max_relative=0.0, max_steps=0.0, mean_steps=0.0), None, "exact"),
        (agreed(**ONE_VALUE, snr_db=50.0), None, "close"),
        # Its .tflite: other classes for some, and the accuracy within a point.
        (agreed(0.986, **FAR, snr_db=30.0), accuracy(0.90, 0.895), "differs"),
        (agreed(0.95, **FAR, snr_db=30.0), accuracy(0.90, 0.85), "differs"),
        (agreed(0.95, **FAR, snr_db=30.0), accuracy(0.90, 0.70), "broken"),
        # The user's metric decides before the values do, where it is kept.
        (agreed(0.5, **FAR, snr_db=5.0), accuracy(0.90, 0.90), "differs"),
        (agreed(0.5, **NOISY, snr_db=5.0), None, "broken"),
        # An untrained LCNet: its outputs change by two steps from sample to sample.
        (agreed(0.0, **FAR, snr_db=4.0), None, "differs"),
        # Scores that are nearly equal: hardly trained networks.
        (agreed(0.5, **FAR, snr_db=25.0), None, "differs"),
        (agreed(1.0, **NOISY, snr_db=5.0), None, "broken"),
        # The same classes from a layer whose weights are mixed up.
        (agreed(1.0, **{**FAR, "mean_steps": 9.0}, snr_db=19.0), None, "broken"),
        (agreed(1.0, **{**FAR, "mean_steps": 9.0}, snr_db=19.0), accuracy(0.9, 0.9), "differs"),
        (agreed(None, **NOISY, snr_db=5.0), None, "broken"),
        (agreed(None, **FAR, snr_db=15.0), None, "differs"),
        # Losses begin near zero, where a small difference is a large share.
        (agreed(0.97, **FAR, snr_db=30.0), loss(0.010, 0.015), "differs"),
        (agreed(0.97, **FAR, snr_db=30.0), loss(0.010, 0.100), "broken"),
        (agreed(0.0, max_relative=math.inf, max_steps=math.inf, not_finite=True), accuracy(0.9, 0.9), "broken"),
    ],
)
def test_verdict_of_int8(agreement: Agreement, change: MetricChange | None, grade: Grade) -> None:
    found = judge(agreement, "int8", Tolerance(), change=change)
    assert found.grade == grade
    assert bool(found.reasons) == (grade != "exact")
    if change is not None and grade != "close":
        assert str(change) in found.reasons


@pytest.mark.parametrize(
    ("agreement", "grade"),
    [
        (agreed(max_relative=1e-6), "exact"),
        (agreed(max_relative=1e-4), "close"),
        (agreed(0.99, max_relative=0.01, snr_db=40.0), "differs"),
        (agreed(0.1, max_relative=1.0, snr_db=0.0), "broken"),
    ],
)
def test_verdict_of_float(agreement: Agreement, grade: Grade) -> None:
    assert judge(agreement, "fp32", Tolerance()).grade == grade


def test_the_own_rounding_is_looked_at_only_where_it_can_change_the_verdict() -> None:
    asked = []

    def rounding() -> Agreement:
        asked.append(True)
        return agreed(max_steps=20.0, mean_steps=0.4, most_steps=6.0, worst_mean_steps=2.0)

    assert judge(agreed(**ONE_VALUE), "int8", Tolerance(), rounding=rounding).grade == "close"
    far = agreed(mean_steps=2.0, max_steps=3.0)
    assert judge(far, "int8", Tolerance(mean_steps=0.6), rounding=rounding).grade == "differs"
    assert judge(agreed(0.9, mean_steps=0.1, max_steps=3.0), "int8", Tolerance(), rounding=rounding).grade == "differs"
    assert not asked
    found = judge(agreed(**{**FAR, "mean_steps": 0.1}), "int8", Tolerance(), rounding=rounding)
    assert asked
    told = "the network's own rounding in float32 moves it as far (0.4 on average, 20 at most)"
    assert (found.grade, found.reasons[-1]) == ("close", told)


def test_a_verdict_tells_the_own_rounding_of_the_network() -> None:
    def judged(mean: float, own: float) -> Judgement:
        found = agreed(mean_steps=mean, max_steps=9.0, most_steps=2.0, worst_mean_steps=2.5)
        rounding = agreed(mean_steps=own, max_steps=5.0, most_steps=2.0, worst_mean_steps=2.0)
        return judge(found, "int8", Tolerance(), rounding=lambda: rounding)

    assert judged(1.7, 1.15).grade == "close"
    assert str(judged(2.3, 1.15)) == (
        "differs: mean difference 2.3 quantization steps, allowed 1.725 (the network's own rounding in float32: 1.15)"
    )
    assert str(judged(2.3, 0.1)).endswith("allowed 0.6 (the network's own rounding in float32: 0.1)")
    # What is something else is measured by what is close.
    assert [judged(mean, own).grade for mean, own in ((7.0, 0.1), (7.0, 1.15), (18.0, 1.15))] == [
        "broken",
        "differs",
        "broken",
    ]


@pytest.mark.parametrize(("own_db", "grade"), [(7.0, "differs"), (8.6, "broken"), (40.0, "broken")])
def test_noise_that_the_network_makes_itself_is_not_the_file_s(own_db: float, grade: Grade) -> None:
    # An untrained LCNet: in float32, as it would be trained on, its int8 graph gives other classes than its exact form.
    found = agreed(0.5, **NOISY, snr_db=5.0)
    judgement = judge(
        found, "int8", Tolerance(), rounding=lambda: agreed(0.5, **{**FAR, "mean_steps": 0.5}, snr_db=own_db)
    )
    assert judgement.grade == grade
    assert f"signal to noise 5 dB (the network's own rounding in float32: {own_db:g} dB)" in judgement.reasons


def test_metric_that_is_no_number_any_more_is_lost() -> None:
    assert accuracy(0.9, math.nan).lost
    assert not accuracy(math.nan, 0.9).lost
    assert accuracy(0.0, 0.0).kept
    assert accuracy(0.5, 0.9).loss == 0.0


@pytest.mark.parametrize(
    ("strict", "allowed"),
    [
        (True, ["exact", "close", "differs"]),
        (False, ["exact", "close", "differs", "broken"]),
        ("close", ["exact", "close"]),
        ("exact", ["exact"]),
    ],
)
def test_what_is_allowed(strict: Strict, allowed: list[Grade]) -> None:
    grades: list[Grade] = ["exact", "close", "differs", "broken"]
    assert [grade for grade in grades if Judgement(grade).allowed(strict)] == allowed


def test_strict_that_is_no_grade_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strict='very' is not one of True, False, 'exact', 'close'"):
        check_strict("very")  # type: ignore[arg-type]
