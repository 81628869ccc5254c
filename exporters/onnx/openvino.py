"""Run ONNX files in OpenVINO, as a second opinion."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import final

import onnx_ir as ir
import torch
from torch import Tensor

from lightning_edge.errors import require
from lightning_edge.exporters.onnx import read
from lightning_edge.exporters.onnx.runtime import spec_of
from lightning_edge.exporters.run.calls import TensorSpec
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.wording import counted


@final
class OpenVinoRunner(Runner):
    """Runs one loaded file in OpenVINO."""

    def __init__(self, path: Path, threads: int) -> None:
        openvino = require("openvino", "openvino")
        data = path.read_bytes()
        graph = read.parse(data).graph
        self.inputs = tuple(_spec_of(value) for value in read.given(graph))
        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        # On x86 without VNNI its int8 kernels overflow, and it has no exact ones as ONNX Runtime does.
        settings["LP_TRANSFORMS_MODE"] = False
        self._model = core.compile_model(core.read_model(model=data, weights=b""), "CPU", settings)
        self._request = self._model.create_infer_request()
        self._outputs = len(graph.outputs)
        count = counted(threads, "thread")
        self.runtime = f"OpenVINO {version('openvino')}, CPU, int8 computed in float, {count}"

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one sample."""
        results = self._request.infer(dict(enumerate(tensor.numpy() for tensor in tensors)))
        return [torch.as_tensor(results[position]).clone() for position in range(self._outputs)]


def _spec_of(value: ir.Value) -> TensorSpec:
    shape = [size if isinstance(size, int) else size.value for size in value.shape or ()]
    return spec_of(str(value.name), shape, f"tensor({'' if value.dtype is None else value.dtype.name.lower()})")
