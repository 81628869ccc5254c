"""Attention masks in a captured graph: those that mask nothing go, those that mask stay float. Knows torch only.

A masked score is minus infinity, or as good as that, which no int8 range holds: the mask is added and the softmax taken
in float, between products whose ranges mean something.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lightning_edge.quantization.capture.nodes import depends_on_input

aten = torch.ops.aten

# Added to scores, it leaves nothing of them behind a softmax (Swin masks by -100); one int8 step of a range that holds
# it is a fifth of a score of 1.
_HUGE = 50.0
# What stands for minus infinity in a mask begins here.
_INFINITE = 1e4
# What stands for it where masks are written here: half precision has it as minus infinity.
_MASKED = -1e9

_SELECTING = {aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther}

_ARITHMETIC = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.mul.Tensor}
# How a mask is computed and brought to the shape of the scores.
_SHAPING = {
    *_ARITHMETIC,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.clone.default,
    aten.contiguous.default,
    aten.permute.default,
    aten.transpose.int,
    aten.repeat.default,
    aten.triu.default,
    aten.tril.default,
}


def masked_scores(graph: GraphModule) -> set[Node]:
    """Softmaxes over masked scores, and the operations that mask them: their ranges mean nothing.

    So are those that make the mask of an attention in one piece, which stays float itself.

    Args:
        graph: A captured graph.
    """
    found: set[Node] = set()
    for node in graph.graph.nodes:
        is_whole = node.target is aten.scaled_dot_product_attention.default
        if not is_whole and node.target not in (aten.softmax.int, aten._softmax.default):
            continue
        mask = _mask_of(node) if is_whole else node.args[0]
        trail, huge = [] if mask is None else [mask], is_whole
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
    if node.target in _SHAPING - _ARITHMETIC:  # its numbers are places and sizes
        return False
    return node.target in _SELECTING or any(isinstance(arg, int | float) and abs(arg) >= _HUGE for arg in node.args)


def _mask_of(attention: Node) -> Node | None:
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    return mask if isinstance(mask, Node) else None


def drop_idle_masks(graph: GraphModule) -> None:
    """Take attention masks away that mask nothing: no converter sees through how they are computed."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is not aten.scaled_dot_product_attention.default:
            continue
        mask = _mask_of(node)
        if mask is not None and mask.meta["val"].dtype == torch.bool and _masks_nothing(graph, mask):
            node.replace_input_with(mask, None)
    graph.graph.eliminate_dead_code()


def _masks_nothing(graph: GraphModule, mask: Node) -> bool:
    """Whether a Boolean mask is all True whatever the network is fed, as transformers makes it for encoders."""
    value = _computed(graph, mask)
    return value is not None and bool(value.all())


def added_mask(graph: GraphModule, mask: Node) -> Tensor | None:
    """Give what a mask of attention adds to the scores, where it does so to those of every input.

    Args:
        graph: A captured graph.
        mask: Boolean, or real numbers to add; of a shape that broadcasts to the scores.

    Returns:
        Real numbers; ``None`` for a mask that is computed from what the network is fed or from parameters, or one that
        leaves nothing of a row, for which the one operation gives 0 and a softmax does not.
    """
    value = _computed(graph, mask)
    if value is None:
        return None
    if value.dtype == torch.bool:
        value = torch.zeros(value.shape, device=value.device).masked_fill_(~value, _MASKED)
    added = value.clamp(min=_MASKED)
    return None if bool((added <= -_INFINITE).all(-1).any()) else added


def is_learnt_bias(mask: Node) -> bool:
    """Whether a mask is real numbers, to be added to the scores, that do not depend on what the network is fed."""
    return not depends_on_input(mask) and bool(mask.meta["val"].is_floating_point())


def causal_mask(queries: int, keys: int) -> Tensor:
    """Give what causal attention adds to the scores (queries, keys): the first query sees the first key alone."""
    return torch.zeros(queries, keys).masked_fill_(torch.ones(queries, keys).triu_(1).bool(), _MASKED)


def _computed(graph: GraphModule, result: Node) -> Tensor | None:
    """Compute a value that is the same whatever the network is fed and learns; ``None`` for another."""
    values: dict[Node, Any] = {}

    def value(node: Node) -> Any:
        if node in values:
            return values[node]
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(graph)
            if isinstance(values[node], nn.Parameter):
                raise LookupError(node.name)
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
            computed: Tensor = value(result)
    except LookupError:
        return None
    return computed
