"""Store the weights of a float ONNX graph in 8 bits, one scale a channel, and quantize activations on the fly.

Stored weights are written as integers, a Cast and a Mul, whose product ONNX Runtime computes once, when it loads the
file, as it does with whatever constants make. DequantizeLinear alone it keeps, for the patterns of its int8 kernels,
and runs at each call: MobileNetV2 took three times as long with it as in float.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy

from lightning_edge.errors import ExportError
from lightning_edge.exporters.onnx.graph import Array, Graph, attribute


def rewrite(model: Any, scheme: Literal["int8_weight_only", "int8_dynamic"]) -> None:
    """Give every layer with constant weights int8 ones, in place.

    Args:
        model: A ``ModelProto`` in float32.
        scheme: ``"int8_weight_only"`` has the weights as floats once the file is loaded; ``"int8_dynamic"`` finds the
            range of each linear layer's input when it runs (``DynamicQuantizeLinear``) and multiplies integers.
            Weights of convolutions are stored only: ONNX Runtime's ConvInteger took 2 to 8 times as long as Conv.

    Raises:
        ExportError: If ``"int8_dynamic"`` finds no linear layer.
    """
    graph = Graph(model)
    nodes: list[Any] = []
    found_linear = False
    for node in graph.nodes:
        weight = graph.constant(node.input[1]) if node.op_type in _CHANNELS and len(node.input) > 1 else None
        if weight is None or weight.dtype != numpy.float32 or weight.ndim < 2:
            nodes.append(node)
        elif scheme == "int8_dynamic" and _has_integer_form(node, weight):
            nodes += _on_the_fly(graph, node, weight)
            found_linear = True
        else:
            nodes += [*_stored(graph, node, weight), node]
    if scheme == "int8_dynamic" and not found_linear:
        raise ExportError(
            "onnx: scheme='int8_dynamic' left no weight in that form: this target has it for linear layers, and the "
            "network has none with fixed weights. Choose scheme='int8_weight_only', which takes as long as float here."
        )
    graph.settle(nodes)


_CHANNELS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def _channel_axis(node: Any, weight: Array) -> int:
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


def _stored(graph: Graph, node: Any, weight: Array) -> list[Any]:
    """Let a layer read its weights from integers, times the scale of each channel."""
    axis = _channel_axis(node, weight)
    values, scale = _quantized(weight, axis)
    shape = [1] * weight.ndim
    shape[axis] = -1
    wide = graph.make("Cast", [graph.add_constant(values)], to=1)
    scaled = graph.make("Mul", [*wide.output, graph.add_constant(scale.reshape(shape))])
    node.input[1] = scaled.output[0]
    return [wide, scaled]


def _has_integer_form(node: Any, weight: Array) -> bool:
    if node.op_type == "Gemm":
        plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
        return plain and not attribute(node, "transA", 0)
    return node.op_type == "MatMul" and weight.ndim == 2


def _on_the_fly(graph: Graph, node: Any, weight: Array) -> list[Any]:
    """Write a linear layer as integers times integers, scaled back, with its bias in float."""
    axis = _channel_axis(node, weight)
    values, scale = _quantized(weight, axis)
    if axis == 0:
        values = numpy.ascontiguousarray(values.T)
    quantize = graph.make("DynamicQuantizeLinear", [node.input[0]], [graph.new_name() for _ in range(3)])
    data, step, zero = quantize.output
    product = graph.make("MatMulInteger", [data, graph.add_constant(values), zero])
    wide = graph.make("Cast", product.output, to=1)
    steps = graph.make("Mul", [step, graph.add_constant(scale)])
    scaled = graph.make("Mul", [wide.output[0], steps.output[0]])
    made = [quantize, product, wide, steps, scaled]
    if len(node.input) > 2 and node.input[2]:
        made.append(graph.make("Add", [scaled.output[0], node.input[2]]))
    made[-1].output[0] = node.output[0]
    return made
