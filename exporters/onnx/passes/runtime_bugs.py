"""Write operations that ONNX Runtime has no int8 kernel for, or a wrong one, as ones that it has, value for value.

`subtractions` and `lone_softmaxes` work on uint8 activations and int32 biases, so they come after the functions of
`onnx_int8` that write these; `padded_maxima` is for files of every precision.
"""

from __future__ import annotations

import numpy

from lightning_edge.exporters.onnx.graph import Graph, attribute

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


def padded_maxima(graph: Graph) -> None:
    """Name the axes of a padding in front of MaxPool, which changes nothing but keeps ONNX Runtime from joining both.

    It makes zeros in front of a MaxPool that pool's own padding, which no maximum takes: where all of a window's values
    are negative, the zero at the border is lost (seen with 1.31, in BiT).
    """
    for node in graph.nodes:
        if node.op_type != "Pad" or (len(node.input) > 3 and node.input[3]):
            continue
        amounts = graph.constant(node.input[1])
        if amounts is not None and any(reader.op_type == "MaxPool" for reader in graph.readers[node.output[0]]):
            axes = graph.add_constant(numpy.arange(amounts.size // 2, dtype=numpy.int64))
            node.input[:] = [*node.input[:2], node.input[2] if len(node.input) > 2 else "", axes]
