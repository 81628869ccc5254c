"""Means as GlobalAveragePool, which has an int8 kernel in ONNX Runtime: ReduceMean has none."""

from __future__ import annotations

import math

import numpy
import onnx_ir as ir

from lightning_edge.exporters.onnx.graph import (
    add_constant,
    attribute,
    constant,
    make,
    maker,
    only_reader,
    operand,
    put_in_place,
    shape_of,
)

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_TO_IMAGE, _TO_ROWS = [0, 3, 1, 2], [0, 2, 3, 1]


def averages(graph: ir.Graph) -> None:
    """Average whole images by GlobalAveragePool.

    Given: ReduceMean over all dimensions from the third on.

    Result: GlobalAveragePool, and Flatten where the mean drops the dimensions.

    Why: ONNX Runtime 1.31 has an int8 kernel for GlobalAveragePool, and none for ReduceMean.
    """
    for node in graph:
        if not _is_mean_over(node, range(2, len(shape_of(operand(node, 0))))):
            continue
        added = [make("GlobalAveragePool", node.inputs[:1])]
        if not attribute(node, "keepdims", 1):
            quantize = only_reader(node.outputs[0], _QUANTIZE)
            if quantize is not None:  # between two of its own, or the pool is no int8 operation
                added.append(make(_QUANTIZE, [added[-1].outputs[0], *quantize.inputs[1:]]))
                added.append(make(_DEQUANTIZE, [added[-1].outputs[0], *quantize.inputs[1:]]))
            added.append(make("Flatten", added[-1].outputs))
        put_in_place(node, *added)


def averages_of_rows(graph: ir.Graph) -> None:
    """Average all rows of a sample by GlobalAveragePool.

    Given: a quantized ReduceMean over all dimensions between the first and the last.

    Result: GlobalAveragePool of an image with a channel for each feature, and the shape that the mean had.

    Why: ONNX Runtime 1.31 has an int8 kernel for GlobalAveragePool, and none for ReduceMean.
    """
    for node in graph:
        mean = maker(node.inputs[0], "ReduceMean") if node.op_type == _QUANTIZE else None
        up = None if mean is None else maker(mean.inputs[0], _DEQUANTIZE)
        if mean is None or up is None or only_reader(mean.outputs[0]) is None:
            continue
        sizes, result = shape_of(mean.inputs[0]), shape_of(mean.outputs[0])
        if not result or not _is_mean_over(mean, range(1, len(sizes) - 1)):
            continue
        rows = _reshape(graph, up.inputs[0], [-1, math.prod(sizes[1:-1]), 1, sizes[-1]])
        turned = make("Transpose", rows.outputs, perm=_TO_IMAGE)
        image = make(_DEQUANTIZE, [turned.outputs[0], *up.inputs[1:]])
        pool = make("GlobalAveragePool", image.outputs)
        down = make(_QUANTIZE, [pool.outputs[0], *node.inputs[1:]])
        back = make("Transpose", down.outputs, perm=_TO_ROWS)
        put_in_place(node, rows, turned, image, pool, down, back, _reshape(graph, back.outputs[0], [-1, *result[1:]]))


def _is_mean_over(node: ir.Node, dimensions: range) -> bool:
    """Whether an operation is a mean over just these dimensions, of which there are some."""
    axes = constant(operand(node, 1)) if node.op_type == "ReduceMean" else None
    rank = len(shape_of(node.inputs[0]))
    return axes is not None and rank > 2 and sorted(int(axis) % rank for axis in axes) == list(dimensions)


def _reshape(graph: ir.Graph, value: ir.Value | None, shape: list[int]) -> ir.Node:
    return make("Reshape", [value, add_constant(graph, numpy.array(shape, numpy.int64))])
