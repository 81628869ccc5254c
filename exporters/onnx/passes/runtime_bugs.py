"""Replace operations that ONNX Runtime computes wrongly, or has no int8 kernel for, by ones of equal values."""

from __future__ import annotations

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
_LARGEST = 255


def subtractions(graph: ir.Graph) -> None:
    """Write x - y as x + (-y).

    Given: a quantized difference of two values in uint8.

    Result: a sum. Of uint8 with step s and zero point z, 255 - q with the zero point 255 - z is the negative: nothing
    is rounded. A constant is stored so; of an activation it is its bits inverted.

    Why: ONNX Runtime 1.31 has an int8 kernel for sums, and none for differences.
    """
    for node in graph:
        up = maker(node.inputs[1], _DEQUANTIZE) if node.op_type == "Sub" else None
        zero = None if up is None else constant(operand(up, 2))
        if up is None or zero is None or zero.dtype != numpy.uint8:
            continue
        if maker(node.inputs[0], _DEQUANTIZE) is None or only_reader(node.outputs[0], _QUANTIZE) is None:
            continue
        stored, added = constant(up.inputs[0]), []
        if stored is None:
            added.append(make("BitwiseNot", up.inputs[:1]))
            negative = added[0].outputs[0]
        else:
            negative = add_constant(graph, _LARGEST - stored)
        back = make(_DEQUANTIZE, [negative, up.inputs[1], add_constant(graph, _LARGEST - zero)])
        put_in_place(node, *added, back, make("Add", [node.inputs[0], back.outputs[0]]))


def lone_softmaxes(graph: ir.Graph) -> None:
    """Write the softmax of one value, which is 1, as a power of 0.

    Given: Softmax along a dimension of one, as MobileViT has it where a feature map is no larger than a patch.

    Result: Pow with the exponent 0.

    Why: ONNX Runtime's int8 kernel gives 0 (1.31).
    """
    for node in graph:
        shape = shape_of(node.inputs[0]) if node.op_type == "Softmax" else ()
        if shape and shape[attribute(node, "axis", -1)] == 1:
            put_in_place(node, make("Pow", [node.inputs[0], add_constant(graph, numpy.zeros((), numpy.float32))]))


def padded_maxima(graph: ir.Graph) -> None:
    """Name the axes of a padding in front of MaxPool.

    Given: Pad without axes that MaxPool reads, in a file of any precision.

    Result: the same with all axes named, which changes nothing.

    Why: ONNX Runtime makes zeros in front of a MaxPool that pool's own padding, which no maximum takes: where all of a
    window's values are negative, the zero at the border is lost (seen with 1.31, in BiT). It leaves this form alone.
    """
    for node in graph:
        if node.op_type != "Pad" or operand(node, 3) is not None:
            continue
        amounts = constant(node.inputs[1])
        if amounts is not None and any(reader.op_type == "MaxPool" for reader in node.outputs[0].consumers()):
            node.resize_inputs(4)
            node.replace_input_with(3, add_constant(graph, numpy.arange(amounts.size // 2, dtype=numpy.int64)))
