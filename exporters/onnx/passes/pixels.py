"""Normalize pixels in an int8 ONNX file in the forms whose kernels in ONNX Runtime are fast.

A file that takes pixels multiplies and shifts each of their colors, in a depthwise convolution of single pixels. Its
kernel takes as long as a small network behind it. Here it becomes one over all colors of several pixels, whose weights
are zero where one has nothing to do with another; no value changes.
"""

from __future__ import annotations

import numpy
import onnx_ir as ir

from lightning_edge.exporters.onnx.graph import (
    Array,
    add_constant,
    attribute,
    constant,
    make,
    maker,
    only_reader,
    operand,
    put_behind,
    read_instead,
    shape_of,
)

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# At most so many channels, what a kernel reads at a time; and so many pixels, to make as many as it makes at a time.
_FEW, _SEVERAL = 4, 4
_INNERMOST, _OUTERMOST = [0, 2, 3, 1], [0, 3, 1, 2]


def keep_integers(graph: ir.Graph) -> None:
    """Dequantize pixels as they are.

    Given: uint8 made float and quantized in steps of 1 from 0, with a transpose between at most.

    Result: the uint8 itself, transposed.

    Why: it is the same integer, and a cast to float and back is two operations over the whole image.
    """
    for node in graph:
        transpose = maker(node.inputs[0], "Transpose") if node.op_type == _QUANTIZE else None
        before = transpose or node
        cast = maker(before.inputs[0], "Cast") if node.op_type == _QUANTIZE else None
        source = None if cast is None else cast.inputs[0]
        if source is None or source.dtype != ir.DataType.UINT8 or constant(node.inputs[1]) != 1.0:
            continue
        zero = constant(operand(node, 2))
        if zero is None or zero.dtype != numpy.uint8 or zero != 0:
            continue
        if transpose is None:
            read_instead(node.outputs[0], source)
        elif only_reader(transpose.outputs[0]) is not None:
            transpose.replace_input_with(0, source)
            read_instead(node.outputs[0], transpose.outputs[0])


def join_colors(graph: ir.Graph) -> None:
    """Normalize all colors of a pixel together.

    Given: a depthwise convolution of single pixels with at most four channels: a factor for each.

    Result: a convolution over all of them, whose other weights are zero.

    Why: ONNX Runtime's kernel for the depthwise one takes as long as a small network behind it (1.31).
    """
    for node in graph:
        weight = _weight_of(node)
        if weight is None or weight.shape[1:] != (1, 1, 1) or not 1 < len(weight) <= _FEW:
            continue
        if attribute(node, "group", 1) == len(weight):
            together = numpy.zeros((len(weight), len(weight), 1, 1), weight.dtype)
            together[range(len(weight)), range(len(weight))] = weight[:, 0]
            _dequantization(node, 1).replace_input_with(0, add_constant(graph, together))
            node.attributes["group"] = ir.AttrInt64("group", 1)


def join_pixels(graph: ir.Graph) -> None:
    """Normalize four pixels together.

    Given: a quantized convolution of single pixels from at most four channels to at most four.

    Result: one over four pixels at a time, whose other weights are zero, and operations that move pixels to channels
    and back.

    Why: ONNX Runtime's kernels take as long for few channels as for sixteen (1.31).
    """
    for node in graph:
        weight = _weight_of(node)
        data, quantize = maker(operand(node, 0), _DEQUANTIZE), only_reader(node.outputs[0], _QUANTIZE)
        if weight is None or data is None or quantize is None or not _is_pixelwise(node, weight):
            continue
        height, width = shape_of(node.outputs[0])[2:]
        made, read = weight.shape[:2]
        if height * width % _SEVERAL or constant(data.inputs[0]) is not None:
            continue
        for position in range(1, len(node.inputs)):
            _repeat(graph, _dequantization(node, position), made)
        blocks = numpy.kron(numpy.eye(_SEVERAL, dtype=weight.dtype), weight[:, :, 0, 0])[:, :, None, None]
        _dequantization(node, 1).replace_input_with(0, add_constant(graph, blocks))
        joined = _viewed(graph, data.inputs[0], [0, height * width // _SEVERAL, 1, _SEVERAL * read])
        up = make(_DEQUANTIZE, [joined[-1].outputs[0], *data.inputs[1:]])
        node.prepend([*joined, up])
        node.replace_input_with(0, up.outputs[0])
        put_behind(quantize, *_viewed(graph, quantize.outputs[0], [0, height, width, made]))


def _is_pixelwise(node: ir.Node, weight: Array) -> bool:
    alone = attribute(node, "group", 1) == 1 and weight.shape[2:] == (1, 1) and max(weight.shape) <= _FEW
    return alone and not any(attribute(node, "pads") or []) and set(attribute(node, "strides") or [1]) == {1}


def _repeat(graph: ir.Graph, up: ir.Node, channels: int) -> None:
    """Repeat what a dequantized constant has of each channel for each of several pixels."""
    for position, value in enumerate(up.inputs):
        array = constant(value)
        assert array is not None
        if array.shape == (channels,):
            up.replace_input_with(position, add_constant(graph, numpy.tile(array, _SEVERAL)))


def _viewed(graph: ir.Graph, source: ir.Value | None, shape: list[int]) -> list[ir.Node]:
    """Give an image another shape, this one with its channels innermost, as which ONNX Runtime keeps it."""
    last = make("Transpose", [source], perm=_INNERMOST)
    view = make("Reshape", [last.outputs[0], add_constant(graph, numpy.array(shape))])
    return [last, view, make("Transpose", view.outputs, perm=_OUTERMOST)]


def _weight_of(node: ir.Node) -> Array | None:
    """The integers of a convolution over images, if it alone reads them and they and its bias can be made more."""
    if node.op_type != "Conv":
        return None
    for value in node.inputs[1:]:
        up = maker(value, _DEQUANTIZE)
        if value is None or up is None or up.inputs[0] is None:
            return None
        if only_reader(value) is None or only_reader(up.inputs[0]) is None:
            return None
        if any(constant(other) is None for other in up.inputs):
            return None
    weight = constant(_dequantization(node, 1).inputs[0])
    return weight if weight is not None and weight.ndim == 4 else None


def _dequantization(node: ir.Node, position: int) -> ir.Node:
    """What dequantizes an input of an operation."""
    found = maker(node.inputs[position], _DEQUANTIZE)
    assert found is not None
    return found
