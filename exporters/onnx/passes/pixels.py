"""Normalize pixels in an int8 ONNX file in the forms whose kernels in ONNX Runtime are fast.

A file that takes pixels multiplies and shifts each of their colors, in a depthwise convolution of single pixels. Its
kernel takes as long as a small network behind it. Here it becomes one over all colors of several pixels, whose weights
are zero where one has nothing to do with another; no value changes.
"""

from __future__ import annotations

from typing import Any

import numpy

from lightning_edge.exporters.onnx.graph import Array, Graph, attribute, set_attribute

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# At most so many channels, what a kernel reads at a time; and so many pixels, to make as many as it makes at a time.
_FEW, _SEVERAL = 4, 4
_INNERMOST, _OUTERMOST = (0, 2, 3, 1), (0, 3, 1, 2)


def keep_integers(graph: Graph) -> None:
    """Dequantize pixels as they are: uint8 made float and quantized again in steps of 1 from 0 is the same integer."""
    types = graph.types()
    for node in graph.nodes:
        transpose = graph.maker(node.input[0], "Transpose") if node.op_type == _QUANTIZE else None
        before = node if transpose is None else transpose
        cast = graph.maker(before.input[0], "Cast") if node.op_type == _QUANTIZE else None
        source = None if cast is None else types.get(cast.input[0])
        if cast is None or source is None or source.elem_type != graph.uint8 or graph.constant(node.input[1]) != 1.0:
            continue
        zero = graph.constant(node.input[2])
        if zero is None or zero.dtype != numpy.uint8 or zero != 0:
            continue
        same = cast.input[0]
        if transpose is not None:
            if graph.only_reader(transpose.output[0]) is None:
                continue
            transpose.input[0], same = cast.input[0], transpose.output[0]
        for reader in graph.readers[node.output[0]]:
            reader.input[:] = [same if name == node.output[0] else name for name in reader.input]


def join_colors(graph: Graph) -> None:
    """Write a factor for each of a few channels, as pixels are normalized, as a convolution over all of them.

    As a depthwise one it takes as long as a small network behind it. The weights of zero add nothing.
    """
    for node in graph.nodes:
        weight = _weight_of(graph, node)
        if weight is None or weight.shape[1:] != (1, 1, 1) or not 1 < len(weight) <= _FEW:
            continue
        if attribute(node, "group", 1) == len(weight):
            together = numpy.zeros((len(weight), len(weight), 1, 1), weight.dtype)
            together[range(len(weight)), range(len(weight))] = weight[:, 0]
            graph.maker(node.input[1]).input[0] = graph.add_constant(together)
            set_attribute(node, "group", 1)
    graph.settle()


def join_pixels(graph: Graph) -> None:
    """Take several pixels as one with all their channels, where a convolution makes few of few for each by itself."""
    shapes, nodes, placed = graph.shapes(), [], set()
    for node in graph.nodes:
        if node.output[0] in placed:
            continue
        nodes.append(node)
        weight, data = _weight_of(graph, node), graph.maker(node.input[0], _DEQUANTIZE)
        quantize = graph.only_reader(node.output[0], _QUANTIZE)
        if weight is None or data is None or quantize is None or not _is_pixelwise(node, weight):
            continue
        height, width = shapes[node.output[0]][2:]
        made, read = weight.shape[:2]
        if height * width % _SEVERAL or graph.constant(data.input[0]) is not None:
            continue
        blocks = numpy.kron(numpy.eye(_SEVERAL, dtype=weight.dtype), weight[:, :, 0, 0])[:, :, None, None]
        for name in node.input[1:]:
            _repeat(graph, graph.maker(name), made)
        graph.maker(node.input[1]).input[0] = graph.add_constant(blocks)
        joined = _viewed(graph, data.input[0], [0, height * width // _SEVERAL, 1, _SEVERAL * read])
        up = graph.make(_DEQUANTIZE, [joined[-1].output[0], *data.input[1:]])
        node.input[0] = up.output[0]
        nodes[-1:] = [*joined, up, node]
        apart = _viewed(graph, graph.new_name(), [0, height, width, made])
        apart[-1].output[0], quantize.output[0] = quantize.output[0], apart[0].input[0]
        nodes += [quantize, *apart]
        placed.add(quantize.output[0])
    graph.settle(nodes)


def _is_pixelwise(node: Any, weight: Array) -> bool:
    alone = attribute(node, "group", 1) == 1 and weight.shape[2:] == (1, 1) and max(weight.shape) <= _FEW
    return alone and not any(attribute(node, "pads") or []) and set(attribute(node, "strides") or [1]) == {1}


def _repeat(graph: Graph, up: Any, channels: int) -> None:
    """Repeat what a dequantized constant has of each channel for each of several pixels."""
    for position, name in enumerate(up.input):
        array = graph.constant(name)
        assert array is not None
        if array.shape == (channels,):
            up.input[position] = graph.add_constant(numpy.tile(array, _SEVERAL))


def _viewed(graph: Graph, source: str, shape: list[int]) -> list[Any]:
    """Give an image another shape, this one with its channels innermost, as which ONNX Runtime keeps it."""
    last = graph.make("Transpose", [source], perm=_INNERMOST)
    view = graph.make("Reshape", [last.output[0], graph.add_constant(numpy.array(shape))])
    return [last, view, graph.make("Transpose", [view.output[0]], perm=_OUTERMOST)]


def _weight_of(graph: Graph, node: Any) -> Array | None:
    """The integers of a convolution over images, if it alone reads them and they and its bias can be made more."""
    if node.op_type != "Conv":
        return None
    for name in node.input[1:]:
        up = graph.maker(name, _DEQUANTIZE)
        if up is None or graph.only_reader(name) is None or graph.only_reader(up.input[0]) is None:
            return None
        if any(graph.constant(other) is None for other in up.input):
            return None
    weight = _stored(graph, node.input[1])
    return weight if weight is not None and weight.ndim == 4 else None


def _stored(graph: Graph, name: str) -> Array | None:
    """The constant that an operand is or is dequantized from."""
    up = graph.maker(name, _DEQUANTIZE)
    return graph.constant(name if up is None else up.input[0])
