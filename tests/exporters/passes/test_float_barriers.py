"""Barriers between float layers and int8: equal values, once, and only in int8 graphs."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from lightning_edge.exporters.passes.base import apply_passes
from lightning_edge.exporters.passes.float_barriers import separate_float_layers, separate_float_paddings
from lightning_edge.exporters.passes.graph import operation

SCALE = (0.1, 0, -128, 127, torch.int8)


class FloatLayer(nn.Module):
    """A float layer behind int8 values and what a function makes of them."""

    def __init__(self, signs: bool) -> None:
        super().__init__()
        self.layer, self.signs = nn.Linear(4, 2), signs

    def forward(self, x: Tensor) -> Tensor:
        operators = torch.ops.quantized_decomposed
        x = operators.dequantize_per_tensor(operators.quantize_per_tensor(x, *SCALE), *SCALE)
        return self.layer(torch.sign(x) * 2.0 if self.signs else x)


def traced(network: nn.Module, x: Tensor) -> fx.GraphModule:
    import torchao.quantization.pt2e  # noqa: F401  defines the quantization operators

    graph = torch.export.export(network.eval(), (x,), strict=False).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    return graph


def test_a_float_layer_gets_one_barrier() -> None:
    x = torch.randn(3, 4)
    for signs in (False, True):
        network = FloatLayer(signs)
        graph = traced(network, x)
        assert apply_passes(graph, (separate_float_layers,))
        (layer,) = [node for node in graph.graph.nodes if operation(node) == "linear"]
        assert [operation(part) for part in layer.args[0].args] == ["sign", "abs"]
        torch.testing.assert_close(graph(x), network(x))
        assert not apply_passes(graph, (separate_float_layers,))


def test_a_float_network_is_left_alone() -> None:
    x = torch.randn(3, 4)
    graph = traced(nn.Linear(4, 2), x)
    assert not apply_passes(graph, (separate_float_layers, separate_float_paddings))


def test_a_padding_that_stays_float_is_negated_twice() -> None:
    class Padded(FloatLayer):
        def forward(self, x: Tensor) -> Tensor:
            operators = torch.ops.quantized_decomposed
            x = operators.dequantize_per_tensor(operators.quantize_per_tensor(x, *SCALE), *SCALE)
            return self.layer(nn.functional.pad(x[:, :3], (0, 1)) if self.signs else nn.functional.pad(x, (-1, 1)))

    x = torch.randn(3, 4)
    network = Padded(False)
    graph = traced(network, x)
    assert apply_passes(graph, (separate_float_paddings,))
    torch.testing.assert_close(graph(x), network(x))
    assert not apply_passes(graph, (separate_float_paddings,))
