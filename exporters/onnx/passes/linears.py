"""Write what works on rows inside an int8 ONNX file in forms that ONNX Runtime is faster at: linear layers and means.

Its kernel of linear layers (QGemm) takes 1.2 to 1.7 times as long as that of convolutions for the same products and
sums. The rows become the pixels of one image, so that a batch stays one product of matrices; ONNX Runtime keeps images
with the channels innermost in memory, where an image of rows is the matrix that it was, and no value moves. No value
changes either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from lightning_edge.exporters.onnx.graph import Array, Graph, attribute, requantized, same_quantization

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_TO_IMAGE, _TO_ROWS = [0, 3, 1, 2], [0, 2, 3, 1]
# Layers of one row that follow each other: what they gain must be more than one operation at each end costs.
_LEAST_LAYERS = 3


@dataclass(frozen=True)
class _Linear:
    """A linear layer between quantized values.

    Attributes:
        node: The Gemm.
        data: What dequantizes its rows, (rows, features).
        weight: What dequantizes its weights.
        stored: Their integers, (filters, features).
        quantize: What quantizes its result.
        reshape: What makes rows of values of more dimensions for it, if anything does.
    """

    node: Any
    data: Any
    weight: Any
    stored: Array
    quantize: Any
    reshape: Any


def as_convolutions(graph: Graph) -> None:
    """Put convolutions in the place of linear layers of several rows, and of those that follow each other."""
    shapes = graph.shapes()
    found = [layer for node in graph.nodes if (layer := _linear(graph, node)) is not None]
    chosen = {layer.node.output[0]: layer for layer in _worth(found, shapes)}
    chosen = {name: layer for name, layer in chosen.items() if _weight_readers(graph, layer) <= chosen.keys()}
    kernels = {layer.weight.input[0]: layer.stored[:, :, None, None] for layer in chosen.values()}
    names = {name: graph.add_constant(kernel) for name, kernel in kernels.items()}
    images: dict[tuple[str, int], str] = {}  # by the quantized values and the features of a row
    nodes = []
    for node in graph.nodes:
        layer = chosen.get(node.output[0]) if node.op_type == "Gemm" else None
        if layer is not None:
            rows = (layer.data if layer.reshape is None else graph.maker(layer.reshape.input[0])).input[0]
            features = layer.stored.shape[1]
            if (rows, features) not in images:
                nodes += _to_image(graph, rows, [1, -1, 1, features])
                images[rows, features] = nodes[-1].output[0]
            up = graph.make(_DEQUANTIZE, [images[rows, features], *layer.data.input[1:]])
            layer.weight.input[0] = names.get(layer.weight.input[0], layer.weight.input[0])
            nodes += [up, graph.make("Conv", [up.output[0], *node.input[1:]], node.output)]
            continue
        nodes.append(node)
        layer = chosen.get(node.input[0]) if node.op_type == _QUANTIZE else None
        if layer is not None:
            rows, filters = node.output[0], layer.stored.shape[0]
            node.output[0] = images[rows, filters] = graph.new_name()
            nodes += _from_image(graph, node.output[0], [-1, filters], rows)
    graph.settle(nodes)
    _join_reshapes(graph)


def averages_of_rows(graph: Graph) -> None:
    """Write the mean of all rows of a sample as GlobalAveragePool, which has an int8 kernel: ReduceMean has none."""
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


def flattened_pixels(graph: Graph) -> None:
    """Move the channels of one pixel last before they become rows, which undoes a move of ONNX Runtime's own."""
    shapes, nodes = graph.shapes(), []
    for node in graph.nodes:
        nodes.append(node)
        flat = graph.maker(node.input[0], "Reshape", "Flatten") if node.op_type == _QUANTIZE else None
        up = None if flat is None else graph.maker(flat.input[0], _DEQUANTIZE)
        made = None if up is None else graph.maker(up.input[0], _QUANTIZE)
        if flat is None or made is None or graph.maker(made.input[0]) is None:
            continue
        image, rows = (shapes.get(name, ()) for name in (flat.input[0], flat.output[0]))
        if len(image) == len(_TO_ROWS) and image == (*rows, 1, 1) and same_quantization(graph, up, node):
            turned = graph.make("Transpose", made.output, perm=_TO_ROWS)
            nodes[-1:] = [turned, graph.make("Flatten", turned.output, node.output)]
    graph.settle(nodes)


def _linear(graph: Graph, node: Any) -> _Linear | None:
    """Describe a linear layer that may become a convolution."""
    plain = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}
    defaults = {**plain, "transB": 0}
    if node.op_type != "Gemm" or {name: attribute(node, name, defaults[name]) for name in plain} != plain:
        return None
    data, weight = (graph.maker(name, _DEQUANTIZE) for name in node.input[:2])
    quantize = graph.only_reader(node.output[0], _QUANTIZE)
    stored = None if weight is None else graph.constant(weight.input[0])
    if data is None or stored is None or quantize is None:
        return None
    return _Linear(node, data, weight, stored, quantize, requantized(graph, node.input[0], "Reshape"))


def _weight_readers(graph: Graph, layer: _Linear) -> set[str]:
    """The results of all that reads the weights of a layer, other layers among them."""
    dequantized = (node.output[0] for node in graph.readers[layer.weight.input[0]])
    return {reader.output[0] for name in dequantized for reader in graph.readers[name] or [graph.maker(name)]}


def _worth(layers: list[_Linear], shapes: Mapping[str, tuple[int, ...]]) -> list[_Linear]:
    """Those of several rows, which are reshaped anyway, and those that follow each other in numbers."""
    chains: dict[str, list[_Linear]] = {}  # by the result of each of its layers
    for layer in layers:
        chain = chains.get(layer.data.input[0], [])
        chain.append(layer)
        chains[layer.quantize.output[0]] = chain

    def has_rows(layer: _Linear) -> bool:
        values = () if layer.reshape is None else shapes.get(layer.reshape.input[0], ())
        features: int = layer.stored.shape[1]
        return math.prod(max(1, size) for size in values) > features  # -1 for a batch of any size

    return [layer for layer in layers if len(chains[layer.quantize.output[0]]) >= _LEAST_LAYERS or has_rows(layer)]


def _join_reshapes(graph: Graph) -> None:
    """Reshape an image right to the shape that is asked for, not to rows first."""
    nodes = []
    for node in graph.nodes:
        nodes.append(node)
        up = graph.maker(node.input[0], _DEQUANTIZE) if node.op_type == "Reshape" else None
        rows = None if up is None else graph.maker(up.input[0], "Reshape")
        shape = graph.constant(node.input[1]) if rows is not None else None
        if rows is not None and up is not None and shape is not None and shape.all():  # 0 is the size it has
            direct = graph.make(_DEQUANTIZE, [rows.input[0], *up.input[1:]])
            node.input[0] = direct.output[0]
            nodes[-1:] = [direct, node]
    graph.settle(nodes)
