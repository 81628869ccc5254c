"""Layers that LiteRT's converter refuses or leaves in float: int8 in the file, or cropped there, to the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deployables import Branches, beyond
from torch import Tensor, fx, nn
from torch.nn import functional

from lightning_edge.errors import ExportError
from lightning_edge.exporters import deployable, export
from lightning_edge.exporters.micro.sources import footprint
from lightning_edge.exporters.passes.base import apply_passes
from lightning_edge.exporters.passes.graph import operation
from lightning_edge.exporters.tflite import graph as tflite_graph
from lightning_edge.exporters.tflite.graph import op_name
from lightning_edge.exporters.tflite.passes.broadcasts import drop_expansions
from lightning_edge.exporters.tflite.passes.reshapes import reshape_results
from lightning_edge.quantization import quantize

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_torch")


class Upward(nn.Module):
    """A transposed convolution with what may stand behind it, joined to its own input's input as in a U-Net."""

    def __init__(self, activation: nn.Module | None = None, norm: bool = False, **settings: Any) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, stride=settings["stride"], padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 6, **settings)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.activation = activation or nn.Identity()
        self.head = nn.Conv2d(9, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        upward = self.activation(self.norm(self.up(self.down(images))))
        height, width = (min(pair) for pair in zip(upward.shape[2:], images.shape[2:], strict=True))
        logits: Tensor = self.head(torch.cat([upward[:, :, :height, :width], images[:, :, :height, :width]], 1))
        return logits


def images() -> list[Tensor]:
    return list(torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


def trained(network: nn.Module) -> nn.Module:
    """Statistics that fit the weights."""
    with torch.no_grad():
        for batch in images():
            network.train()(batch)
    return network.eval()


def operations(path: Path) -> list[str]:
    model = tflite_graph.parse(path.read_bytes())
    return [op_name(model, op) for op in model.subgraphs[0].operators]


slow = pytest.mark.slow
COMMON: dict[str, dict[str, Any]] = {
    "2x2, ReLU6": {"kernel_size": 2, "stride": 2, "norm": True, "activation": nn.ReLU6(), "bias": False},
    "3x3, ReLU": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "activation": nn.ReLU()},
}
OTHERS: dict[str, dict[str, Any]] = {
    "stride 1": {"kernel_size": 3, "stride": 1, "padding": 1},
    "4x4, SiLU": {"kernel_size": 4, "stride": 2, "padding": 1, "norm": True, "activation": nn.SiLU()},
    "5x5": {"kernel_size": 5, "stride": 2, "padding": 2, "output_padding": 1},
    "one less": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    "2x3": {"kernel_size": (2, 3), "stride": (2, 2), "padding": (0, 1), "output_padding": (0, 1)},
}


@pytest.mark.parametrize("forms", [COMMON, pytest.param(OTHERS, marks=slow)], ids=lambda forms: "; ".join(forms))
def test_transposed_convolutions_are_int8_and_in_the_delegate(forms: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Branches({name: Upward(**settings) for name, settings in forms.items()})
    quantized = quantize(trained(network), images())
    artifact = export(quantized, "tflite", tmp_path / "net.tflite", batches=images())
    assert beyond(network.names, artifact.agreement, steps=1) == {}
    assert (artifact.contents.float_compute_ops, artifact.contents.float_ops) == ((), ())
    assert artifact.contents.placements is not None
    assert artifact.contents.placements.fallback_share == 0
    assert "DEQUANTIZE" not in operations(artifact.path)


def decoder(joined: bool, path: Path) -> Path:
    """A file with a transposed convolution, a ReLU and, or not, something of another range joined to it."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.ConvTranspose2d(3, 6, 2, stride=2, bias=False), nn.Conv2d(12, 4, 1)

        def forward(self, images: Tensor) -> Tensor:
            upward = torch.relu(self.up(images))
            logits: Tensor = self.head(torch.cat([upward, -upward if joined else upward], 1))
            return logits

    torch.manual_seed(0)
    return export(quantize(Decoder().eval(), images()), "tflite", path, batches=images()).path


def test_a_microcontroller_gets_no_activation_that_its_kernel_leaves_out(tmp_path: Path) -> None:
    alone, joined = decoder(False, tmp_path / "alone.tflite"), decoder(True, tmp_path / "joined.tflite")
    # The quantized values end at zero by themselves; joined to negative ones they do not.
    assert footprint(alone).activation_bytes > 4 * 6 * 16 * 16
    with pytest.raises(ExportError, match=r"joined\.tflite: a transposed convolution ends with an activation"):
        footprint(joined)


@pytest.mark.parametrize("padding", [pytest.param(0, marks=slow), 1])
def test_float_transposed_convolutions_are_cropped_as_the_network_crops(padding: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Upward(kernel_size=3, stride=2, padding=padding, output_padding=padding).eval()
    artifact = export(network, "tflite", tmp_path / "net.tflite", inputs=images()[0][:1], batches=images())
    assert artifact.agreement is not None
    assert artifact.agreement.max_relative < 1e-5
    assert operations(artifact.path).count("TRANSPOSE_CONV") == 1


def test_linear_layers_that_share_weight_and_input_are_two_of_int8(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 3)
            self.right.weight = self.left.weight

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.relu(self.left(x)) + self.right(x))
            return logits

    torch.manual_seed(0)
    rows = [torch.randn(16, 12) for _ in range(3)]
    artifact = export(quantize(Shared().eval(), rows), "tflite", tmp_path / "net.tflite", batches=rows)
    assert artifact.agreement is not None
    assert artifact.agreement.max_steps == 0
    assert operations(artifact.path).count("FULLY_CONNECTED") == 3
    assert artifact.contents.float_compute_ops == ()
    assert artifact.contents.int8_weight_bytes == 12 * 8 + 8 * 3  # the shared weight once


@pytest.mark.slow
def test_a_transposed_convolution_in_groups_can_stay_float(tmp_path: Path) -> None:
    network = trained(Upward(kernel_size=2, stride=2, groups=2))
    with pytest.warns(UserWarning, match="TRANSPOSE_CONV"):
        export(quantize(network, images(), skip=["up"]), "tflite", tmp_path / "net.tflite")


class Spread(nn.Module):
    """A function of images between two layers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), function

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.function(self.first(images)))
        return logits


