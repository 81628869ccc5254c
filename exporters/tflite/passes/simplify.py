"""Take out of a TensorFlow Lite graph what computes nothing: layouts there and back, paddings, barriers, casts.

LiteRT's converter computes convolutions in NHWC and pads in PyTorch's NCHW, so that a padding by itself, as networks
that come from TensorFlow have in front of a convolution of stride 2, stands between two transposes. What is left has
the same values, bit by bit; only sums of a float mean are taken in another order.
"""

from __future__ import annotations

from typing import Any

from lightning_edge.exporters.tflite import edit as tflite_edit
from lightning_edge.exporters.tflite import graph as tflite_graph
from lightning_edge.exporters.tflite.graph import op_name, schema_module

_TO_NHWC, _TO_NCHW = [0, 2, 3, 1], [0, 3, 1, 2]
_CONVOLUTIONS = {"CONV_2D", "DEPTHWISE_CONV_2D"}


def simplify(model: Any) -> None:
    """Run `PASSES` on every graph of a ``ModelT``, and take out what nothing reads then."""
    for graph in model.subgraphs:
        for apply in PASSES:
            apply(model, graph)
    tflite_edit.drop_unread(model)


def join_signs(model: Any, graph: Any) -> None:
    """Take barriers out.

    Given: ``sign(x) * |x|``, which `float_barriers` put in to keep the converter from quantizing a float layer.

    Result: ``x``.

    Why: it has done what it is for.
    """
    makers, same = tflite_edit.makers(graph), {}
    for op in graph.operators:
        factors = [makers.get(int(index)) for index in op.inputs] if op_name(model, op) == "MUL" else []
        if [factor and op_name(model, factor) for factor in factors] == ["SIGN", "ABS"]:
            sources = {int(factor.inputs[0]) for factor in factors if factor is not None}
            if len(sources) == 1:
                same[int(op.outputs[0])] = sources.pop()
    tflite_edit.read_instead(model, graph, same)


def keep_pixels(model: Any, graph: Any) -> None:
    """Quantize pixels as they are.

    Given: a cast of uint8 to float, and a quantization in steps of 1.

    Result: one quantization from uint8 in steps of 1 to int8.

    Why: two operations over the whole image in float change no value.
    """
    schema = schema_module()
    makers, found = tflite_edit.makers(graph), False
    for op in graph.operators:
        cast = makers.get(int(op.inputs[0])) if op_name(model, op) == "QUANTIZE" else None
        if cast is None or op_name(model, cast) != "CAST":
            continue
        quantized = graph.tensors[int(op.outputs[0])].quantization
        if graph.tensors[int(cast.inputs[0])].type == schema.TensorType.UINT8 and (
            list(quantized.scale) == [1.0] and list(quantized.zeroPoint) == [-128]
        ):
            op.inputs, found = [cast.inputs[0]], True
    for tensor in graph.tensors if found else ():
        if tensor.type == schema.TensorType.UINT8:
            tensor.quantization = schema.QuantizationParametersT(scale=[1.0], zeroPoint=[0])


def transpose_before_padding(model: Any, graph: Any) -> None:
    """Transpose before padding.

    Given: a padding that transposes alone read.

    Result: a transpose, and a padding of its result.

    Why: `join_transposes` then finds the transpose in front of the padding, which undoes it.
    """
    schema = schema_module()
    makers, readers = tflite_edit.makers(graph), tflite_edit.readers(graph)
    operators = []
    for op in graph.operators:
        operators.append(op)
        order, pad = _order(model, graph, op), makers.get(int(op.inputs[0])) if len(op.inputs) else None
        if order is None or pad is None or op_name(model, pad) != "PAD":
            continue
        widths = tflite_edit.constant(model, graph, pad.inputs[1])
        others = readers[int(pad.outputs[0])]
        if widths is None or any(_order(model, graph, other) is None for other in others):
            continue
        source, padded = graph.tensors[int(pad.inputs[0])], int(op.outputs[0])
        moved = schema.TensorT(name=b"moved", shape=source.shape[order], type=source.type, hasRank=source.hasRank)
        moved.quantization = source.quantization
        graph.tensors.append(moved)
        op.inputs, op.outputs = [pad.inputs[0], op.inputs[1]], [len(graph.tensors) - 1]
        if op_name(model, op) == "RESHAPE":
            op.inputs[1] = tflite_edit.add_constant(model, graph, moved.shape)
            op.builtinOptions = schema.ReshapeOptionsT(newShape=moved.shape)
        again = schema.OperatorT(opcodeIndex=pad.opcodeIndex, outputs=[padded])
        again.builtinOptionsType, again.builtinOptions = pad.builtinOptionsType, pad.builtinOptions
        again.inputs = [op.outputs[0], tflite_edit.add_constant(model, graph, widths[order])]
        operators.append(again)
    graph.operators = operators


