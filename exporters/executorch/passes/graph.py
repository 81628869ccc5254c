"""Insert nodes into a graph for XNNPACK, each in the quantization of what it is made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_ATEN = torch.ops.aten
# By name, since they exist only where torchao has been imported.
QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
_DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"


def sliced(graph: fx.GraphModule, before: fx.Node, source: Any, dim: Any, start: int, stop: int) -> fx.Node:
    """Insert a slice of a dimension, in the quantization of what it is taken from."""
    return quantized(graph, before, insert(graph, before, _ATEN.slice.Tensor, source, dim, start, stop), source)


def quantized(
    graph: fx.GraphModule, before: fx.Node, node: fx.Node, like: Any, scale: tuple[Any, ...] | None = None
) -> fx.Node:
    """Quantize and dequantize ``node`` if ``like``, which it was made from, is dequantized itself; with its scale."""
    scale = like.args[1:] if scale is None else scale
    quantize = like.args[0] if str(like.target) == _DEQUANTIZE else None
    if not isinstance(quantize, fx.Node) or str(quantize.target) != QUANTIZE:
        return node
    return insert(graph, before, like.target, insert(graph, before, quantize.target, node, *scale), *scale)


def insert(graph: fx.GraphModule, before: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Insert an operation in front of a node."""
    with graph.graph.inserting_before(before):
        return graph.graph.call_function(target, args)


def view(graph: fx.GraphModule, before: fx.Node, source: Any, shape: Sequence[int]) -> fx.Node:
    """Insert a view of a value in another shape."""
    return insert(graph, before, _ATEN.view.default, source, list(shape))


def replaced(graph: fx.GraphModule, node: fx.Node, result: fx.Node) -> bool:
    """Replace a node by a result, which gets its shape; return True."""
    result.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)
    return True


def constant(graph: fx.GraphModule, before: fx.Node, role: str, value: torch.Tensor, like: Any) -> fx.Node:
    """Insert a constant in front of the node that reads it, named by its role, in the type of another value."""
    name = f"{role}_of_{before.name}"
    graph.register_buffer(name, value.to(like.meta["val"].dtype))
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)


def in_two_dimensions(others: Sequence[int]) -> tuple[int, int]:
    """Return the dimensions in front of the features as two, the samples first where there are some."""
    return (others[0], math.prod(others[1:])) if len(others) > 1 else (1, others[0])