SPREAD: dict[str, Any] = {
    "product": lambda y: y * y[..., :1].expand_as(y),
    "sum": lambda y: y[:, :, :1].expand(-1, -1, 8, -1) + y,
    # Only from here on are values joined: twice, once and once.
    "concatenation": lambda y: torch.cat([y[..., :1].expand_as(y), y], 2)[:, :, 4:12],
    "repetition": lambda y: y * y[..., :1].repeat(1, 1, 1, 8),
    "tile": lambda y: y * y[..., :1].tile(8),
}


@pytest.mark.parametrize("form", SPREAD)
def test_what_is_spread_is_broadcast_or_joined(form: str) -> None:
    torch.manual_seed(0)
    network, x = Spread(SPREAD[form]).eval(), images()[0][:1]
    before, after = dropped(network, x)
    assert before & {"expand", "expand_as", "repeat", "tile"}
    assert not after & {"expand", "expand_as", "repeat", "tile"}
    assert ("cat" in after) == (form in ("concatenation", "repetition", "tile"))


def dropped(network: nn.Module, x: Tensor) -> tuple[set[str], set[str]]:
    """The operations of a network before and after the pass, which changes no value, and nothing a second time."""
    graph = deployable(network, x).program().module()
    assert isinstance(graph, fx.GraphModule)
    before = {operation(node) for node in graph.graph.nodes if node.op == "call_function"}
    assert apply_passes(graph, (drop_expansions,))
    torch.testing.assert_close(graph(x), network(x), rtol=0, atol=0)
    after = {operation(node) for node in graph.graph.nodes if node.op == "call_function"}
    assert not apply_passes(graph, (drop_expansions,))
    return before, after


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_values_spread_over_a_dimension(precision: str, tmp_path: Path) -> None:
    """The converter mixes up the axes of what is spread between images with the channels last."""
    network = Branches({name: Spread(function) for name, function in SPREAD.items()})
    trained(network)
    samples = images()
    path = tmp_path / "net.tflite"
    made = quantize(network, samples) if precision == "int8" else network
    artifact = export(made, "tflite", path, batches=samples, **({} if precision == "int8" else {"inputs": samples[0]}))
    near: dict[str, float] = {"relative": 1e-5} if precision == "fp32" else {"steps": 1.01}
    assert beyond(network.names, artifact.agreement, **near) == {}
    assert artifact.contents.float_compute_ops == () or precision == "fp32"
    assert "BROADCAST_TO" not in operations(path)
    assert operations(path).count("CONCATENATION") == 4


