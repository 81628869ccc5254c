"""Profiles of boards: each is whole, each figure has a source, and a budget takes its limits from there."""

from __future__ import annotations

import pytest

from lightning_edge.boards import LIMITS, Board, board_names, read_board
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.exporters import TARGETS
from lightning_edge.exporters.micro.vela import CONFIGURATIONS
from lightning_edge.reporting.budget import DEVICE, Budget, Excess
from lightning_edge.reporting.report import Report, Row
from lightning_edge.reporting.rows import judged


@pytest.mark.parametrize("name", board_names())
def test_every_figure_has_a_source_and_every_target_is_there(name: str) -> None:
    found = read_board(name)
    figures = [key for key in (*LIMITS, "npu") if getattr(found, key) is not None]
    assert {*figures} <= {*found.sources}
    assert {*found.sources} <= {*figures, "schemes"}
    assert all(type(found.limits[key]) is int for key in found.limits)
    assert {*found.targets} <= {*TARGETS}
    assert found.npu is None or found.npu in CONFIGURATIONS


def test_an_unknown_board_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no profile 'stm32'; allowed: .*stm32l4r5"):
        Budget(device="stm32")


def test_a_budget_takes_the_limits_of_its_device_and_its_own_first() -> None:
    assert Budget(device="nrf5340").limits() == {"flash_bytes": 1048576, "arena_bytes": 524288}
    assert Budget(device="nrf5340", arena_bytes=100).limits()["arena_bytes"] == 100
    assert Budget(device="iphone").limits() == {}


def file(precision: str, target: str = "tflite", **values: object) -> Row:
    return Row(target, precision, "trained", size_bytes=2000, **values)  # type: ignore[arg-type]


def test_files_are_judged_for_the_device() -> None:
    budget = Budget(device="stm32l4r5", arena_bytes=5000, energy_mj=1.0)
    rows = judged(
        [file("int8", arena_bytes=5696), file("int8", arena_bytes=None), file("fp32"), file("int8", "executorch")],
        budget,
        None,
    )
    over, unknown, float_file, elsewhere = (row.budget for row in rows)
    assert over is not None
    assert over.exceeded == (Excess("arena_bytes", 5000, 5696),)
    assert over.not_measurable == ("energy_mj",)
    assert unknown is not None
    assert (unknown.status, unknown.not_measurable) == ("not measurable", ("arena_bytes", "energy_mj"))
    assert float_file is not None
    assert float_file.exceeded[0] == Excess(DEVICE, 0, 1)
    assert "the device does not run files of this form" in str(float_file)
    assert elsewhere is None  # a .pte is for another device
    # A float file is the baseline beside an int8 one, and what would be shipped where there is none.
    assert [row.precision for row in Report("Net", "validate", rows).over_budget] == ["int8"]
    assert [row.precision for row in Report("Net", "validate", rows[2:3]).over_budget] == ["fp32"]


def test_a_device_that_runs_none_of_the_files_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"'stm32l4r5' runs files of tflite, and targets=\['coreml'\] has none"):
        EvaluationSettings(["coreml"], budget=Budget(device="stm32l4r5"))
    with pytest.raises(ValueError, match=r"runs files in int8, and options of tflite ask for scheme='fp16'"):
        EvaluationSettings(["tflite"], options={"tflite": {"scheme": "fp16"}}, budget=Budget(device="rp2350"))
    EvaluationSettings(["tflite", "coreml"], budget=Budget(device="stm32l4r5"))


def test_a_board_of_any_form_runs_all_of_a_targets() -> None:
    board = Board("a", "A", "LiteRT", ["tflite"], "any")
    assert board.runs("tflite", "fp16")
    assert not board.runs("onnx", "fp32")
