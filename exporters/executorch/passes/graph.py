"""Insert nodes into a graph for XNNPACK, each in the quantization of what it is made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lightning_edge.exporters.passes.graph import insert

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


def view(graph: fx.GraphModule, before: fx.Node, source: Any, shape: Sequence[int]) -> fx.Node:
    """Insert a view of a value in another shape."""
    return insert(graph, before, _ATEN.view.default, source, list(shape))


def in_two_dimensions(others: Sequence[int]) -> tuple[int, int]:
    """Return the dimensions in front of the features as two, the samples first where there are some."""
    return (others[0], math.prod(others[1:])) if len(others) > 1 else (1, others[0])
