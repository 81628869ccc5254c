"""Give images inside an int8 ONNX file the numbers of channels that ONNX Runtime's kernels take at a time.

Its kernels of convolutions read four channels at a time and make 16, that of depthwise ones 16; with any other number
slower ones take their place, two to three times as slow in the first layers of mobile networks. Here channels of zeros
make up for it: what makes them has weights of zero, what reads them too, and no other value changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy

from lightning_edge.exporters.onnx.graph import Array, Graph, attribute, set_attribute

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_IMAGE = 4  # dimensions
_READ_AT_A_TIME, _MADE_AT_A_TIME = 4, 16
# More than double the channels would cost what the kernel gains.
_MOST = 2
# Smaller images are done in a few microseconds either way, and larger weights are more bytes.
_LEAST_VALUES = 1024
# Operations that compute each channel by itself.
_BY_CHANNEL = frozenset(
    {
        _QUANTIZE,
        _DEQUANTIZE,
        "Add",
        "AveragePool",
        "BitwiseNot",
        "Clip",
        "GlobalAveragePool",
        "HardSigmoid",
        "LeakyRelu",
        "MaxPool",
        "Mul",
        "Relu",
        "Sigmoid",
        "Tanh",
    }
)


@dataclass
class _Region:
    """Values that have their channels in common, and the convolutions at their ends.

    Attributes:
        channels: How many.
        made: Convolutions that make such a value.
        read: Convolutions that read one.
        depthwise: Convolutions of each channel by itself.
        fixed: Whether something needs the channels as they are.
    """

    channels: int
    made: list[Any] = field(default_factory=list)
    read: list[Any] = field(default_factory=list)
    depthwise: list[Any] = field(default_factory=list)
    fixed: bool = False


def align(graph: Graph) -> None:
    """Add channels of zeros where a convolution is faster with them."""
    shapes = graph.shapes()
    for region in _regions(graph, shapes):
        more = -region.channels % _MADE_AT_A_TIME
        if region.fixed or not more or region.channels + more > _MOST * region.channels:
            continue
        # Of the convolutions over all channels only those that make less than the kernel does gain.
        narrow = region.made if region.channels < _MADE_AT_A_TIME else []
        gaining = [*region.depthwise, *(node for node in narrow if _overlaps(graph, node))]
        if not any(_is_large(node, shapes) for node in gaining):
            continue
        for node in (*region.made, *region.depthwise):
            _pad_made(graph, node, more)
        for node in region.depthwise:
            set_attribute(node, "group", region.channels + more)
        for node in region.read:
            _pad(graph, graph.maker(node.input[1]), 1, more)
    graph.settle()
    _align_inputs(graph, shapes)


def _align_inputs(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Put an operation that adds channels before a convolution that reads few, as the three colors of an image.

    Not where these come innermost: one more for each pixel takes longer there than the kernel gains.
    """
    nodes = []
    for node in graph.nodes:
        weight, data = weight_of(graph, node), graph.maker(node.input[0], _DEQUANTIZE)
        gains = weight is not None and _overlaps(graph, node) and _is_large(node, shapes)
        if weight is not None and data is not None and gains and not _comes_innermost(graph, data.input[0]):
            channels = weight.shape[1]
            more = -channels % _READ_AT_A_TIME
            zero = graph.constant(data.input[2]) if len(data.input) > 2 else None
            normalization = _normalization(graph, data)
            if more and normalization is not None:
                _pad_made(graph, normalization, more)
                _pad(graph, graph.maker(node.input[1]), 1, more)
            elif more and channels + more <= _MOST * channels and zero is not None and zero.size == 1:
                amounts = numpy.zeros((2, _IMAGE), numpy.int64)
                amounts[1, 1] = more
                constants = [graph.add_constant(array) for array in (amounts.reshape(-1), zero.reshape(()))]
                pad = graph.make("Pad", [data.input[0], *constants])
                up = graph.make(_DEQUANTIZE, [pad.output[0], *data.input[1:]])
                nodes += [pad, up]
                node.input[0] = up.output[0]
                _pad(graph, graph.maker(node.input[1]), 1, more)
        nodes.append(node)
    graph.settle(nodes)


def _normalization(graph: Graph, data: Any) -> Any:
    """The convolution over a few channels that alone makes what one other convolution reads, if there is one."""
    quantize = graph.maker(data.input[0], _QUANTIZE)
    made = None if quantize is None else graph.maker(quantize.input[0], "Conv")
    weight = None if made is None else weight_of(graph, made)
    alone = all(graph.only_reader(name) is not None for name in (data.input[0], data.output[0]))
    return made if weight is not None and weight.shape[0] == weight.shape[1] <= _READ_AT_A_TIME and alone else None


