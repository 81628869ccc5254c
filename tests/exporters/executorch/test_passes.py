"""Passes for XNNPACK on graphs: equal values, and nothing left to do in a second run."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from lightning_edge.exporters.executorch.passes import PASSES
from lightning_edge.exporters.executorch.passes.activations import write_out_tanh_gelu
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
