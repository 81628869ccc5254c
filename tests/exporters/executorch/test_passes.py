"""Passes for XNNPACK on graphs: equal values, and nothing left to do in a second run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, fx, nn

from lightning_edge import quantize
from lightning_edge.exporters import export
from lightning_edge.exporters.executorch.passes import PASSES
from lightning_edge.exporters.executorch.passes.activations import write_out_tanh_gelu
from lightning_edge.exporters.executorch.passes.contiguous_constants import lay_out_constants
from lightning_edge.exporters.executorch.passes.shapes import drop_single_repeats
from lightning_edge.exporters.passes.base import apply_passes
from lightning_edge.exporters.passes.graph import operation


class Everything(nn.Module):
    """What XNNPACK has under other names, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.feature_norm = nn.LayerNorm(12)

    def forward(self, images: Tensor) -> Tensor:
        features = self.convolution(images)
        doubled = nn.functional.interpolate(features, scale_factor=2.0, mode="nearest").softmax(-1)
        tokens = self.norm(features.flatten(2).transpose(1, 2)).roll(1, 1)
        seen = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True)
        first, second = seen.clamp(-1, 1).chunk(2, 1)
        parts = [
            first.mean(1),
            second.amax(1),
            doubled.mean((2, 3)),
            tokens[:, 0],
            nn.functional.softplus(tokens[:, 1]),
        ]
        joined = torch.cat([torch.cat(parts[:2], -1), torch.cat(parts[2:4], -1)], -1)
        grown = self.feature_norm(joined.unflatten(1, (2, 12)).sum(1)) ** 3
        return torch.cat([grown, grown.mean(-1, keepdim=True), parts[4]], -1)


def exported(network: nn.Module, *given: Tensor) -> fx.GraphModule:
    graph = torch.export.export(network.eval(), given, strict=False).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    return graph


def operations(graph: fx.GraphModule) -> set[str]:
    return {operation(node) for node in graph.graph.nodes if node.op == "call_function"}


def test_what_xnnpack_lacks_is_written_in_what_it_has() -> None:
    torch.manual_seed(0)
    images, network = torch.randn(2, 2, 4, 4), Everything()
    graph = exported(network, images)
    lacking = {"layer_norm", "roll", "scaled_dot_product_attention", "select", "chunk", "softplus", "clamp", "pow"}
    lacking |= {"upsample_nearest2d"}
    assert lacking <= operations(graph)
    assert apply_passes(graph, PASSES)
    assert not operations(graph) & lacking
    torch.testing.assert_close(graph(images), network(images), rtol=1e-4, atol=1e-5)


def test_each_pass_has_nothing_left_to_do() -> None:
    graph = exported(Everything(), torch.randn(2, 2, 4, 4))
    apply_passes(graph, PASSES)
    # Means and extremes that keep their dimensions are what the passes look for, so these have their own tests.
    repeatable = [each for each in PASSES if "keep_dimensions" not in each.__name__]
    assert [each.__name__ for each in repeatable if apply_passes(graph, (each,))] == []


def test_the_tanh_form_of_gelu_is_written_out_in_float_only() -> None:
    network, x = nn.GELU(approximate="tanh"), torch.linspace(-300, 300, 601)[None]
    graph = exported(network, x)
    assert apply_passes(graph, PASSES)
    assert "gelu" not in operations(graph)
    torch.testing.assert_close(graph(x), network(x), rtol=1e-5, atol=1e-6)
    assert not apply_passes(exported(nn.GELU(), x), (write_out_tanh_gelu,))


class Repeated(nn.Module):
    """Copies of what it is fed."""

    def __init__(self, times: tuple[int, ...]) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(self.times)


class Positions(nn.Module):
    """Features of positions, channels first by a permutation, as XCiT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.projection = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        rows = torch.arange(1.0, images.shape[2] + 1).view(1, -1, 1, 1).repeat(1, 1, images.shape[3], 1)
        positions = self.projection(torch.sin(rows / torch.arange(1.0, 9.0)).permute(0, 3, 1, 2))
        return (self.layer(images) + positions.repeat(images.shape[0], 1, 1, 1)).flatten(2).mean(-1)


def test_constants_are_stored_contiguously(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 6, 6)
    file = export(quantize(Positions().eval(), [images]), "executorch", tmp_path / "network.pte", isolated=False)
    assert file.judgement is not None
    assert file.judgement.grade == "exact"


def test_a_repetition_that_gives_one_copy_is_dropped() -> None:
    x = torch.randn(1, 2, 3)
    for times, stays in (((1, 1, 1), False), ((1, 2, 1), True), ((1, 1, 1, 1), True)):
        graph = exported(Repeated(times), x)
        assert drop_single_repeats(graph) is not stays
        graph.recompile()
        assert ("repeat" in operations(graph)) is stays
        assert torch.equal(graph(x), x.repeat(times))


def test_the_layout_of_a_constant_is_no_part_of_its_values() -> None:
    graph = exported(nn.Identity(), torch.randn(1, 2, 3, 4))
    given = torch.randn(1, 3, 4, 2).permute(0, 3, 1, 2)
    graph.register_buffer("table", given)
    (output,) = graph.graph.find_nodes(op="output")
    with graph.graph.inserting_before(output):
        table = graph.graph.get_attr("table")
        total = graph.graph.call_function(torch.ops.aten.add.Tensor, (output.args[0][0], table))
    output.args = ((total,),)
    graph.recompile()
    assert lay_out_constants(graph)
    assert graph.table.is_contiguous()
    assert torch.equal(graph.table, given)
    assert not lay_out_constants(graph)
