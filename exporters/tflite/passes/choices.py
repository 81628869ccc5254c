"""Write choices by a condition (`where`, `masked_fill`, thresholds) in operations that LiteRT's converter has."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from lightning_edge.exporters.passes.base import each_node
from lightning_edge.exporters.passes.graph import constant, insert, replaced, shape_of

_ATEN = torch.ops.aten


@each_node
def choose_by_where(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Write choices between a value and a number as choices between values of as many dimensions.

    Given: ``threshold``, ``hardshrink``, ``masked_fill`` with a number, or ``where`` with a number or an operand of
    fewer dimensions than its result.

    Result: ``where`` of operands with as many dimensions as the result has, those of a number all 1.

    Why: LiteRT's converter keeps images in NHWC, and moves only operands of four dimensions there (litert-torch 0.10):
    of ``where`` in an int8 graph it moves one and not the other, and fails.
    """
    if node.target is _ATEN.threshold.default:
        x, limit, number = node.args
        return _chosen(graph, node, _low(graph, node, x, limit), _filled(graph, node, number), x)
    if node.target is _ATEN.hardshrink.default:
        x, limit = (*node.args, node.kwargs.get("lambd", 0.5))[:2]
        size = insert(graph, node, _ATEN.abs.default, x)
        return _chosen(graph, node, _low(graph, node, size, limit), _filled(graph, node, 0.0), x)
    if node.target is _ATEN.masked_fill.Scalar:
        x, mask, number = node.args
        return _chosen(graph, node, mask, _filled(graph, node, number), x)
    if node.target is _ATEN.where.ScalarOther:
        mask, x, number = node.args
        return _chosen(graph, node, mask, x, _filled(graph, node, number))
    if node.target is _ATEN.where.ScalarSelf:
        mask, number, x = node.args
        return _chosen(graph, node, mask, _filled(graph, node, number), x)
    dims = len(shape_of(node))
    if node.target is not _ATEN.where.self or all(_value(graph, operand).dim() == dims for operand in node.args):
        return False
    return _chosen(graph, node, *node.args)


def _chosen(graph: fx.GraphModule, node: fx.Node, *operands: Any) -> bool:
    spread = [_spread(graph, node, operand) for operand in operands]
    return replaced(graph, node, insert(graph, node, _ATEN.where.self, *spread))


def _low(graph: fx.GraphModule, node: fx.Node, x: Any, limit: Any) -> fx.Node:
    low = insert(graph, node, _ATEN.le.Scalar, x, limit)
    low.meta["val"] = torch.empty(shape_of(node), dtype=torch.bool, device="meta")
    return low


def _filled(graph: fx.GraphModule, node: fx.Node, number: Any) -> fx.Node:
    return constant(graph, node, "number", torch.full([1] * len(shape_of(node)), number), node)


def _spread(graph: fx.GraphModule, node: fx.Node, operand: Any) -> fx.Node:
    """Give an operand as many dimensions as the result has."""
    missing = len(shape_of(node)) - _value(graph, operand).dim()
    if not missing:
        return operand  # type: ignore[no-any-return]
    value = _value(graph, operand)
    wide = [1] * missing + list(value.shape)
    result = insert(graph, node, _ATEN.view.default, operand, wide)
    result.meta["val"] = torch.empty(wide, dtype=value.dtype, device="meta")
    return result


def _value(graph: fx.GraphModule, operand: Any) -> Tensor:
    """Give a value of the operand's shape and type; constants do not say theirs."""
    value = attrgetter(str(operand.target))(graph) if operand.op == "get_attr" else operand.meta["val"]
    assert isinstance(value, Tensor)
    return value
