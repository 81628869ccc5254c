"""Limits and verdicts, and what of a row a limit is held against."""

from __future__ import annotations

import math

import pytest
from jsonargparse import ArgumentParser

from lightning_edge.reporting.budget import Budget, Excess
from lightning_edge.reporting.monitor import Monitor
from lightning_edge.reporting.report import Report, Row
from lightning_edge.reporting.rows import judged, over_budget

ACCURACY = Monitor("val_acc", "max")


def file(**values: object) -> Row:
    return Row("tflite", "int8", "trained", **values)  # type: ignore[arg-type]


def test_a_file_within_all_limits() -> None:
    verdict = Budget(size_bytes=100, load_ms=2.5).judge({"size_bytes": 100, "load_ms": 2.0})
    assert (verdict.status, verdict.exceeded, verdict.not_measurable) == ("within", (), ())
    assert str(verdict) == "within"


def test_each_limit_that_is_exceeded_is_named_with_by_how_much() -> None:
    verdict = Budget(size_bytes=1000, latency_p95_ms=2.0, accuracy_drop=0.01).judge(
        {"size_bytes": 2500, "latency_p95_ms": 2.25, "accuracy_drop": 0.005}
    )
    assert verdict.status == "exceeded"
    assert verdict.exceeded == (Excess("size_bytes", 1000, 2500), Excess("latency_p95_ms", 2.0, 2.25))
    assert str(verdict) == "size_bytes 2,500 is 1,500 above 1,000; latency_p95_ms 2.25 is 0.25 above 2"


@pytest.mark.parametrize("value", [None, math.nan])
def test_what_was_not_measured_is_neither_within_nor_exceeded(value: float | None) -> None:
    verdict = Budget(size_bytes=100, load_ms=1.0).judge({"size_bytes": 50, "load_ms": value})
    assert (verdict.status, verdict.not_measurable) == ("not measurable", ("load_ms",))
    assert str(verdict) == "not measurable here: load_ms"
    assert Budget(size_bytes=10, load_ms=1.0).judge({"size_bytes": 50}).status == "exceeded"


def test_a_value_that_is_known_to_be_too_low_can_only_exceed() -> None:
    budget = Budget(peak_memory_bytes=1000)
    assert budget.judge({}, {"peak_memory_bytes": 2000}).status == "exceeded"
    assert budget.judge({}, {"peak_memory_bytes": 500}).status == "not measurable"
    assert budget.judge({"peak_memory_bytes": 900}, {"peak_memory_bytes": 2000}).status == "within"


@pytest.mark.parametrize("limit", [-1, math.nan, math.inf, True, "10"])
def test_a_limit_that_is_none_is_refused(limit: object) -> None:
    with pytest.raises(ValueError, match=r"Budget\(size_bytes=.*\) is not allowed; give a number of 0 or more"):
        Budget(size_bytes=limit)  # type: ignore[arg-type]


def test_a_budget_without_limits_is_refused() -> None:
    with pytest.raises(ValueError, match="limits nothing; give one or more of size_bytes, "):
        Budget()


def test_rows_are_judged_by_what_they_hold() -> None:
    rows = [
        Row("torch", "fp32", "float", metrics={"val_acc": 0.9}),
        file(metrics={"val_acc": 0.85}, p95_ms=3.0, size_bytes=10),
        Row("coreml", "int8", "trained", metrics={"val_acc": 0.91}, p95_ms=9.0, size_bytes=10, is_reference=True),
        file(error="no"),
    ]
    before, slow, reference, failed = judged(rows, Budget(latency_p95_ms=2.0, accuracy_drop=0.02), ACCURACY)
    assert before.budget is None
    assert failed.budget is None
    assert slow.budget is not None
    assert [excess.name for excess in slow.budget.exceeded] == ["latency_p95_ms", "accuracy_drop"]
    assert slow.budget.exceeded[1].value == pytest.approx(0.05)
    # The speed of a reference interpreter never counts, and a gain is no drop.
    assert reference.budget is not None
    assert (reference.budget.status, reference.budget.not_measurable) == ("not measurable", ("latency_p95_ms",))
    assert over_budget(Report("Net", "validate", [before, slow, reference, failed])) == [
        f"tflite int8 (quantized in training) is over its budget: {slow.budget}"
    ]


def test_a_drop_of_a_loss_is_its_rise() -> None:
    rows = [Row("torch", "fp32", "float", metrics={"loss": 0.5}), file(metrics={"loss": 0.8})]
    _, judged_file = judged(rows, Budget(accuracy_drop=0.1), Monitor("loss", "min"))
    assert judged_file.budget is not None
    assert judged_file.budget.exceeded[0].value == pytest.approx(0.3)


def test_a_drop_without_a_deciding_metric_is_not_measurable() -> None:
    rows = [Row("torch", "fp32", "float", metrics={"loss": 0.5}), file(metrics={"loss": 0.8})]
    for monitor in (None, ACCURACY):
        _, row = judged(rows, Budget(accuracy_drop=0.1), monitor)
        assert row.budget is not None
        assert row.budget.not_measurable == ("accuracy_drop",)


def test_without_a_budget_there_is_no_verdict() -> None:
    assert judged([file()], None, None) == [file()]


def test_it_is_built_from_a_configuration() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--budget", type=Budget | None)
    made = parser.instantiate_classes(parser.parse_args(['--budget={"size_bytes": 1000, "latency_p95_ms": 2}']))
    assert made.budget == Budget(size_bytes=1000, latency_p95_ms=2)