def join_transposes(model: Any, graph: Any) -> None:
    """Drop transposes that undo each other.

    Given: two transposes after each other that leave the axes as they were.

    Result: what the first one reads.

    Why: LiteRT's converter (litert-torch 0.10) puts one on each side of whatever it keeps in NCHW.
    """
    makers, same = tflite_edit.makers(graph), {}
    for op in graph.operators:
        first = makers.get(int(op.inputs[0])) if len(op.inputs) else None
        there, back = (None, None) if first is None else (_order(model, graph, first), _order(model, graph, op))
        if first is None or there is None or back is None:
            continue
        if [there[axis] for axis in back] == sorted(back):
            same[int(op.outputs[0])] = int(first.inputs[0])
    tflite_edit.read_instead(model, graph, same)


def average_before_transposing(model: Any, graph: Any) -> None:
    """Average without a transpose.

    Given: a mean that drops axes of something transposed, where the axes that are left keep their order.

    Result: a mean over these axes where they were before.

    Why: the transpose computes nothing that is read.
    """
    makers = tflite_edit.makers(graph)
    for op in graph.operators:
        first = makers.get(int(op.inputs[0])) if op_name(model, op) == "MEAN" else None
        order = None if first is None else _order(model, graph, first)
        axes = None if order is None else tflite_edit.constant(model, graph, op.inputs[1])
        if first is None or order is None or axes is None or op.builtinOptions.keepDims:
            continue
        before = [order[axis] for axis in axes]
        left = [axis for axis in order if axis not in before]
        if left == sorted(left):
            there = tflite_edit.add_constant(model, graph, sorted(before))
            op.inputs = [first.inputs[0], there]


def pad_with_zero(model: Any, graph: Any) -> None:
    """Pad with zeros.

    Given: PADV2 with the integer that stands for 0, as that of a max pool behind a ReLU: the least value is 0 there.

    Result: PAD.

    Why: LiteRT's delegate has PAD and no PADV2 (2.3).
    """
    for op in graph.operators:
        if op_name(model, op) != "PADV2":
            continue
        source, value, padded = (graph.tensors[int(index)] for index in (op.inputs[0], op.inputs[2], op.outputs[0]))
        if value.type != schema_module().TensorType.INT8 or not tflite_graph.length_bytes(model, value):
            continue
        (stored,) = bytes(model.buffers[value.buffer].data)
        if tflite_edit.same_scale(source, padded) and [stored] == [
            int(zero) % 256 for zero in source.quantization.zeroPoint
        ]:
            op.opcodeIndex, op.inputs = tflite_graph.op_code(model, "PAD"), op.inputs[:2]
            op.builtinOptionsType, op.builtinOptions = schema_module().BuiltinOptions.NONE, None


def pad_in_convolutions(model: Any, graph: Any) -> None:
    """Let convolutions pad by themselves.

    Given: a padding in front of a convolution, as wide as what the schema calls SAME.

    Result: the convolution with that.

    Why: it saves a copy of the image.
    """
    padding = schema_module().Padding
    makers = tflite_edit.makers(graph)
    for op in graph.operators:
        pad = makers.get(int(op.inputs[0])) if op_name(model, op) in _CONVOLUTIONS else None
        if pad is None or op_name(model, pad) != "PAD" or op.builtinOptions.padding != padding.VALID:
            continue
        widths = tflite_edit.constant(model, graph, pad.inputs[1])
        source, padded = (graph.tensors[int(index)] for index in (pad.inputs[0], pad.outputs[0]))
        if widths is None or not tflite_edit.same_scale(source, padded):
            continue
        kernel, options = graph.tensors[int(op.inputs[1])].shape[1:3], op.builtinOptions
        strides = (options.strideH, options.strideW)
        reaches = [
            (size - 1) * dilation + 1
            for size, dilation in zip(kernel, (options.dilationHFactor, options.dilationWFactor), strict=True)
        ]
        space = zip(source.shape[1:3], strides, reaches, strict=True)
        if widths.tolist() == [[0, 0], *(same_padding(*axis) for axis in space), [0, 0]]:
            options.padding = padding.SAME
            op.inputs = [pad.inputs[0], *op.inputs[1:]]


def same_padding(size: int, stride: int, reach: int) -> list[int]:
    """Give what SAME pads before and after: as many outputs as strides begin in the input, the odd one after."""
    total = max((-(-int(size) // stride) - 1) * stride + int(reach) - int(size), 0)
    return [total // 2, total - total // 2]


def _order(model: Any, graph: Any, op: Any) -> list[int] | None:
    """The order in which a transpose takes the axes of its input; ``None`` for another operation.

    A transpose of one channel moves no value, and the converter writes it as a RESHAPE.
    """
    name = op_name(model, op)
    if name == "TRANSPOSE":
        found = tflite_edit.constant(model, graph, op.inputs[1])
        return None if found is None else [int(axis) for axis in found]
    if name == "RESHAPE":
        before, after = (list(graph.tensors[int(index)].shape) for index in (op.inputs[0], op.outputs[0]))
        for order, channels in ((_TO_NHWC, 1), (_TO_NCHW, 3)):
            if len(before) == 4 and before[channels] == 1 and after == [before[axis] for axis in order]:
                return order
    return None


PASSES = (
    join_signs,  # barriers hide transposes from each other
    keep_pixels,  # so do casts
    transpose_before_padding,  # brings transposes next to each other
    join_transposes,
    average_before_transposing,  # of the transposes that are left
    pad_with_zero,  # gives paddings that a convolution may take in
    pad_in_convolutions,
)