def _comes_innermost(graph: Graph, name: str) -> bool:
    """Whether an image is given to the file with its channels last."""
    quantize = graph.maker(name, _QUANTIZE)
    transpose = graph.maker(name if quantize is None else quantize.input[0], "Transpose")
    return transpose is not None and graph.maker(transpose.input[0]) is None


def _regions(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> list[_Region]:
    """Find the values that have their channels in common."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            name = above
        return name

    made: list[tuple[str, Any]] = []
    read: list[tuple[str, Any]] = []
    depthwise: list[tuple[str, Any]] = []
    fixed = [*graph.outputs, *(value.name for value in graph.proto.input)]
    for node in graph.nodes:
        operands = [name for name in node.input if name and _stored(graph, name) is None]
        if not operands:
            continue
        channels = {shapes[name][1] if len(shapes.get(name, ())) == _IMAGE else 0 for name in (*operands, *node.output)}
        result = node.output[0]
        if node.op_type == "Conv" and weight_of(graph, node) is not None and 0 not in channels:
            groups = attribute(node, "group", 1)
            if groups == 1:
                read.append((operands[0], node))
                made.append((result, node))
                continue
            if channels == {groups}:
                parent[find(operands[0])] = find(result)
                depthwise.append((result, node))
                continue
        elif node.op_type in _BY_CHANNEL and _is_for_all(graph, node) and len(channels) == 1 and 0 not in channels:
            for name in operands:
                parent[find(name)] = find(result)
            continue
        fixed += [*operands, *node.output]
    regions = {find(name): _Region(shapes[name][1]) for name, _ in (*made, *read, *depthwise)}
    for pairs, kind in ((made, "made"), (read, "read"), (depthwise, "depthwise")):
        for name, node in pairs:
            getattr(regions[find(name)], kind).append(node)
    for name in fixed:
        if find(name) in regions:
            regions[find(name)].fixed = True
    return list(regions.values())


def _stored(graph: Graph, name: str) -> Array | None:
    """The constant that an operand is or is dequantized from."""
    up = graph.maker(name, _DEQUANTIZE)
    return graph.constant(name if up is None else up.input[0])


def _is_for_all(graph: Graph, node: Any) -> bool:
    """Whether the constants among an operation's operands are single numbers, the same for every channel."""
    found = [_stored(graph, name) for name in node.input if name]
    return all(array.size == 1 for array in found if array is not None)


def weight_of(graph: Graph, node: Any) -> Array | None:
    """The integers of a convolution over images, if it alone reads them and they and its bias can be made more."""
    if node.op_type != "Conv":
        return None
    for name in node.input[1:]:
        up = graph.maker(name, _DEQUANTIZE)
        if up is None or graph.only_reader(name) is None or graph.only_reader(up.input[0]) is None:
            return None
        if any(graph.constant(other) is None for other in up.input):
            return None
    weight = _stored(graph, node.input[1])
    return weight if weight is not None and weight.ndim == _IMAGE else None


def _overlaps(graph: Graph, node: Any) -> bool:
    """Whether a convolution over all channels reads pixels more than once.

    Those that do not, such as those of single pixels and of patches, are products of matrices, which take any number of
    channels.
    """
    weight = weight_of(graph, node)
    if weight is None or attribute(node, "group", 1) != 1:
        return False
    sizes = weight.shape[2:]
    return any(step < size for step, size in zip(attribute(node, "strides", [1, 1]), sizes, strict=True))


def _is_large(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return int(numpy.prod(shapes[node.output[0]][1:])) >= _LEAST_VALUES


def _pad_made(graph: Graph, node: Any, more: int) -> None:
    """Add channels of zeros to what a convolution makes."""
    for name in node.input[1:]:
        _pad(graph, graph.maker(name), 0, more)


def _pad(graph: Graph, up: Any, axis: int, more: int) -> None:
    """Add zeros to a dequantized constant.

    Their steps are those of the last channel: the kernels want the step of a bias to be that of the input times that of
    the weights.
    """
    for position, name in enumerate(up.input):
        array = graph.constant(name)
        assert array is not None
        if position == 0:
            amounts = [(0, more if place == axis else 0) for place in range(array.ndim)]
            up.input[0] = graph.add_constant(numpy.pad(array, amounts))
        elif axis == 0 and array.size > 1:
            up.input[position] = graph.add_constant(numpy.pad(array, (0, more), mode="edge"))
