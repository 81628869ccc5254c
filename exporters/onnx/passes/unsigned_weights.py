"""Weights as uint8, so that sums are exact in every session: what the option ``weights="uint8"`` adds."""

from __future__ import annotations

import numpy

from lightning_edge.exporters.onnx.graph import Array, Graph


def unsigned_weights(graph: Graph) -> None:
    """Write int8 weights as uint8, 128 higher, with that as their zero point.

    Given: DequantizeLinear of an int8 constant, with or without a zero point.

    Result: DequantizeLinear of a uint8 constant with a zero point for each scale; the same real values.

    Why: on x86 without VNNI, ONNX Runtime adds pairs of products of uint8 activations and int8 weights in 16 bits,
    which overflow in a default session (its documentation, "Quantize ONNX models", section "When and why do I need to
    try U8U8?"). Its kernels for uint8 weights do not.
    """
    stored: dict[str, str] = {}
    for node in graph.nodes:
        weight = graph.constant(node.input[0]) if node.op_type == "DequantizeLinear" else None
        scale = None if weight is None else graph.constant(node.input[1])
        if weight is None or scale is None or weight.dtype != numpy.int8:
            continue
        zero = graph.constant(node.input[2]) if len(node.input) > 2 else None
        zero = numpy.zeros(scale.shape, numpy.int8) if zero is None else zero
        name = node.input[0]
        if name not in stored:
            stored[name] = graph.add_constant(_raised(weight))
        node.input[:] = [stored[name], node.input[1], graph.add_constant(_raised(zero))]


def _raised(values: Array) -> Array:
    return (values.astype(numpy.int16) + 128).astype(numpy.uint8)
