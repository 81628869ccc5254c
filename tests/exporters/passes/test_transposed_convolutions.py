"""Transposed convolutions in int8 written as convolutions: the same values, for every setting that torch takes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deployables import Branches, beyond
from torch import Tensor, fx, nn

from lightning_edge.exporters import export
from lightning_edge.exporters.passes.base import run_passes
from lightning_edge.exporters.passes.transposed_convolutions import convolve_transposed
from lightning_edge.exporters.tflite.passes.unfold_weights import unfold_weights
from lightning_edge.network import Deployable
from lightning_edge.quantization import convert, quantize


class Decoder(nn.Module):
    """A transposed convolution between two layers."""

    def __init__(self, dimensions: int, **settings: Any) -> None:
        super().__init__()
        layers = (nn.Conv1d, nn.ConvTranspose1d) if dimensions == 1 else (nn.Conv2d, nn.ConvTranspose2d)
        self.first, self.up, self.last = layers[0](3, 8, 3), layers[1](8, 8, **settings), layers[0](8, 4, 1)

    def forward(self, values: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.relu(self.up(torch.relu(self.first(values)))))
        return logits


def batches(dimensions: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, *[9, 7][:dimensions], generator=generator) for _ in range(2)]


def in_int8(dimensions: int, **settings: Any) -> Deployable:
    torch.manual_seed(0)
    return convert(quantize(Decoder(dimensions, **settings).eval(), batches(dimensions)))


def kinds(network: nn.Module) -> set[str]:
    graphs = (module for module in network.modules() if isinstance(module, fx.GraphModule))
    return {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}


SETTINGS: list[dict[str, Any]] = [
    {"dimensions": 1, "kernel_size": 4, "stride": 2, "padding": 1},
    {"dimensions": 1, "kernel_size": 3, "stride": 4, "output_padding": 2, "groups": 4, "bias": False},
    {"dimensions": 2, "kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 8},
    {"dimensions": 2, "kernel_size": (2, 5), "stride": (1, 3), "padding": (0, 2), "groups": 2},
    {"dimensions": 2, "kernel_size": 3, "stride": 1, "padding": 1},
    {"dimensions": 2, "kernel_size": 3, "stride": 2, "dilation": 2, "padding": 3},
    {"dimensions": 2, "kernel_size": 2, "stride": 2, "output_padding": 1},
]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_one_behind_another_is_fed_what_the_first_gives_in_the_end(dimensions: int, stride: int) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose1d if dimensions == 1 else nn.ConvTranspose2d
    decoder = nn.Sequential(layer(3, 8, 4, stride, 1), nn.ReLU(), layer(8, 6, 3, stride, 1), layer(6, 4, 3, stride))
    network = convert(quantize(decoder.eval(), batches(dimensions)))
    written = run_passes(network.graph, (convolve_transposed,))
    assert not any("transpose" in kind for kind in kinds(written))
    (step,) = network.output_scales
    assert step is not None
    for values in batches(dimensions):
        # Sums in another order may round to the next step, here and there.
        off = (written(values) - network.graph(values)).abs()
        assert float(off.max()) <= 1.01 * step
        assert float((off > 1e-4 * step).float().mean()) < 0.01


@pytest.mark.parametrize("unfolded", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_they_give_the_same(settings: dict[str, Any], unfolded: bool) -> None:
    network = in_int8(**settings)
    graph = run_passes(network.graph, (unfold_weights,)) if unfolded else network.graph
    written = run_passes(graph, (convolve_transposed,))
    assert run_passes(written, (convolve_transposed,)) is written
    assert any("transpose" in kind for kind in kinds(graph))
    assert not any("transpose" in kind for kind in kinds(written))
    (step,) = network.output_scales
    assert step is not None
    for values in batches(settings["dimensions"]):
        assert float((written(values) - graph(values)).abs().max()) <= 1e-4 * step


def test_what_is_not_wanted_or_float_stays() -> None:
    network = in_int8(2, kernel_size=2, stride=2)
    assert (
        run_passes(network.graph, (partial(convolve_transposed, wanted=lambda layer: layer.groups > 1),))
        is network.graph
    )
    torch.manual_seed(0)
    half_float = convert(quantize(Decoder(2, kernel_size=2, stride=2).eval(), batches(2), skip=["up"]))
    assert run_passes(half_float.graph, (convolve_transposed,)) is half_float.graph


@pytest.mark.parametrize(
    ("target", "package"),
    [("onnx", "onnxruntime"), pytest.param("tflite", "litert_torch", marks=pytest.mark.slow)],
)
def test_files_are_int8_throughout(target: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)

    class Rows(Decoder):
        def forward(self, values: Tensor) -> Tensor:
            return super().forward(values.flatten(2))

    forms = {}
    for form in [*SETTINGS[:4], *SETTINGS[-2:]]:
        torch.manual_seed(0)
        forms[str(form)] = (Rows if form["dimensions"] == 1 else Decoder)(**form)
    network = convert(quantize(Branches(forms).eval(), batches(2)))
    artifact = export(network, target, tmp_path / f"net.{target}", batches=[(values,) for values in batches(2)])
    assert (artifact.contents.float_compute_ops, artifact.contents.float_ops) == ((), ())
    assert beyond(list(forms), artifact.agreement, steps=0) == {}
    if target == "tflite":
        assert artifact.contents.placements is not None
        assert artifact.contents.placements.fallback_share == 0
