"""Linear layers and biases in the forms that ONNX Runtime's int8 kernels take."""

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
    replace,
    shape_of,
)

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_LAYERS = ("Conv", "ConvTranspose", "Gemm")
# The largest bias in steps that float32 scales cannot push over the end of int32.
_LARGEST = float(numpy.iinfo(numpy.int32).max - 128)


def linears(graph: ir.Graph) -> None:
    """Write a linear layer of more than two dimensions on two.

    Given: MatMul of a dequantized value and a transposed, dequantized weight, and the Add of its bias if it has one, in
    front of a quantization.

    Result: Gemm between two views.

    Why: ONNX Runtime 1.31 has no int8 kernel for MatMul and Add together, and one for Gemm.
    """
    for node in graph:
        turned = maker(node.inputs[1], "Transpose") if node.op_type == "MatMul" else None
        weight = None if turned is None else maker(turned.inputs[0], _DEQUANTIZE)
        data = None if weight is None else maker(node.inputs[0], _DEQUANTIZE)
        if turned is None or weight is None or data is None or list(attribute(turned, "perm", [1, 0])) != [1, 0]:
            continue
        stored, shape = constant(weight.inputs[0]), shape_of(node.outputs[0])
        add = only_reader(node.outputs[0], "Add")
        bias = [] if add is None else [value for value in add.inputs if value is not node.outputs[0]]
        last = add or node
        quantize = only_reader(last.outputs[0], _QUANTIZE)
        if stored is None or stored.ndim != 2 or quantize is None or not shape:
            continue
        if add is not None and [getattr(constant(value), "shape", None) for value in bias] != [stored.shape[:1]]:
            continue
        rows = add_constant(graph, numpy.array([-1, stored.shape[1]], numpy.int64))
        flat = make("Reshape", [node.inputs[0], rows])
        down = make(_QUANTIZE, [flat.outputs[0], *data.inputs[1:]])
        up = make(_DEQUANTIZE, [down.outputs[0], *data.inputs[1:]])
        layer = make("Gemm", [up.outputs[0], turned.inputs[0], *bias], transB=1)
        out = make(_QUANTIZE, [layer.outputs[0], *quantize.inputs[1:]])
        back = make(_DEQUANTIZE, [out.outputs[0], *quantize.inputs[1:]])
        whole = make("Reshape", [back.outputs[0], add_constant(graph, numpy.array(shape, numpy.int64))])
        node.prepend([flat, down, up, layer, out, back, whole])
        replace(last.outputs[0], whole.outputs[0])


def integer_biases(graph: ir.Graph) -> None:
    """Store biases as integers.

    Given: the float bias of a layer whose input and weight are dequantized.

    Result: an int32 bias in steps of input scale times weight scale. Where it does not fit, as that of a channel whose
    weights are all but zero, the channel's weights get a larger step: they are too small beside the bias to matter.

    Why: ONNX Runtime's int8 kernels add biases so (1.31).
    """
    for node in graph:
        if node.op_type not in _LAYERS or operand(node, 2) is None:
            continue
        data, weight = (maker(value, _DEQUANTIZE) for value in node.inputs[:2])
        bias = constant(node.inputs[2])
        if data is None or weight is None or bias is None or bias.dtype != numpy.float32:
            continue
        step, scale, stored = constant(data.inputs[1]), constant(weight.inputs[1]), constant(weight.inputs[0])
        if step is None or scale is None or stored is None:
            continue
        if step.size == 1 and scale.size in (1, bias.size):
            wide = _larger_scale(bias, step, scale)
            if wide is not None:
                _store_weight(graph, node, weight, stored * _along_channels(scale / wide, weight, stored), wide)
            _store_bias(graph, node, bias, step * (scale if wide is None else wide))


def _larger_scale(bias: Array, step: Array, scale: Array) -> Array | None:
    """The scale of a weight that its bias fits in int32 with; ``None`` if it does with the scale that it has."""
    sizes = numpy.abs(bias.reshape(-1).astype(numpy.float64))
    steps = (step.reshape(-1) * scale.reshape(-1)).astype(numpy.float32)
    if (sizes <= _LARGEST * steps.astype(numpy.float64)).all():
        return None
    needed = sizes / (_LARGEST * float(step.item())) * 1.001
    wide = numpy.maximum(scale.reshape(-1).astype(numpy.float64), needed if scale.size > 1 else needed.max())
    return wide.astype(numpy.float32).reshape(scale.shape)


def _along_channels(values: Array, weight: ir.Node, stored: Array) -> Array:
    """One value for all of a weight, or one for each channel along its axis, in a shape to multiply the weight by."""
    axis = attribute(weight, "axis", 1)
    return values.reshape([-1 if place == axis else 1 for place in range(stored.ndim)] if values.size > 1 else [1])


def _store_weight(graph: ir.Graph, node: ir.Node, weight: ir.Node, values: Array, scale: Array) -> None:
    """Give a layer a weight of its own in another scale, of values in steps of it."""
    inputs = [add_constant(graph, numpy.rint(values).astype(numpy.int8)), add_constant(graph, scale)]
    own = make(_DEQUANTIZE, [*inputs, *weight.inputs[2:]], axis=attribute(weight, "axis", 1))
    node.prepend(own)
    node.replace_input_with(1, own.outputs[0])


def _store_bias(graph: ir.Graph, node: ir.Node, bias: Array, step: Array) -> None:
    """Give a layer a bias in int32 in steps of this size, one for all or one for each channel."""
    steps = step.reshape(() if step.size == 1 else -1).astype(numpy.float32)
    values = numpy.rint(bias.reshape(-1).astype(numpy.float64) / steps).astype(numpy.int32)
    stored = make(_DEQUANTIZE, [add_constant(graph, each) for each in (values.reshape(bias.shape), steps)], axis=0)
    node.prepend(stored)
    node.replace_input_with(2, stored.outputs[0])
