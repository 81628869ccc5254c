"""Reshape the result of an int8 sum or product instead of its operands, for LiteRT's converter."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_edge.exporters.passes.graph import operation, shape_of
from lightning_edge.exporters.passes.transposed_convolutions import move_behind, quantization_behind

_ATEN = torch.ops.aten
_JOINS = {_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor}
_RESHAPES = {"flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"}


def reshape_results(module: fx.GraphModule) -> bool:
    """Reshape results of sums and products instead of their operands.

    Given: a sum or product of two int8 operands of one scale that are reshaped alike, such as two parts of one value.

    Result: the operation on what the operands are reshaped from, and a view of its result, each with its own scale.

    Why: LiteRT's converter does the same, and gives the result the scale of the operands (litert-torch 0.10): the file
    computes something else, or is not made.
    """
    changed = False
    nodes: list[Any] = list(module.graph.nodes)
    for node in nodes:
        if node.target not in _JOINS:
            continue
        operands = [_made_of(operand) for operand in node.args]
        quantize = quantization_behind(node)
        if quantize is None or None in operands or not _alike(node.args, operands):
            continue
        for operand, source in dict(zip(node.args, operands, strict=True)).items():
            with module.graph.inserting_before(node):
                node.replace_input_with(operand, _whole(module.graph, operand, source))
        for place in list(quantize.users):
            move_behind(module.graph, place, quantize, [(_ATEN.view.default, (list(shape_of(node)),))])
        changed = True
    return changed


def _made_of(operand: Any) -> Any | None:
    """What an int8 value is reshaped from, or one of; ``None`` of others."""
    reshape = operand
    for expected in ("dequantize_per_tensor", "quantize_per_tensor"):
        if not isinstance(reshape, fx.Node) or operation(reshape) != expected:
            return None
        reshape = reshape.args[0]
    if operation(reshape) != "select" and operation(reshape) not in _RESHAPES:
        return None
    return reshape if shape_of(reshape.args[0]) else None


def _alike(operands: Any, reshapes: Any) -> bool:
    kinds = {(_whole_shape(reshape), shape_of(reshape)) for reshape in reshapes}
    scales = {operand.args[1:3] for operand in operands}
    return len(kinds) == 1 and len(scales) == 1


def _whole_shape(reshape: Any) -> tuple[int, ...]:
    shape = shape_of(reshape.args[0])
    if operation(reshape) != "select":
        return shape
    dim = reshape.args[1] % len(shape)
    return (*shape[:dim], 1, *shape[dim + 1 :])


def _whole(graph: fx.Graph, operand: Any, reshape: Any) -> Any:
    """Give what an operand is reshaped from, one of a dimension with that dimension."""
    source = reshape.args[0]
    if operation(reshape) != "select":
        return source
    dim = reshape.args[1] % len(shape_of(source))
    index = reshape.args[2] % shape_of(source)[dim]
    sliced = graph.call_function(_ATEN.slice.Tensor, (source, dim, index, index + 1))
    quantized = graph.call_function(operand.args[0].target, (sliced, *operand.args[0].args[1:]))
    return graph.call_function(operand.target, (quantized, *operand.args[1:]))
