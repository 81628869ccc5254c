"""LayerNorm in the operations that XNNPACK has."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_edge.exporters.executorch.passes.graph import in_two_dimensions, view
from lightning_edge.exporters.passes.base import each_node
from lightning_edge.exporters.passes.graph import constant, insert, replaced, shape_of

_ATEN = torch.ops.aten


@each_node
def write_out_layer_norm(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Write out LayerNorm over the last dimension.

    Given: ``layer_norm`` in float32. In half precision means lose what the one operation keeps.

    Result: means of images one row high, and differences, products and sums.

    Why: XNNPACK has no LayerNorm, and it has all of these (executorch 1.4).
    """
    if node.target is not _ATEN.layer_norm.default:
        return False
    source, sizes, *given = node.args
    weight, bias, eps = (*given, *(None, None, 1e-5)[len(given) :])[:3]
    *others, channels = shape_of(source)
    is_float = isinstance(source, fx.Node) and source.meta["val"].dtype is torch.float32
    if not is_float or not isinstance(sizes, list | tuple) or len(sizes) > 1 or len(others) not in (1, 2, 3):
        return False
    batch, count = in_two_dimensions(others)
    if len(others) > 2:  # as tokens: what is four-dimensional is kept with another axis last
        others = [batch, count]
        source = view(graph, node, source, [*others, channels])
        source.meta["val"] = node.meta["val"].view(*others, channels)

    def mean(value: Any) -> fx.Node:
        image = view(graph, node, value, [batch, count, 1, channels])
        kept = insert(graph, node, _ATEN.mean.dim, image, [-1, -2], True)
        return view(graph, node, kept, [*others, 1])

    centred = insert(graph, node, _ATEN.sub.Tensor, source, mean(source))
    variance = mean(insert(graph, node, _ATEN.mul.Tensor, centred, centred))
    small = constant(graph, node, "eps", torch.tensor([float(str(eps))]), source)
    root = insert(graph, node, _ATEN.rsqrt.default, insert(graph, node, _ATEN.add.Tensor, variance, small))
    result = insert(graph, node, _ATEN.mul.Tensor, centred, root)
    if weight is not None:
        result = insert(graph, node, _ATEN.mul.Tensor, result, weight)
    if bias is not None:
        result = insert(graph, node, _ATEN.add.Tensor, result, bias)
    if len(shape_of(node)) > 3:
        result = view(graph, node, result, shape_of(node))
    return replaced(graph, node, result)
