"""Weights that only ever meet padding: left out of float networks and of converted graphs, no value changed."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lightning_edge import convert
from lightning_edge.exporters import deployable, export
from lightning_edge.exporters.passes.base import apply_passes, run_passes
from lightning_edge.exporters.passes.trim_kernels import trim_kernels
from lightning_edge.interface import Interface
from lightning_edge.quantization import quantize

LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def whole_numbers(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """A layer whose sums are exact in any order."""
    for value in layer.parameters():
        value.data = torch.randint(-9, 10, value.shape, generator=generator).float()
    return layer


def graph_of(layer: Any, values: Tensor) -> fx.GraphModule:
    """A graph of one convolution."""
    graph = fx.Graph()
    kind = {1: torch.ops.aten.conv1d, 2: torch.ops.aten.conv2d, 3: torch.ops.aten.conv3d}[values.dim() - 2]
    target = kind.padding if isinstance(layer.padding, str) else kind.default
    image, weight, bias = graph.placeholder("image"), graph.get_attr("layer.weight"), graph.get_attr("layer.bias")
    settings = (list(layer.stride), layer.padding, list(layer.dilation), layer.groups)
    node = graph.call_function(target, (image, weight, bias, *settings))
    image.meta["val"], node.meta["val"] = values, layer(values)
    graph.output(node)
    return fx.GraphModule(nn.ModuleDict({"layer": layer}), graph)


def kernels(graph: nn.Module) -> list[tuple[int, ...]]:
    """Sizes of the kernels in a graph."""
    assert isinstance(graph, fx.GraphModule)
    names = sorted({str(node.target) for node in graph.graph.nodes if node.op == "get_attr"})
    return [tuple(value.shape[2:]) for name in names if (value := attrgetter(name)(graph)).dim() > 2]


# What is fed, the layer's settings, and what is left of its kernel.
CASES: list[tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = [
    ((1, 1), {"kernel_size": 3, "padding": 1}, (1, 1)),
    ((1, 1), {"kernel_size": 3, "padding": 1, "stride": 2}, (1, 1)),
    ((2, 2), {"kernel_size": 3, "padding": 1, "stride": 2}, (2, 2)),
    ((2, 2), {"kernel_size": 3, "padding": 1}, (3, 3)),
    ((2, 2), {"kernel_size": 5, "padding": 2, "groups": 4}, (3, 3)),
    ((2, 2), {"kernel_size": 5, "padding": 2, "stride": 2, "groups": 4}, (2, 2)),
    ((4, 1), {"kernel_size": (3, 5), "padding": (1, 2), "groups": 2}, (3, 1)),
    ((3, 3), {"kernel_size": 3, "padding": 3, "dilation": 3}, (1, 1)),
    ((4, 4), {"kernel_size": 3, "padding": 6, "dilation": 6}, (1, 1)),
    ((4, 3), {"kernel_size": 3, "padding": 2, "dilation": 2}, (3, 3)),
    ((1, 2), {"kernel_size": 3, "padding": "same"}, (1, 3)),
    ((1, 1), {"kernel_size": 4, "padding": "same"}, (4, 4)),
    ((5, 5), {"kernel_size": 3, "padding": "valid"}, (3, 3)),
    ((3,), {"kernel_size": 9, "padding": 4}, (5,)),
    ((2,), {"kernel_size": 9, "padding": 4, "stride": 4}, (2,)),
    ((1, 2, 4), {"kernel_size": 3, "padding": 1}, (1, 3, 3)),
    ((32, 32), {"kernel_size": 7, "padding": 3, "stride": 2}, (7, 7)),
]


@pytest.mark.parametrize(("image", "settings", "left"), CASES, ids=str)
def test_layers_keep_what_meets_values(image: tuple[int, ...], settings: dict[str, Any], left: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = whole_numbers(LAYERS[len(image)](4, 8, **settings), generator)
    values = torch.randint(-9, 10, (2, 4, *image), generator=generator).float()
    graph = graph_of(layer, values)
    less = run_passes(graph, (trim_kernels,))
    assert kernels(less) == [left]
    assert kernels(graph) == [layer.weight.shape[2:]]  # the network itself is as it was
    assert (less is graph) == (left == layer.weight.shape[2:])
    assert torch.equal(less(values), graph(values))
    assert run_passes(less, (trim_kernels,)) is less


@pytest.mark.parametrize("seed", range(8))
def test_any_setting_gives_the_same(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int) -> tuple[int, int]:
        first, second = torch.randint(low, high, (2,), generator=generator).tolist()
        return first, second

    narrowed = 0
    for _ in range(60):
        image, kernel, stride, padding, dilation = drawn(1, 6), drawn(1, 6), drawn(1, 4), drawn(0, 7), drawn(1, 4)
        wide = [(size - 1) * apart + 1 for size, apart in zip(kernel, dilation, strict=True)]
        if any(size + 2 * pad < most for size, pad, most in zip(image, padding, wide, strict=True)):
            continue
        layer = whole_numbers(nn.Conv2d(2, 3, kernel, stride, padding, dilation), generator)
        values = torch.randint(-9, 10, (1, 2, *image), generator=generator).float()
        graph = graph_of(layer, values)
        wanted = graph(values)
        narrowed += apply_passes(graph, (trim_kernels,))
        assert torch.equal(graph(values), wanted), (image, layer)
    assert narrowed >= 5


@pytest.mark.parametrize(("image", "settings", "left"), [CASES[2], CASES[4], CASES[13]], ids=str)
def test_int8_layers_keep_what_meets_values(
    image: tuple[int, ...], settings: dict[str, Any], left: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = LAYERS[len(image)](4, 8, **settings)
    batches = [torch.randn(4, 4, *image) for _ in range(2)]
    network = convert(quantize(nn.Sequential(layer, nn.ReLU()).eval(), batches))
    less = run_passes(network.graph, (trim_kernels,))
    assert kernels(less) == [left]
    assert kernels(network.graph) == [layer.weight.shape[2:]]
    assert torch.allclose(less(batches[0]), network.graph(batches[0]), atol=1e-6)


class Shared(nn.Module):
    """Two convolutions with the same weight, one over a larger image."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.small.weight = self.large.weight

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.small(self.large(image).mean((2, 3), keepdim=True))
        return result


