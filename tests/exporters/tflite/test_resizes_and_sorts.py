"""Nearest resizes and sorts: LiteRT rounds rows otherwise than torch, and has one operation that sorts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from lightning_edge import export
from lightning_edge.exporters.passes.base import apply_passes
from lightning_edge.exporters.passes.graph import operation
from lightning_edge.exporters.passes.resizes import pick_nearest
from lightning_edge.exporters.tflite.passes.sorts import sort_by_top_k


class Resizes(nn.Module):
    """Each kind of nearest resize."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            functional.interpolate(x, scale_factor=1.5, mode="nearest"),
            functional.interpolate(x, scale_factor=0.5, mode="nearest"),
            functional.interpolate(x, size=(13, 8), mode="nearest-exact"),
            functional.interpolate(x.flatten(2), scale_factor=1.3, mode="nearest"),
            functional.interpolate(x, scale_factor=2, mode="nearest"),
            functional.interpolate(x, scale_factor=2, mode="nearest-exact"),
        )


class Sorts(nn.Module):
    """Each kind of sort, along the last dimension and others."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        flat = x.flatten(1)
        values, places = flat.topk(3, -1)
        return (
            values,
            places,
            flat.topk(2, 1, largest=False)[1],
            x.topk(2, 1)[0],
            x.sort(2)[0],
            x.argsort(1, descending=True),
        )


def _graph(network: nn.Module, x: Tensor) -> fx.GraphModule:
    graph = torch.export.export(network, (x,)).module()
    assert isinstance(graph, fx.GraphModule)
    return graph


def test_rows_of_resizes_are_those_of_torch() -> None:
    x = torch.randn(1, 4, 8, 8)
    graph = _graph(Resizes(), x)
    assert apply_passes(graph, (pick_nearest,))
    resizes = [operation(node) for node in graph.graph.nodes if "upsample" in operation(node)]
    assert resizes == ["upsample_nearest2d"] * 2  # by whole factors
    for result, wanted in zip(graph(x), Resizes()(x), strict=True):
        assert torch.equal(result, wanted)
    assert not apply_passes(graph, (pick_nearest,))


def test_sorts_are_written_by_top_k() -> None:
    pytest.importorskip("litert_torch")
    x = torch.randn(1, 4, 8, 8)
    graph = _graph(Sorts(), x)
    assert apply_passes(graph, (sort_by_top_k,))
    assert not {operation(node) for node in graph.graph.nodes} & {"topk", "sort", "argsort"}
    for result, wanted in zip(graph(x), Sorts()(x), strict=True):
        assert torch.equal(result, wanted)
        assert result.dtype == wanted.dtype
    assert not apply_passes(graph, (sort_by_top_k,))


def test_files_resize_and_sort_behind_a_convolution(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = functional.interpolate(self.layer(x), scale_factor=1.5, mode="nearest")
            return y, y.topk(2, 1)[0], y.flatten(1).sort(1, descending=True)[0]

    torch.manual_seed(0)
    file = export(Both().eval(), "tflite", tmp_path / "m.tflite", inputs=torch.randn(1, 3, 8, 8))
    assert file.judgement is not None
    assert file.judgement.grade == "exact"
