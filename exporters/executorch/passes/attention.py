"""Attention and softmax in the forms that XNNPACK has."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from lightning_edge.exporters.executorch.passes.graph import view
from lightning_edge.exporters.passes.base import each_node
from lightning_edge.exporters.passes.graph import constant, insert, replaced, shape_of

_ATEN = torch.ops.aten


@each_node
def write_out_attention(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Write out attention as two products of matrices and a softmax.

    Given: ``scaled_dot_product_attention`` without a mask, under a constant one, or causal.

    Result: ``softmax(q k^T * scale + mask) v``.

    Why: torch's own decomposition treats rows in which everything is masked in a way of their own, most of it outside
    the delegate.
    """
    if node.target is not _ATEN.scaled_dot_product_attention.default:
        return False
    query, key, value, *others = node.args
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), others, strict=False)) | node.kwargs
    scale, causal = given.pop("scale", None), given.pop("is_causal", False)
    mask = _added_mask(graph, given.pop("attn_mask", None))
    broadcast = any(shape_of(operand)[:-2] != shape_of(query)[:-2] for operand in (key, value))
    if mask is None or any(other is not None and other for other in given.values()) or broadcast:
        return False
    factor = torch.tensor([shape_of(query)[-1] ** -0.5 if scale is None else float(str(scale))])
    scaled = insert(graph, node, _ATEN.mul.Tensor, query, constant(graph, node, "factor", factor, query))
    scores = insert(graph, node, _ATEN.matmul.default, scaled, insert(graph, node, _ATEN.transpose.int, key, -2, -1))
    if causal:
        unseen = torch.ones(shape_of(query)[-2], shape_of(key)[-2], dtype=torch.bool).triu(1)
        mask = mask + torch.zeros(unseen.shape).masked_fill(unseen, -torch.inf)
    if mask.any():
        scores = insert(graph, node, _ATEN.add.Tensor, scores, constant(graph, node, "mask", mask, query))
    scores.meta["val"] = query.meta["val"] @ key.meta["val"].mT  # type: ignore[union-attr]
    weights = insert(graph, node, _ATEN.softmax.int, scores, -1)
    weights.meta["val"] = scores.meta["val"]
    result = insert(graph, node, _ATEN.matmul.default, weights, value)
    return replaced(graph, node, result)


def _added_mask(graph: fx.GraphModule, mask: Any) -> torch.Tensor | None:
    """Give what a mask adds to the scores, 0 without one; ``None`` if that is not known, or leaves nothing of a row."""
    if mask is None:
        return torch.zeros(())
    if mask.target is _ATEN.expand.default:  # to the samples, which a sum spreads it to anyway
        mask = mask.args[0]
    if mask.op != "get_attr":
        return None
    value: torch.Tensor = operator.attrgetter(str(mask.target))(graph)
    if value.dtype is torch.bool:
        value = torch.zeros(value.shape).masked_fill(~value, -torch.inf)
    return None if bool((value == -torch.inf).all(-1).any()) else value


@each_node
def flatten_softmax(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Compute a softmax over the last of four dimensions on three.

    Given: such a softmax.

    Result: a softmax of three dimensions between two views.

    Why: behind a convolution the lowering keeps four dimensions in NHWC. It renumbers the axes of concatenations,
    slices and paddings, but not that of softmax, which is then one over the channels (executorch 1.4).
    """
    if node.target is not _ATEN.softmax.int or len(shape_of(node)) != 4 or node.args[1] not in (-1, 3):
        return False
    batch, *between, last = shape = shape_of(node)
    flat = insert(graph, node, _ATEN.reshape.default, node.args[0], [batch, math.prod(between), last])
    result = insert(graph, node, node.target, flat, -1, *node.args[2:])
    return replaced(graph, node, view(graph, node, result, shape))
