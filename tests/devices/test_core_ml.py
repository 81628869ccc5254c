"""Core ML as a device: a stand-in of coremltools' calls, since no Mac was there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_edge.contents import Contents, Endpoint
from lightning_edge.devices import CoreML
from lightning_edge.devices.remote import RemoteRunner
from lightning_edge.errors import DeviceError

CONTENTS = Contents(
    1,
    0,
    {},
    inputs=(Endpoint("x", (1, 3), "float32"), Endpoint("image", (1, 3, 2, 4), "uint8")),
    outputs=(Endpoint("sum", (1, 1), "float32"), Endpoint("wide", (1, 4), "int32")),
)
# It gives the sum of x, and of the picture its width, height, first pixel's green and the bytes of the weights.
TOOLS = """
import enum, numpy, os
__version__ = "9.9"
class ComputeUnit(enum.Enum):
    ALL = 1
    CPU_AND_NE = 4
class models:
    class MLModel:
        def __init__(self, path, compute_units):
            assert compute_units is ComputeUnit.CPU_AND_NE
            assert path.endswith("model.mlpackage")
            self._weights = os.path.getsize(os.path.join(path, "Data", "weights.bin"))
        def get_compiled_model_path(self):
            return "compiled"
        def predict(self, given):
            picture = given["image"]
            wide = [[*picture.size, picture.getpixel((0, 0))[1], self._weights]]
            return {"wide": numpy.array(wide, "float32"), "sum": given["x"].sum()}
"""
PLAN = """
class MLNeuralEngineComputeDevice: pass
class MLCPUComputeDevice: pass
class Told:
    def __init__(self, **told): self.__dict__.update(told)
class MLComputePlan:
    @classmethod
    def load_from_path(cls, path, compute_units):
        assert (path, compute_units.name) == ("compiled", "CPU_AND_NE")
        return cls()
    class model_structure:
        class program:
            functions = {"main": Told(block=Told(operations=["const", "conv", "linear"]))}
    def get_estimated_cost_for_mlprogram_operation(self, operation):
        return {"const": None, "conv": Told(weight=0.75), "linear": Told(weight=0.25)}[operation]
    def get_compute_device_usage_for_mlprogram_operation(self, operation):
        kind = {"conv": MLNeuralEngineComputeDevice, "linear": MLCPUComputeDevice}.get(operation)
        return kind and Told(preferred_compute_device=kind())
"""


def test_a_package_runs_on_the_units_of_the_device(
    tmp_path: Path, place: Path, python: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL")
    package = tmp_path / "mine.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Data/weights.bin").write_bytes(b"12345")
    stand_in = {
        "coremltools/__init__.py": TOOLS,
        "coremltools/models/__init__.py": "",
        "coremltools/models/compute_plan.py": PLAN,
    }
    device = CoreML("cpu_and_ne", python(stand_in), folder=str(place))
    with pytest.raises(DeviceError, match="Core ML runs on macOS, and this is none"):
        device.check()
    monkeypatch.setattr(sys, "platform", "darwin")
    with RemoteRunner("mac", device, "coreml", package, CONTENTS, 1, 20.0) as runner:
        assert runner.runtime == (
            "Core ML, coremltools 9.9, compute units cpu_and_ne, by its plan 25% on the CPU, 75% on the Neural Engine"
        )
        assert runner.session["compute_units"] == "CPU_AND_NE"
        image = torch.zeros(1, 3, 2, 4, dtype=torch.uint8)
        image[0, 1, 0, 0] = 7
        found, wide = runner([torch.tensor([[1.0, 2.0, 4.0]]), image])
        assert found.tolist() == [[7.0]]
        assert wide.tolist() == [[4, 2, 7, 5]]
        assert len(runner.times([torch.ones(1, 3), image], 3).ns) == 3


def test_units_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="give one of all, cpu_only, cpu_and_gpu, cpu_and_ne"):
        CoreML("npu")  # type: ignore[arg-type]
    assert CoreML().runs("coreml")
    assert not CoreML().runs("tflite")
