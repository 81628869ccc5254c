"""Store the weights of a float ONNX graph in 8 bits, one scale a channel, and quantize activations on the fly.

Stored weights are written as integers, a Cast and a Mul, whose product ONNX Runtime computes once, when it loads the
file, as it does with whatever constants make. DequantizeLinear alone it keeps, for the patterns of its int8 kernels,
and runs at each call: MobileNetV2 took three times as long with it as in float.
"""

from __future__ import annotations

from typing import Literal

import numpy
import onnx_ir as ir

from lightning_edge.errors import ExportError
from lightning_edge.exporters.onnx.graph import Array, add_constant, attribute, constant, make, operand, put_in_place

_CHANNELS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def store_in_int8(graph: ir.Graph, scheme: Literal["int8_weight_only", "int8_dynamic"]) -> None:
    """Give every layer with constant weights int8 ones, in place.

    Args:
        graph: The graph of a float32 model.
        scheme: ``"int8_weight_only"`` has the weights as floats once the file is loaded; ``"int8_dynamic"`` finds the
            range of each linear layer's input when it runs (``DynamicQuantizeLinear``) and multiplies integers.
            Weights of convolutions are stored only: ONNX Runtime's ConvInteger took 2 to 8 times as long as Conv.

    Raises:
        ExportError: If ``"int8_dynamic"`` finds no linear layer.
    """
    found_linear = False
    for node in graph:
        weight = constant(operand(node, 1)) if node.op_type in _CHANNELS else None
        if weight is None or weight.dtype != numpy.float32 or weight.ndim < 2:
            continue
        if scheme == "int8_dynamic" and _has_integer_form(node, weight):
            _multiply_integers(graph, node, weight)
            found_linear = True
        else:
            _store(graph, node, weight)
    if scheme == "int8_dynamic" and not found_linear:
        raise ExportError(
            "onnx: scheme='int8_dynamic' left no weight in that form: this target has it for linear layers, and the "
            "network has none with fixed weights. Choose scheme='int8_weight_only', which takes as long as float here."
        )


def _channel_axis(node: ir.Node, weight: Array) -> int:
    """Where the output channels of a weight are; those of a transposed convolution lie in groups and share a scale."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return weight.ndim - 1


def _quantized(weight: Array, axis: int) -> tuple[Array, Array]:
    """Round to -127..127 by the largest value of each channel; a channel of zeros keeps a scale of one."""
    others = tuple(position for position in range(weight.ndim) if position != axis)
    largest = numpy.abs(weight).max(axis=others, keepdims=True)
    scale = numpy.where(largest > 0, largest / 127, 1).astype(numpy.float32)
    values = numpy.clip(numpy.rint(weight / scale), -127, 127).astype(numpy.int8)
    return values, scale.reshape(-1)


def _store(graph: ir.Graph, node: ir.Node, weight: Array) -> None:
    """Let a layer read its weights from integers, times the scale of each channel."""
    axis = _channel_axis(node, weight)
    values, scale = _quantized(weight, axis)
    shape = [1] * weight.ndim
    shape[axis] = -1
    wide = make("Cast", [add_constant(graph, values)], to=ir.DataType.FLOAT)
    scaled = make("Mul", [wide.outputs[0], add_constant(graph, scale.reshape(shape))])
    node.prepend([wide, scaled])
    node.replace_input_with(1, scaled.outputs[0])


def _has_integer_form(node: ir.Node, weight: Array) -> bool:
    if node.op_type == "Gemm":
        plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
        return plain and not attribute(node, "transA", 0)
    return node.op_type == "MatMul" and weight.ndim == 2


def _multiply_integers(graph: ir.Graph, node: ir.Node, weight: Array) -> None:
    """Write a linear layer as integers times integers, scaled back, with its bias in float."""
    axis = _channel_axis(node, weight)
    values, scale = _quantized(weight, axis)
    if axis == 0:
        values = numpy.ascontiguousarray(values.T)
    quantize = make("DynamicQuantizeLinear", node.inputs[:1], outputs=3)
    data, step, zero = quantize.outputs
    product = make("MatMulInteger", [data, add_constant(graph, values), zero])
    wide = make("Cast", product.outputs, to=ir.DataType.FLOAT)
    steps = make("Mul", [step, add_constant(graph, scale)])
    made = [quantize, product, wide, steps, make("Mul", [wide.outputs[0], steps.outputs[0]])]
    if operand(node, 2) is not None:
        made.append(make("Add", [made[-1].outputs[0], node.inputs[2]]))
    put_in_place(node, *made)
