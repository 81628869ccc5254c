"""Write int8 transposed convolutions as convolutions, for runtimes without a kernel for them.

A transposed convolution of stride s gives s outputs for each input along an axis. Those at one remainder by s are sums
over the same few inputs: a convolution with every s-th weight, last first. All remainders together are a convolution
with s times the channels along each axis, which are then put side by side (Shi et al. 2016, arXiv:1609.07009), and what
the padding of a transposed convolution takes away is cut off. No value is computed otherwise.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, final

import torch
from torch import Tensor, fx

from lightning_edge.exporters.passes.graph import CLIPS, operation

_ATEN = torch.ops.aten
_TRANSPOSED = (_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input)


def convolve_transposed(
    graph: fx.GraphModule, wanted: Callable[[TransposedConvolution], bool] = lambda layer: True
) -> bool:
    """Write int8 transposed convolutions as convolutions.

    Given: a transposed convolution whose weight and result are int8.

    Result: a convolution with the channels of all remainders, and operations that put them side by side and crop them,
    each in the quantization of the result. Values are the same.

    Why: ONNX Runtime 1.31 has no int8 kernel for transposed convolutions, and LiteRT has one for some of them only.

    Args:
        graph: A converted graph.
        wanted: Which layers to rewrite.
    """
    layers = [TransposedConvolution(node) for node in graph.graph.nodes if node.target in _TRANSPOSED]
    found = [layer for layer in layers if layer.quantize is not None and layer.is_stored_in_int8 and wanted(layer)]
    for layer in found:
        _write(graph, layer)
    return bool(found)


@final
class TransposedConvolution:
    """One in a graph, with its arguments.

    Attributes:
        node: Where it is.
        weight: Its weight, of shape ``(in, out / groups, *kernel)``.
        bias: Its bias, or ``None``.
        stride: Of each axis, and so are ``padding``, ``output_padding`` and ``dilation``.
        groups: Of channels.
        quantize: The one quantization of what it gives, behind what only clips; ``None`` where it stays float.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.dimensions = 1 if node.target is _ATEN.conv_transpose1d.default else 2
        given: list[Any] = [*node.args, *[None] * (8 - len(node.args))]
        self.weight, self.bias = given[1:3]
        self.stride, self.padding, self.output_padding, self.dilation = (
            self._of_each_axis(given[place], default) for place, default in ((3, 1), (4, 0), (5, 0), (7, 1))
        )
        self.groups: int = given[6] or 1
        self.quantize = quantization_behind(node)

    def _of_each_axis(self, given: Any, default: int) -> list[int]:
        values = [given] if isinstance(given, int) else list(given or [default])
        return (values * self.dimensions)[: self.dimensions]

    @property
    def x(self) -> Any:
        """What it is fed, as of now: a layer in front of it may have been rewritten."""
        return self.node.args[0]

    @property
    def is_stored_in_int8(self) -> bool:
        """Whether its weight is one of integers, and its bias not computed from anything."""
        kinds = {self.stored.op, "get_attr" if self.bias is None else self.bias.op}
        return operation(self.weight).startswith("dequantize_") and kinds == {"get_attr"}

    @property
    def stored(self) -> Any:
        """Where its weight is stored, as floats or integers, in front of its quantization."""
        node = self.weight
        while node.op == "call_function":
            node = node.args[0]
        return node

    def kernel(self, graph: fx.GraphModule) -> list[int]:
        """Sizes of its kernel, dilated."""
        sizes = attrgetter(str(self.stored.target))(graph).shape[2:]
        return [(size - 1) * wide + 1 for size, wide in zip(sizes, self.dilation, strict=True)]


def quantization_behind(node: Any) -> Any | None:
    """The one quantization of what a layer gives, through what only clips; ``None`` where it stays float."""
    while len(node.users) == 1:
        (node,) = node.users
        if operation(node) == "quantize_per_tensor":
            return node
        if operation(node) not in CLIPS:
            return None
    return None


def move_behind(
    graph: fx.Graph, place: Any, quantize: Any | None, moves: Sequence[tuple[Any, tuple[Any, ...]]]
) -> None:
    """Let all that reads a value read what operations that only move values make of it, each quantized as it was.

    Args:
        graph: The graph.
        place: The value, behind its own quantization.
        quantize: That quantization; ``None`` of a float value.
        moves: The operations, with their arguments behind the value.
    """
    readers, result = list(place.users), place
    for target, args in moves:
        result = _behind(graph, result, target, (result, *args))
        if quantize is not None:
            result = _behind(graph, result, quantize.target, (result, *quantize.args[1:]))
            result = _behind(graph, result, place.target, (result, *place.args[1:]))
    for reader in readers:
        reader.replace_input_with(place, result)


def _behind(graph: fx.Graph, node: Any, target: Any, args: tuple[Any, ...]) -> fx.Node:
    with graph.inserting_after(node):
        return graph.call_function(target, args)