class Standardized(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, image: Tensor) -> Tensor:
        return self._conv_forward(image, self.weight - self.weight.mean(), self.bias)


class SideBySide(nn.Module):
    """All samples as one image, whose height nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        joined = self.layer(image.mean((2, 3), keepdim=True).permute(1, 0, 2, 3).reshape(1, 4, -1, 1))
        return joined.reshape(4, image.shape[0], -1).permute(1, 0, 2)


@pytest.mark.parametrize(
    "model",
    [
        Shared(),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), Standardized(4, 4, 3, padding=1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
        SideBySide(),
    ],
    ids=["shared weight", "forward of its own", "parametrized", "padded otherwise", "as large as the batch"],
)
def test_layers_that_something_else_looks_into_stay(model: nn.Module) -> None:
    free = {0: torch.export.Dim("batch")} if isinstance(model, SideBySide) else None
    program = torch.export.export(model.eval(), (torch.randn(2, 4, 4, 4),), dynamic_shapes=(free,))
    graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    assert not trim_kernels(graph)


class LastStage(nn.Module):
    """Ends in an image of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, 2, 1)
        self.second = nn.Conv2d(16, 32, 3, 2, 1)
        self.last = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, image: Tensor) -> Tensor:
        image = torch.relu(self.last(torch.relu(self.second(torch.relu(self.first(image))))))
        logits: Tensor = self.head(image.flatten(1))
        return logits


SUFFIXES = {"executorch": "pte", "coreml": "mlpackage", "tflite": "tflite", "onnx": "onnx"}
BATCH = {"interface": Interface(max_batch=2, layout="nhwc")}


@pytest.mark.parametrize(
    ("target", "options", "int8"),
    [
        ("coreml", {}, True),
        ("onnx", {}, True),
        ("onnx", {}, False),
        *(pytest.param(name, {}, True, marks=pytest.mark.slow) for name in ("executorch", "tflite")),
        *(pytest.param(name, {}, False, marks=pytest.mark.slow) for name in ("executorch", "coreml", "tflite")),
        *(
            pytest.param(name, BATCH, int8, marks=pytest.mark.slow)
            for name in ("coreml", "onnx")
            for int8 in (False, True)
        ),
    ],
    ids=str,
)
def test_files_hold_less_and_give_the_same(target: str, options: dict[str, Any], int8: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = LastStage().eval(), [torch.randn(4, 3, 4, 4) for _ in range(2)]
    network = convert(quantize(model, batches)) if int8 else deployable(model, batches[0][:1])
    artifact = export(network, target, tmp_path / f"net.{SUFFIXES[target]}", batches=batches, **options)
    # Of 9 weights a filter the second layer keeps 4 and the last one 1.
    weights = 16 * 3 * 9 + 32 * 16 * 4 + 32 * 32 + 32 * 5
    assert artifact.size_bytes < (1 if int8 else 4) * weights + 16_000
    assert artifact.agreement is not None
    (output,) = artifact.agreement.outputs
    assert (output.max_steps or 0) <= 1
    assert output.max_relative < 0.02
