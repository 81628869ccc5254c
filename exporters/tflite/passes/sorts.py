"""Write sorts by TOPK_V2, the one operation of LiteRT that sorts."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from lightning_edge.errors import require
from lightning_edge.exporters.passes.base import each_node
from lightning_edge.exporters.passes.graph import insert, replaced, shape_of

_ATEN = torch.ops.aten


@each_node
def sort_by_top_k(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Write sorts, and choices of the largest or smallest values, as LiteRT's ``TOPK_V2``.

    Given: ``topk``, ``sort`` or ``argsort`` along any dimension.

    Result: ``tfl.topk_v2``, of the negative value where the smallest come first, along the last dimension.

    Why: the converter (litert-torch 0.10) writes ``STABLEHLO_SORT``, which LiteRT does not have. ``TOPK_V2`` puts the
    first of equal values first, as a stable sort does.
    """
    wanted = _wanted(node)
    if wanted is None:
        return False
    count, dim, largest = wanted
    x = node.args[0]
    assert isinstance(x, fx.Node)
    last = len(shape_of(x)) - 1
    if not largest:
        x = _like(x, insert(graph, node, _ATEN.neg.default, x))
    if dim != last:
        x = _like(x, insert(graph, node, _ATEN.transpose.int, x, dim, last), (dim, last))
    require("litert_torch.backend.experimental.torch_tfl", "tflite")  # registers the operation
    both = insert(graph, node, torch.ops.tfl.topk_v2.default, x, count)
    for place, given in _given(node):
        result = insert(graph, given, operator.getitem, both, place)
        if place == 1:
            result = insert(graph, given, _ATEN._to_copy.default, result)
            result.kwargs = {"dtype": torch.int64}
        if dim != last:
            result = insert(graph, given, _ATEN.transpose.int, result, dim, last)
        if place == 0 and not largest:
            result = insert(graph, given, _ATEN.neg.default, result)
        replaced(graph, given, result)
    return True


def _wanted(node: fx.Node) -> tuple[int, int, bool] | None:
    """How many values along which dimension, and whether the largest come first; ``None`` for what sorts nothing."""
    target: Any = node.target
    if target not in (_ATEN.topk.default, _ATEN.sort.default, _ATEN.sort.stable, _ATEN.argsort.default):
        return None
    names = [argument.name for argument in target._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in target._schema.arguments}
    given = defaults | dict(zip(names, node.args, strict=False)) | node.kwargs
    shape = shape_of(node.args[0])
    if not shape:
        return None
    dim = int(given["dim"]) % len(shape)
    if target is _ATEN.topk.default:
        return int(given["k"]), dim, bool(given["largest"])
    return shape[dim], dim, bool(given["descending"])


def _given(node: fx.Node) -> list[tuple[int, fx.Node]]:
    """The values (0) and positions (1) that are read of a sort."""
    if node.target is _ATEN.argsort.default:
        return [(1, node)]
    return [(int(reader.args[1]), reader) for reader in list(node.users)]  # type: ignore[arg-type]


def _like(x: fx.Node, result: fx.Node, exchanged: tuple[int, int] = (0, 0)) -> fx.Node:
    """Give a result the type of a value, and its shape with two dimensions exchanged."""
    value = x.meta["val"]
    assert isinstance(value, Tensor)
    result.meta["val"] = value.transpose(*exchanged)
    return result
