"""Convolutions of int8 values as sums of integers: exact in float32 as well, and several times faster than in float64.

torch has no fast convolution in float64. A product of two int8 values is an integer, and float32 adds integers without
rounding as long as no partial sum passes 2^24, in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_edge.exporters.passes.base import each_node
from lightning_edge.exporters.passes.graph import operation

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
# Integers up to here are float32 values.
_LARGEST_SUM = 2**24
_HALF_BYTE = 16


@each_node
def convolve_integers(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Let a convolution sum its integers in float32, where that is exact.

    Given: ``conv2d(dequantize(x), dequantize(weight), bias)``, both int8, the weight a constant.
    Result: ``IntegerConvolution(x)``, in float64.
    Why: float64 convolutions took three quarters of the time that validating ResNet-8's files takes.

    Args:
        graph: A converted graph whose parameters are float64.
        node: Any node of it.

    Returns:
        Whether it was one.
    """
    if operation(node) not in _CONVOLUTIONS or node.kwargs:
        return False
    arguments: Any = node.args
    input, weight, *others = arguments
    if not isinstance(input, fx.Node) or operation(input) != "dequantize_per_tensor":
        return False
    if (levels := _levels(graph, weight)) is None:
        return False
    ends: Any = input.args
    quantized, scale, zero_point, lowest, highest, *_ = ends
    bias = others[0] if others else None
    integers, scales = levels
    parts = _exact_parts(integers, max(highest - zero_point, zero_point - lowest))
    if parts is None or not (bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")):
        return False
    stored = None if bias is None else _constant(graph, bias).double()
    target: Any = node.target
    layer = IntegerConvolution(target, tuple(others[1:]), zero_point, parts, scales * scale, stored)
    graph.add_submodule(f"integers_of_{node.name}", layer)
    with graph.graph.inserting_before(node):
        result = graph.graph.call_module(f"integers_of_{node.name}", (quantized,))
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)
    return True


class IntegerConvolution(nn.Module):
    """A convolution of int8 values with an int8 weight, in float64.

    Args:
        convolution: torch's operation.
        options: Its arguments behind the bias: stride, padding and so on.
        zero_point: Zero point of the input.
        parts: Weights of integers in float32, each with what its sums are multiplied with.
        scales: Scale of an output channel's sums, of shape ``(channels,)`` or ``(1,)``, float64.
        bias: float64, of shape ``(channels,)``; ``None`` for none.

    Attributes:
        parts: The same.
    """

    def __init__(
        self,
        convolution: Callable[..., Tensor],
        options: tuple[Any, ...],
        zero_point: int,
        parts: list[tuple[int, Tensor]],
        scales: Tensor,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self._convolution, self._options, self._zero_point = convolution, options, zero_point
        self.parts = parts
        ones = [1] * (parts[0][1].dim() - 2)
        self._scales = scales.view(-1, *ones)
        self._bias = None if bias is None else bias.view(-1, *ones)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: int8, of shape ``(N, channels, ...)`` or without ``N``.
        """
        levels = x.float().sub_(self._zero_point)
        first, *others = (self._sums(levels, weight).double().mul_(factor) for factor, weight in self.parts)
        for other in others:
            first += other
        result = first.mul_(self._scales)
        return result if self._bias is None else result.add_(self._bias)

    def _sums(self, levels: Tensor, weight: Tensor) -> Tensor:
        sums = self._convolution(levels, weight, None, *self._options)
        if torch.equal(sums, sums.round()):
            return sums
        # Not every kernel only adds products: Winograd's transforms, which torch takes on some ARM cores, divide too.
        return self._convolution(levels.double(), weight.double(), None, *self._options)


def _levels(graph: fx.GraphModule, weight: Any) -> tuple[Tensor, Tensor] | None:
    """The integers of a constant int8 weight less their zero points, and the scales of its output channels."""
    if not isinstance(weight, fx.Node) or operation(weight) not in ("dequantize_per_channel", "dequantize_per_tensor"):
        return None
    arguments: Any = weight.args
    stored, scale, zero_point, *rest = arguments
    if not isinstance(stored, fx.Node) or stored.op != "get_attr":
        return None
    levels = _constant(graph, stored)
    if operation(weight) == "dequantize_per_tensor":
        return levels.double() - zero_point, torch.tensor([scale], dtype=torch.float64)
    if rest[0] != 0:
        return None
    if zero_point is not None:
        levels = levels.double() - _constant(graph, zero_point).view(-1, *[1] * (levels.dim() - 1))
    return levels.double(), _constant(graph, scale).double()


def _exact_parts(weight: Tensor, largest_input: int) -> list[tuple[int, Tensor]] | None:
    """Split a weight of integers so that no sum of any part passes what float32 adds exactly; ``None`` if none does."""
    high = torch.round(weight / _HALF_BYTE)
    for parts in ([(1, weight)], [(_HALF_BYTE, high), (1, weight - high * _HALF_BYTE)]):
        if all(float(part.abs().flatten(1).sum(1).max()) * largest_input <= _LARGEST_SUM for _, part in parts):
            return [(factor, part.float()) for factor, part in parts]
    return None


def _constant(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    value: Tensor = attrgetter(str(node.target))(graph)
    return value.detach()
