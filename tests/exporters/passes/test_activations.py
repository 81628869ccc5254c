"""Activations that converters write in a form that loses their value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from lightning_edge import export, load
from lightning_edge.exporters.passes.activations import write_out_log_sigmoid
from lightning_edge.exporters.passes.base import apply_passes
from lightning_edge.exporters.passes.graph import operation


class LogSigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.logsigmoid(x)


FAR = torch.tensor([[-30000.0, -200.0, -90.0, -1.0, 0.0, 1e-3, 20.0, 30000.0]])


def test_log_sigmoid_becomes_softplus() -> None:
    graph = torch.export.export(LogSigmoid(), (FAR,)).module()
    assert isinstance(graph, fx.GraphModule)
    assert apply_passes(graph, (write_out_log_sigmoid,))
    names = [operation(node) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in names if name and not name.startswith("_")] == ["neg", "softplus", "neg"]
    torch.testing.assert_close(graph(FAR), functional.logsigmoid(FAR), atol=1e-8, rtol=1e-6)
    assert not apply_passes(graph, (write_out_log_sigmoid,))


@pytest.mark.parametrize(("target", "suffix"), [("onnx", ".onnx"), ("tflite", ".tflite")])
def test_a_file_gives_log_sigmoid_of_large_values(target: str, suffix: str, tmp_path: Path) -> None:
    export(LogSigmoid().eval(), target, tmp_path / f"net{suffix}", inputs=torch.randn(1, 8))
    (got,) = load(tmp_path / f"net{suffix}")(FAR)
    torch.testing.assert_close(got, functional.logsigmoid(FAR), atol=1e-6, rtol=1e-5)
