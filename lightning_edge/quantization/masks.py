"""Attention masks in a captured graph: those that mask nothing go, those that mask stay float. Knows torch only."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten

# What stands for minus infinity in a mask begins here; one int8 step of such a range is larger than any score.
_HUGE = 1e4

_SELECTING = {aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther}

# How a mask is computed and brought to the shape of the scores.
_SHAPING = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.to.dtype,
    aten.clone.default,
    aten.triu.default,
    aten.tril.default,
}


def masked_scores(graph: GraphModule) -> set[Node]:
    """Softmaxes over masked scores, and the operations that mask them: their ranges mean nothing.

    Args:
        graph: A captured graph.
    """
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if node.target not in (aten.softmax.int, aten._softmax.default):
            continue
        trail, huge = [node.args[0]], False
        for value in trail:  # grows while it is walked
            huge = huge or _brings_huge_values(graph, value)
            if value.target in _SELECTING or value.target in _SHAPING:
                trail.extend(parent for parent in value.all_input_nodes if parent not in trail)
        if huge:
            found |= {node, *(value for value in trail if value.target in _SELECTING or value.target in _SHAPING)}
    return found


def _brings_huge_values(graph: GraphModule, node: Node) -> bool:
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(graph)
        return value.is_floating_point() and value.numel() > 0 and float(value.detach().abs().max()) >= _HUGE
    return node.target in _SELECTING or any(isinstance(arg, int | float) and abs(arg) >= _HUGE for arg in node.args)


def drop_idle_masks(graph: GraphModule) -> None:
    """Take attention masks away that mask nothing: no converter sees through how they are computed."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is not aten.scaled_dot_product_attention.default:
            continue
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if isinstance(mask, Node) and mask.meta["val"].dtype == torch.bool and _masks_nothing(graph, mask):
            node.replace_input_with(mask, None)
    graph.graph.eliminate_dead_code()


def _masks_nothing(graph: GraphModule, mask: Node) -> bool:
    """Whether a Boolean mask is all True whatever the network is fed, as transformers makes it for encoders."""
    values: dict[Node, Any] = {}

    def value(node: Node) -> Any:
        if node in values:
            return values[node]
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(graph)
        elif node.target is aten.sym_size.int and node.args[1] == 0:
            values[node] = 1  # the batch: what holds for one sample holds for all, or it would depend on the input
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            raise LookupError(node.name)
        return values[node]

    try:
        with torch.no_grad():
            return bool(value(mask).all())
    except LookupError:
        return False
