"""What a converted graph computes in int8, and what it leaves in float."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from lightning_edge.exporters.passes.graph import CLIPS, VIEWS, operation

# How many matrix products one operation is, and the position of its first factor.
_PRODUCTS = {
    "conv1d": 1,
    "conv2d": 1,
    "conv3d": 1,
    "convolution": 1,
    "conv_transpose1d": 1,
    "conv_transpose2d": 1,
    "conv_transpose3d": 1,
    "linear": 1,
    "matmul": 1,
    "mm": 1,
    "bmm": 1,
    "addmm": 1,
    "baddbmm": 1,
    "einsum": 1,
    "scaled_dot_product_attention": 2,
}
_LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "linear"})
_RECURRENT = frozenset({"gru", "lstm", "rnn_tanh", "rnn_relu"})
_ADDED_FIRST = frozenset({"addmm", "baddbmm"})
_OF_STACKS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})


def float_products(graph: torch.nn.Module) -> list[str]:
    """Name the convolution, linear and matmul operations of a converted graph that a file may compute in float.

    They are those that are not quantized on all sides, those of two activations, which have no weights, and
    convolutions of volumes: not every target has int8 kernels for them.
    """
    if not isinstance(graph, fx.GraphModule):
        return []
    found: list[str] = []
    for node in graph.graph.nodes:
        name = operation(node)
        if name in _PRODUCTS:
            first = 1 if name in _ADDED_FIRST else 0
            factors = node.args[1] if name == "einsum" else node.args[first : first + 2]
            quantized = all(_is_dequantized(factor) for factor in factors) and _is_quantized(node)
            if name == "conv3d" or not (quantized and _is_weight(graph, name, factors[-1])):
                # Converters split transposed convolutions into one for each group.
                groups = node.args[6] if name.startswith("conv_transpose") and len(node.args) > 6 else 1
                found += [name] * _PRODUCTS[name] * groups
    return found


def _is_weight(graph: fx.GraphModule, name: str, factor: Any) -> bool:
    """Whether a factor is the weight of a layer: a constant, but no stack of matrices, which no layer has."""
    stored = _constant(factor)
    return stored is not None and (name not in _OF_STACKS or attrgetter(str(stored.target))(graph).dim() < 3)


def has_recurrent_layers(graph: torch.nn.Module) -> bool:
    """Whether a converted graph has recurrent layers: float, and as many products as a target makes of each."""
    return isinstance(graph, fx.GraphModule) and any(operation(node) in _RECURRENT for node in graph.graph.nodes)


def int8_weight_count(graph: torch.nn.Module, *, without_zeros: bool) -> int:
    """Count the values in the int8 weights of a converted graph's layers.

    Args:
        graph: The converted graph.
        without_zeros: Whether only values other than zero count.
    """
    assert isinstance(graph, fx.GraphModule)
    weights: dict[str, Tensor] = {}
    for node in graph.graph.nodes:
        stored = _constant(node.args[1]) if operation(node) in _LAYERS else None
        if stored is not None and _is_dequantized(node.args[1]):
            weights[str(stored.target)] = attrgetter(str(stored.target))(graph)
    return sum(int(weight.count_nonzero()) if without_zeros else weight.numel() for weight in weights.values())


def float_layers(graph: torch.nn.Module) -> list[fx.Node]:
    """Find the convolution and linear operations of a converted graph whose weights are float constants.

    Layers of constants alone are left out, such as those of encoded positions: converters compute what they give.
    """
    if not isinstance(graph, fx.GraphModule):
        return []
    fed = _fed_nodes(graph)
    layers = [node for node in graph.graph.nodes if operation(node) in _LAYERS and node in fed]
    return [node for node in layers if _is_constant(node.args[1]) and not _is_dequantized(node.args[1])]


def _fed_nodes(graph: fx.GraphModule) -> set[fx.Node]:
    """Nodes that depend on what the network is fed, beyond how many samples that are."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        is_size = node.target is torch.ops.aten.sym_size.int
        if node.op == "placeholder" or (not is_size and any(parent in found for parent in node.all_input_nodes)):
            found.add(node)
    return found


def activation_bits(graph: torch.nn.Module) -> set[int]:
    """Give the widths of the quantized activations in a converted graph."""
    if not isinstance(graph, fx.GraphModule):
        return set()
    nodes = [node for node in graph.graph.nodes if operation(node) == "quantize_per_tensor"]
    return {torch.iinfo(node.args[5]).bits for node in nodes}


def _is_dequantized(value: Any) -> bool:
    while isinstance(value, fx.Node):
        name = operation(value)
        if name.startswith("dequantize_"):
            return True
        if name not in VIEWS:
            return False
        value = value.args[0]
    return False


def _is_quantized(node: fx.Node) -> bool:
    """Whether all that reads a value reads it quantized, the activation that a layer ends with included."""
    names = [(reader, operation(reader)) for reader in node.users]
    return bool(names) and all(
        name.startswith("quantize_") or ((name in VIEWS or name in CLIPS) and _is_quantized(reader))
        for reader, name in names
    )


def _is_constant(value: Any) -> bool:
    return _constant(value) is not None


def _constant(value: Any) -> fx.Node | None:
    """The constant that a value is, moved about or converted; ``None`` for one that is computed."""
    while isinstance(value, fx.Node) and value.op != "get_attr":
        name = operation(value)
        if name not in VIEWS and not name.startswith(("quantize_", "dequantize_")):
            return None
        value = value.args[0]
    return value if isinstance(value, fx.Node) else None
