"""Write operations that ONNX Runtime has no int8 kernel for, or a wrong one, as ones that it has, value for value.

They work on uint8 activations and int32 biases, so they come after the functions of `onnx_int8` that write these.
"""

from __future__ import annotations

from typing import Any

import numpy

from lightning_edge.exporters.onnx_graph import Array, Graph, attribute

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_LARGEST = 255


def subtractions(graph: Graph) -> None:
    """Write x - y as x + (-y): there is an int8 kernel for sums and none for differences.

    Of uint8 with step s and zero point z, 255 - q with the zero point 255 - z is the negative: nothing is rounded. A
    constant is stored so, of an activation it is its bits inverted.
    """
    nodes = []
    for node in graph.nodes:
        up = graph.maker(node.input[1], _DEQUANTIZE) if node.op_type == "Sub" else None
        zero = None if up is None or len(up.input) < 3 else graph.constant(up.input[2])
        if (
            up is not None
            and zero is not None
            and zero.dtype == numpy.uint8
            and graph.maker(node.input[0], _DEQUANTIZE) is not None
            and graph.only_reader(node.output[0], _QUANTIZE) is not None
        ):
            stored = graph.constant(up.input[0])
            if stored is None:
                inverted = graph.make("BitwiseNot", up.input[:1])
                nodes.append(inverted)
                negative = inverted.output[0]
            else:
                negative = graph.add_constant(_LARGEST - stored)
            back = graph.make(_DEQUANTIZE, [negative, up.input[1], graph.add_constant(_LARGEST - zero)])
            nodes += [back, graph.make("Add", [node.input[0], back.output[0]], node.output)]
        else:
            nodes.append(node)
    graph.settle(nodes)


def lone_softmaxes(graph: Graph) -> None:
    """Write the softmax of one value, which is 1, as a power of 0: ONNX Runtime's int8 kernel gives 0.

    MobileViT has it where a feature map is no larger than a patch.
    """
    shapes, nodes = graph.shapes(), []
    for node in graph.nodes:
        shape = shapes.get(node.input[0], ()) if node.op_type == "Softmax" else ()
        if shape and shape[attribute(node, "axis", -1)] == 1:
            zero = graph.add_constant(numpy.zeros((), numpy.float32))
            nodes.append(graph.make("Pow", [node.input[0], zero], node.output))
        else:
            nodes.append(node)
    graph.settle(nodes)


def transposed_convolutions(graph: Graph) -> None:
    """Write a transposed convolution of stride s as a convolution with s * s times the channels, and their shuffle.

    Of the outputs at one remainder by s, each is a sum over the same few inputs: a convolution with every s-th weight,
    last first. DepthToSpace puts the s * s of them in their places (Shi et al. 2016, arXiv:1609.07009), and what the
    padding of a transposed convolution takes away is cut off. Kernels whose size s does not divide are filled up with
    zeros.

    Raises:
        ValueError: For an int8 one that is dilated, has another stride over height than over width, or one dimension.
    """
    shapes = graph.shapes()
    nodes = []
    behind: dict[str, list[Any]] = {}
    for node in graph.nodes:
        size = shapes.get(node.output[0]) if node.op_type == "ConvTranspose" else None
        written = None if size is None else _as_convolution(graph, node, size)
        if written is not None:
            before, quantize, after = written
            nodes += before
            behind[quantize.output[0]] = after
        else:
            nodes += [node, *behind.get(node.output[0], ())]
    graph.settle(nodes)


def _as_convolution(graph: Graph, node: Any, size: tuple[int, ...]) -> tuple[list[Any], Any, list[Any]] | None:
    """Make a convolution that quantizes to what is then put in place: what comes before, the quantization, the rest."""
    weight = graph.maker(node.input[1], _DEQUANTIZE)
    quantize = graph.only_reader(node.output[0], _QUANTIZE)
    stored = None if weight is None else graph.constant(weight.input[0])
    stride, *others = attribute(node, "strides", [1])
    plain = attribute(node, "auto_pad", b"NOTSET") == b"NOTSET" and set(attribute(node, "dilations", [1])) == {1}
    if weight is None or quantize is None or stored is None:
        return None
    if stored.ndim != 4 or not plain or set(others) != {stride}:
        raise ValueError(
            "a transposed convolution in int8, for which ONNX Runtime has no kernel, can be written as a convolution "
            "only if it is one of images without dilation and with one stride for height and width. Keep it in float "
            "(skip=[...])"
        )
    groups = attribute(node, "group", 1)
    taps = [-(-extent // stride) for extent in stored.shape[2:]]
    kernel = _by_remainder(stored, groups, stride, taps)
    repeated = stride * stride
    parameters = [_repeat(graph, name, repeated) for name in weight.input[1:]]
    layer = [graph.make(_DEQUANTIZE, [graph.add_constant(kernel), *parameters], axis=0)]
    inputs = [node.input[0], layer[0].output[0]]
    bias = graph.maker(node.input[2], _DEQUANTIZE) if len(node.input) > 2 and node.input[2] else None
    if bias is not None:
        layer.append(graph.make(_DEQUANTIZE, [_repeat(graph, name, repeated) for name in bias.input], axis=0))
        inputs.append(layer[-1].output[0])
    edges = [count - 1 for count in taps]
    layer.append(graph.make("Conv", inputs, group=groups, pads=[*edges, *edges], strides=[1, 1], dilations=[1, 1]))
    starts = list(attribute(node, "pads", [0, 0, 0, 0]))[:2]
    ends = [start + length for start, length in zip(starts, size[2:], strict=True)]
    whole, quantized = quantize.output[0], graph.new_name()
    quantize.input[0], quantize.output[0] = layer[-1].output[0], quantized
    shuffled = graph.make("DepthToSpace", [quantized], blocksize=stride, mode="CRD")
    limits = [graph.add_constant(numpy.array(values, numpy.int64)) for values in (starts, ends, [2, 3])]
    return layer, quantize, [shuffled, graph.make("Slice", [shuffled.output[0], *limits], [whole])]


def _by_remainder(stored: Array, groups: int, stride: int, taps: list[int]) -> Array:
    """Order weights (in, out / groups, height, width) as (out * stride * stride, in / groups, taps, taps)."""
    inputs, outputs, height, width = stored.shape
    kernel = numpy.zeros((inputs, outputs, taps[0] * stride, taps[1] * stride), stored.dtype)
    kernel[:, :, :height, :width] = stored
    split = kernel.reshape(groups, inputs // groups, outputs, taps[0], stride, taps[1], stride)[..., ::-1, :, ::-1, :]
    # groups, out, remainders, in, taps
    return numpy.ascontiguousarray(split.transpose(0, 2, 4, 6, 1, 3, 5)).reshape(-1, inputs // groups, *taps)


def _repeat(graph: Graph, name: str, times: int) -> str:
    """Give each of an operation's constants, one a channel, that many times in a row; one for all stays."""
    values = graph.constant(name)
    assert values is not None
    return name if values.ndim == 0 else graph.add_constant(numpy.repeat(values, times))
