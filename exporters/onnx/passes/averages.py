"""Means over the rows of a sample as GlobalAveragePool, which has an int8 kernel in ONNX Runtime."""

from __future__ import annotations

import math
from typing import Any

import numpy

from lightning_edge.exporters.onnx.graph import Graph

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_TO_IMAGE, _TO_ROWS = [0, 3, 1, 2], [0, 2, 3, 1]


def averages_of_rows(graph: Graph) -> None:
    """Average all rows of a sample by GlobalAveragePool.

    Given: a quantized ReduceMean over all dimensions between the first and the last.

    Result: GlobalAveragePool of an image with a channel for each feature, and the shape that the mean had.

    Why: ONNX Runtime 1.31 has an int8 kernel for GlobalAveragePool, and none for ReduceMean.
    """
    shapes, nodes = graph.shapes(), []
    for node in graph.nodes:
        nodes.append(node)
        mean = graph.maker(node.input[0], "ReduceMean") if node.op_type == _QUANTIZE else None
        up = None if mean is None else graph.maker(mean.input[0], _DEQUANTIZE)
        axes = None if mean is None or len(mean.input) < 2 else graph.constant(mean.input[1])
        if mean is None or up is None or axes is None or graph.only_reader(mean.output[0]) is None:
            continue
        sizes, result = (shapes.get(name, ()) for name in (mean.input[0], mean.output[0]))
        rank = len(sizes)
        if rank < 3 or not result or sorted(int(axis) % rank for axis in axes) != list(range(1, rank - 1)):
            continue
        nodes[-1:] = _to_image(graph, up.input[0], [-1, math.prod(sizes[1:-1]), 1, sizes[-1]])
        image = graph.make(_DEQUANTIZE, [nodes[-1].output[0], *up.input[1:]])
        pool = graph.make("GlobalAveragePool", image.output)
        down = graph.make(_QUANTIZE, [pool.output[0], *node.input[1:]])
        nodes += [image, pool, down, *_from_image(graph, down.output[0], [-1, *result[1:]], node.output[0])]
    graph.settle(nodes)


def _to_image(graph: Graph, values: str, shape: list[int]) -> list[Any]:
    """What makes an image of rows: of this shape with the channels last, whose last operation moves them."""
    reshape = graph.make("Reshape", [values, graph.add_constant(numpy.array(shape, numpy.int64))])
    return [reshape, graph.make("Transpose", reshape.output, perm=_TO_IMAGE)]


def _from_image(graph: Graph, image: str, shape: list[int], result: str) -> list[Any]:
    """What makes values of this shape of an image, with the channels last, under a name."""
    turned = graph.make("Transpose", [image], perm=_TO_ROWS)
    return [
        turned,
        graph.make("Reshape", [*turned.output, graph.add_constant(numpy.array(shape, numpy.int64))], [result]),
    ]
