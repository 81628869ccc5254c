"""Choices between a value and a number behind a convolution, in NHWC."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from lightning_edge import export, load
from lightning_edge.exporters import ExportWarning
from lightning_edge.exporters.passes.base import apply_passes
from lightning_edge.exporters.passes.graph import operation, shape_of
from lightning_edge.exporters.tflite.passes.choices import choose_by_where
from lightning_edge.quantization import quantize


class Choices(nn.Module):
    """Every form of a choice that a convolution can be behind of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(28, 4, 1)
        self.register_buffer("limit", torch.tensor(0.3))
        self.register_buffer("columns", torch.ones(8, 8).tril() > 0)

    def forward(self, x: Tensor) -> Tensor:
        # Without jumps: a value that int8 rounds to the other side stays near.
        y = self.layer(x)
        parts = [
            functional.threshold(y, -0.3, -0.3),
            torch.where(y > 0.3, self.limit, y),
            y.masked_fill(y < 0, 0.0),
            torch.where(self.columns, y, torch.tensor(0.25)),
            functional.hardshrink(y, 0.01),
            functional.logsigmoid(y),
            torch.where(y > 0, 0.0, y),
        ]
        return self.head(torch.cat(parts, 1))


def test_operands_get_as_many_dimensions_as_the_result() -> None:
    torch.manual_seed(0)
    x, network = torch.randn(2, 3, 8, 8), Choices().eval()
    graph = torch.export.export(network, (x,)).module()
    assert isinstance(graph, fx.GraphModule)
    assert apply_passes(graph, (choose_by_where,))
    chosen = [node for node in graph.graph.nodes if operation(node) == "where"]
    assert len(chosen) == 6
    assert {len(shape_of(node)) for node in chosen} == {4}
    assert not {operation(node) for node in graph.graph.nodes} & {"threshold", "masked_fill", "hardshrink"}
    assert torch.equal(graph(x), network(x))
    assert not apply_passes(graph, (choose_by_where,))


@pytest.mark.slow
def test_files_have_them_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, network = torch.randn(4, 3, 8, 8), Choices().eval()
    export(network, "tflite", tmp_path / "float.tflite", inputs=x[:1])
    torch.testing.assert_close(load(tmp_path / "float.tflite")(x)[0], network(x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_files_have_them_in_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, network = torch.randn(4, 3, 8, 8), Choices().eval()
    quantized = quantize(network, [x])
    with pytest.warns(ExportWarning, match="compute in float"):  # logarithms and comparisons
        artifact = export(quantized, "tflite", tmp_path / "int8.tflite")
    with torch.no_grad():
        expected = quantized(x)
    step = float(expected.max() - expected.min()) / 255
    assert float((load(artifact.path)(x)[0] - expected).abs().max()) < 3 * step