def _write(graph: fx.GraphModule, layer: TransposedConvolution) -> None:
    axes = list(zip(layer.kernel(graph), layer.stride, layer.padding, layer.output_padding, strict=True))
    # Output padding may reach behind the last weight.
    taps = [-(-max(size, size + more - cut) // step) for size, step, cut, more in axes]
    repeats = math.prod(layer.stride)
    with graph.graph.inserting_before(layer.node):
        weight = _weight(graph, layer, taps, repeats)
        bias = None if layer.bias is None else _repeated(graph, layer.bias, repeats)
        ones = [1] * layer.dimensions
        arguments = (layer.x, weight, bias, ones, [count - 1 for count in taps], ones, layer.groups)
        target = _ATEN.conv1d.default if layer.dimensions == 1 else _ATEN.conv2d.default
        convolution = graph.graph.call_function(target, arguments)
    moves = [
        *_side_by_side(layer, graph),
        *(
            (_ATEN.slice.Tensor, (axis, cut, -rest if rest else sys.maxsize))
            for axis, (count, (size, step, cut, more)) in enumerate(zip(taps, axes, strict=True), start=2)
            if (rest := count * step - size + cut - more) or cut
        ),
    ]
    assert layer.quantize is not None
    for place in list(layer.quantize.users):
        move_behind(graph.graph, place, layer.quantize, moves)
    layer.node.replace_all_uses_with(convolution)
    graph.graph.erase_node(layer.node)


def _side_by_side(layer: TransposedConvolution, graph: fx.GraphModule) -> list[tuple[Any, tuple[Any, ...]]]:
    """Put the channels of the remainders into their places along the axes."""
    stride = layer.stride
    if math.prod(stride) == 1:
        return []
    if layer.dimensions == 2 and len(set(stride)) == 1:
        return [(_ATEN.pixel_shuffle.default, (stride[0],))]
    channels = attrgetter(str(layer.stored.target))(graph).shape[1] * layer.groups
    order = [0, 1, 3, 2] if layer.dimensions == 1 else [0, 1, 4, 2, 5, 3]
    merged = [(_ATEN.flatten.using_ints, (axis, axis + 1)) for axis in range(2, 2 + layer.dimensions)]
    return [(_ATEN.unflatten.int, (1, [channels, *stride])), (_ATEN.permute.default, (order,)), *merged]


def _weight(graph: fx.GraphModule, layer: TransposedConvolution, taps: list[int], repeats: int) -> fx.Node:
    """Store the weight of the convolution, quantized as that of the layer is."""
    steps, node = [], layer.weight
    while node is not layer.stored:
        steps.append(node)
        node = node.args[0]
    values = _by_remainder(attrgetter(str(node.target))(graph).detach(), layer, taps)
    result = _constant(graph, values, layer.node)
    for step in reversed(steps):
        rest = list(step.args[1:])
        if operation(step).endswith("_per_channel"):
            rest[:2] = [_repeated(graph, given, repeats, layer.groups) for given in rest[:2]]
            rest[2] = 0  # their axis: output channels come first now
        result = graph.graph.call_function(step.target, (result, *rest), dict(step.kwargs))
    return result


def _by_remainder(values: Tensor, layer: TransposedConvolution, taps: list[int]) -> Tensor:
    """Order weights ``(in, out / groups, *kernel)`` as ``(out * remainders, in / groups, *taps)``."""
    inputs, outputs = values.shape[:2]
    spread = [count * step for count, step in zip(taps, layer.stride, strict=True)]
    filled = values.new_zeros(inputs, outputs, *spread)
    places = [slice(0, size * wide, wide) for size, wide in zip(values.shape[2:], layer.dilation, strict=True)]
    filled[(slice(None), slice(None), *places)] = values
    split = [size for pair in zip(taps, layer.stride, strict=True) for size in pair]
    grouped = filled.view(layer.groups, inputs // layer.groups, outputs, *split)
    along, remainders = ([start + 2 * axis for axis in range(layer.dimensions)] for start in (3, 4))
    ordered = grouped.flip(along).permute(0, 2, *remainders, 1, *along)
    return ordered.reshape(-1, inputs // layer.groups, *taps).contiguous()


def _repeated(graph: fx.GraphModule, given: Any, times: int, groups: int = 1) -> fx.Node:
    """Store a constant of each channel for each of its remainders, and of a group's channels for all groups."""
    values = attrgetter(str(given.target))(graph).detach()
    return _constant(graph, values.repeat_interleave(times).repeat(groups), given)


def _constant(graph: fx.GraphModule, values: Tensor, like: fx.Node) -> fx.Node:
    name = f"by_remainder_{like.name}"
    while hasattr(graph, name):
        name += "_"
    graph.register_buffer(name, values)
    return graph.graph.get_attr(name)