class Parts(nn.Module):
    """A function of what a layer gives, four rows of eight, behind which comes another layer."""

    def __init__(self, function: Any, given: int) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(6, 8), nn.Linear(given, 3), function

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.last(self.function(self.first(rows)))
        return logits


PARTS: dict[str, tuple[Any, int]] = {
    "sum": (lambda x: x[:, 0] + x[:, 1], 8),
    "difference": (lambda x: (x[:, 0] - x[:, -1]).relu(), 8),
    "product": (lambda x: x[:, 0] * x[:, 1] + x[:, 2], 8),
    "flattened": (lambda x: x[:, :2].flatten(1) + x[:, 2:].flatten(1), 16),
    "spread": (lambda x: (x.unsqueeze(2) + x.unsqueeze(1)).flatten(1), 128),
    "square": (lambda x: x[:, 0] * x[:, 0], 8),
}


def test_results_of_sums_and_products_are_reshaped_and_not_their_operands() -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 4, 6)
    network = Branches({name: Parts(function, given) for name, (function, given) in PARTS.items()})
    graph = deployable(quantize(network.eval(), [rows])).program().module()
    assert isinstance(graph, fx.GraphModule)
    sample = rows[:1]
    expected = graph(sample)
    assert apply_passes(graph, (reshape_results,))
    # A part that is added to the product of two others has a scale that is not theirs, and stays.
    assert [operation(node) for node in graph.graph.nodes].count("select") == 1
    for name, found, wanted in zip(network.names, graph(sample), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, msg=name)
    assert not apply_passes(graph, (reshape_results,))


@pytest.mark.slow
def test_sums_and_products_of_parts_have_scales_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(6, 4, 6) for _ in range(2)]
    network = Branches({name: Parts(function, given) for name, (function, given) in PARTS.items()})
    artifact = export(quantize(network.eval(), rows), "tflite", tmp_path / "net.tflite", batches=rows)
    assert beyond(network.names, artifact.agreement, steps=0) == {}
    assert artifact.contents.float_ops == ()


class Grouped(nn.Module):
    """Four queries' heads that share two keys and values, spread by torch or by the network itself."""

    def __init__(self, by_torch: bool) -> None:
        super().__init__()
        self.heads, self.by_torch = nn.Linear(6, 32), by_torch

    def forward(self, tokens: Tensor) -> Tensor:
        query, *others = self.heads(tokens).unflatten(-1, (4, 8)).transpose(1, 2).split([2, 1, 1], 1)
        if not self.by_torch:
            others = [part[:, :, None].expand(-1, 1, 2, 5, 8).reshape(-1, 2, 5, 8) for part in others]
        return functional.scaled_dot_product_attention(query, *others, enable_gqa=self.by_torch)


@pytest.mark.parametrize("by_torch", [True, False])
def test_shared_keys_are_joined(by_torch: bool) -> None:
    torch.manual_seed(0)
    network = Grouped(by_torch).eval()
    before, after = dropped(network, torch.randn(1, 5, 6))
    assert "cat" in after - before


@pytest.mark.slow
def test_queries_that_share_keys(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Branches({"by torch": Grouped(True), "by the network": Grouped(False)})
    artifact = export(network, "tflite", tmp_path / "net.tflite", inputs=torch.randn(1, 5, 6))
    assert beyond(network.names, artifact.agreement, relative=1e-5) == {}
