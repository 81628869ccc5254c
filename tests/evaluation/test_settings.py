"""EvaluationSettings: what it refuses, and what it makes of other targets and of schemes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.exporters.verify import schemes
from lightning_edge.measure import Timing, Tolerance
from lightning_edge.reporting.budget import Budget


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"targets": ["tvm"]}, r"'tvm' is not one of 'executorch', 'coreml', 'tflite', 'onnx'"),
        ({"targets": []}, "give a list of one or more"),
        ({"targets": ["tflite", "tflite"]}, "names a target twice"),
        ({"targets": ["tflite"], "options": {"coreml": {}}}, "options are given for 'coreml'"),
        ({"targets": ["tflite"], "options": {"tflite": {"io": "int4"}}}, "io='int4' is not one of"),
        ({"targets": ["tflite"], "max_fallback": 2}, "max_fallback=2 is not allowed"),
        (
            {"targets": ["tflite", "onnx"], "max_fallback": 0.1, "budget": Budget(device="nrf5340")},
            r"device='nrf5340' is a microcontroller, which has no delegate, and max_fallback=0.1 .* leave",
        ),
        ({"targets": ["tflite"], "name": ""}, "name='' is not the first part of a file's name"),
        ({"targets": ["tflite"], "name": "files/model"}, "name='files/model' is not the first part of a file's name"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EvaluationSettings(**arguments)


def test_settings_do_not_change() -> None:
    settings = EvaluationSettings(["tflite"])
    with pytest.raises(FrozenInstanceError):
        settings.name = "other"  # type: ignore[misc]


def test_other_targets_take_their_options_along() -> None:
    settings = EvaluationSettings(["tflite", "onnx"], options={"tflite": {"io": "float"}})
    assert settings.for_targets(["tflite"]).options == {"tflite": {"io": "float"}}
    assert settings.for_targets(["onnx", "coreml"]).options == {}
    with pytest.raises(ValueError, match="'tvm' is not one of"):
        settings.for_targets(["tvm"])


def test_a_microcontrollers_file_is_judged_as_it_computes_there() -> None:
    settings = EvaluationSettings(["tflite", "onnx"], timing=Timing(threads=2), budget=Budget(device="nrf5340"))
    assert settings.running("tflite", "int8").kernels == "reference"
    assert settings.running("tflite", "int8").threads == 2
    # What does not run there is run as ever.
    assert {settings.running(name, "fp32").kernels for name in ("tflite", "onnx")} == {"delegate"}
    for budget in (None, Budget(size_bytes=1), Budget(device="raspberry-pi-5"), Budget(device="coral")):
        assert EvaluationSettings(["tflite"], budget=budget).running("tflite", "int8").kernels == "delegate"


def test_a_scheme_has_its_own_tolerance_unless_one_is_given() -> None:
    scheme: schemes.Scheme = "int8_weight_only"
    assert EvaluationSettings(["tflite"]).tolerance_for(scheme) == schemes.tolerance(scheme)
    assert EvaluationSettings(["tflite"]).tolerance_for(None) == Tolerance()
    given = Tolerance(max_relative=0.5)
    assert EvaluationSettings(["tflite"], tolerance=given).tolerance_for(scheme) == given


@pytest.mark.parametrize("name", ["tolerance", "timing", "budget", "interface", "on_devices"])
def test_a_dict_in_place_of_settings_is_refused(name: str) -> None:
    given: dict[str, Any] = {name: {"threads": 1}}
    with pytest.raises(TypeError, match=rf"{name}={{'threads': 1}} is no \w+; give \w+\(\.\.\.\)"):
        EvaluationSettings(["onnx"], **given)
