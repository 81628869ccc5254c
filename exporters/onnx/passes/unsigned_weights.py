"""Store weights as uint8, so that int8 sums are exact in every session: the option ``weights="uint8"``."""

from __future__ import annotations

import numpy
import onnx_ir as ir

from lightning_edge.exporters.onnx.graph import add_constant, constant, operand, raised


def unsigned_weights(graph: ir.Graph) -> None:
    """Write int8 weights as uint8, 128 higher, with that as their zero point.

    Given: DequantizeLinear of an int8 constant, with or without a zero point.

    Result: DequantizeLinear of a uint8 constant with a zero point for each scale; the same real values.

    Why: on x86 without VNNI, ONNX Runtime adds pairs of products of uint8 activations and int8 weights in 16 bits,
    which overflow in a default session (its documentation, "Quantize ONNX models", section "When and why do I need to
    try U8U8?"). Its kernels for uint8 weights do not.
    """
    stored: dict[ir.Value | None, ir.Value] = {}
    for node in graph:
        weight = constant(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        scale = None if weight is None else constant(node.inputs[1])
        if weight is None or scale is None or weight.dtype != numpy.int8:
            continue
        zero = constant(operand(node, 2))
        zero = numpy.zeros(scale.shape, numpy.int8) if zero is None else zero
        if node.inputs[0] not in stored:
            stored[node.inputs[0]] = add_constant(graph, raised(weight))
        node.replace_input_with(0, stored[node.inputs[0]])
        node.resize_inputs(3)
        node.replace_input_with(2, add_constant(graph, raised(zero)))
