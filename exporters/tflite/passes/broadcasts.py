"""Write expansions and repetitions of images and heads in other operations, for LiteRT's converter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from lightning_edge.exporters.passes.graph import operation, shape_of

_ATEN = torch.ops.aten
_EXPANSIONS = {_ATEN.expand.default, _ATEN.expand_as.default}
_REPETITIONS = {_ATEN.repeat.default, _ATEN.tile.default}
_SPREADING = {
    _ATEN.add.Tensor,
    _ATEN.sub.Tensor,
    _ATEN.mul.Tensor,
    _ATEN.div.Tensor,
    _ATEN.maximum.default,
    _ATEN.minimum.default,
}
_QUANTIZERS = {"quantize_per_tensor", "dequantize_per_tensor"}


def drop_expansions(module: fx.GraphModule) -> bool:
    """Drop expansions and repetitions of values with four or five dimensions.

    Given: ``expand`` or ``repeat`` of such a value, or attention with fewer heads of keys than of queries.

    Result: what reads the value broadcasts it, as sums and products do, or reads as many copies of it joined.

    Why: LiteRT's converter keeps images in NHWC, and mixes up the axes of an expansion or repetition there
    (litert-torch 0.10): the file computes something else, or is not made.
    """
    changed = False
    for node in list(module.graph.nodes):
        shape = shape_of(node)
        if node.target is _ATEN.scaled_dot_product_attention.default and node.kwargs.get("enable_gqa"):
            _join_heads(module.graph, node)
            changed = True
        if node.target not in (*_EXPANSIONS, *_REPETITIONS) or len(shape) not in (4, 5):
            continue
        source = node.args[0]
        times = [size // before for size, before in zip(shape, shape_of(source), strict=False)]
        if len(times) < len(shape) or not math.prod(shape_of(source)):
            continue
        if node.target in _EXPANSIONS and all(_spreads(reader, via, source) for reader, via in _readers(node)):
            result = source
            _pass_on(node, source)
        else:
            result = _joined(module.graph, node, source, times)
        node.replace_all_uses_with(result)
        module.graph.erase_node(node)
        changed = True
    return changed


def _join_heads(graph: fx.Graph, attention: Any) -> None:
    """Give attention a head of keys and values for each head of queries: neighbours share one (Ainslie et al. 2023)."""
    heads = shape_of(attention.args[0])[1]
    with graph.inserting_before(attention):
        for place in (1, 2):
            source = attention.args[place]
            times = heads // shape_of(source)[1]
            column = graph.call_function(_ATEN.unsqueeze.default, (source, 2))
            joined = graph.call_function(_ATEN.cat.default, ([column] * times, 2))
            attention.update_arg(place, graph.call_function(_ATEN.flatten.using_ints, (joined, 1, 2)))
    attention.kwargs = {name: value for name, value in attention.kwargs.items() if name != "enable_gqa"}


def _pass_on(node: Any, source: Any) -> None:
    """Let what reads a value behind its quantization read the quantized value that it is made from."""
    for quantize in node.users:
        for dequantize in quantize.users if operation(quantize) in _QUANTIZERS else ():
            if str(source.target) == str(dequantize.target) and source.args[1:] == dequantize.args[1:]:
                dequantize.replace_all_uses_with(source)


def _joined(graph: fx.Graph, node: Any, source: Any, times: list[int]) -> Any:
    with graph.inserting_before(node):
        for dim, count in enumerate(times):
            if count > 1:
                source = graph.call_function(_ATEN.cat.default, ([source] * count, dim))
    return source


def _readers(node: Any) -> list[tuple[Any, Any]]:
    """What reads a value, through what quantizes it, and by which node."""
    found = []
    for user in node.users:
        if operation(user) in _QUANTIZERS:
            found.extend(_readers(user))
        else:
            found.append((user, node))
    return found


def _spreads(reader: Any, via: Any, source: Any) -> bool:
    """Whether a reader gives the same with the value as it is before it is spread."""
    if reader.target not in _SPREADING:
        return False
    shapes = [shape_of(source) if arg is via else shape_of(arg) for arg in reader.args[:2] if isinstance(arg, fx.Node)]
    return tuple(torch.broadcast_shapes(*shapes)) == shape_of(reader)
