"""Keep float layers float: put operations that change no value between them and the int8 around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from lightning_edge.exporters.passes.graph import operation
from lightning_edge.exporters.passes.precision import activation_bits, float_layers

_ATEN = torch.ops.aten
_PADS = {_ATEN.pad.default, _ATEN.constant_pad_nd.default}

Barrier = Callable[[fx.Graph, Any], fx.Node]
# An operation, and the input of it that gets a barrier.
_Places = Iterator[tuple[fx.Node, Any]]


def separate_float_layers(graph: fx.GraphModule) -> bool:
    """Put a barrier before each float layer of an int8 graph, and between activations of different width.

    Given: a layer with float weights that is fed a dequantized value, or a value that changes from 8 to 16 bits.

    Result: ``sign(x) * |x|`` between the two; `tflite.passes.simplify` takes it out of the file again.

    Why: LiteRT's converter quantizes a float layer by itself where int8 goes in and int8 comes out, and drops a change
    of width (litert-torch 0.10).
    """
    # A graph without quantized activations is a float one: nothing around its layers is int8.
    return bool(activation_bits(graph)) and _insert(graph, _float_inputs_and_width_changes(graph), sign_times_size)


def separate_float_paddings(graph: fx.GraphModule) -> bool:
    """Put a barrier between int8 and a padding that stays float.

    Given: a padding of a dequantized value, which something reads in float.

    Result: ``-(-x)`` in front of the padding.

    Why: XNNPACK's lowering quantizes such a padding, and then refuses the float layer behind it (executorch 1.4).
    """
    return _insert(graph, _float_paddings(graph), negated_twice)


def sign_times_size(graph: fx.Graph, source: Any) -> fx.Node:
    """Insert ``sign(x) * |x|``."""
    sign = graph.call_function(_ATEN.sign.default, (source,))
    return graph.call_function(_ATEN.mul.Tensor, (sign, graph.call_function(_ATEN.abs.default, (source,))))


def negated_twice(graph: fx.Graph, source: Any) -> fx.Node:
    """Insert ``-(-x)``."""
    return graph.call_function(_ATEN.neg.default, (graph.call_function(_ATEN.neg.default, (source,)),))


def _insert(graph: fx.GraphModule, places: _Places, barrier: Barrier) -> bool:
    found = list(places)
    for node, source in found:
        with graph.graph.inserting_before(node):
            node.replace_input_with(source, barrier(graph.graph, source))
    return bool(found)


def _float_inputs_and_width_changes(graph: fx.GraphModule) -> _Places:
    for layer in float_layers(graph):
        if not _is_barrier(layer.args[0]):
            yield layer, layer.args[0]
    for node in graph.graph.nodes:
        if node.target is _ATEN.einsum.default:  # what is constant in it is float
            yield from (
                (node, factor) for factor in node.args[1] if factor.op != "get_attr" and not _is_barrier(factor)
            )
        source = node.args[0] if node.args else None
        if operation(node) == "quantize_per_tensor" and isinstance(source, fx.Node):
            is_dequantized = operation(source) == "dequantize_per_tensor"
            if is_dequantized and source.args[5] != node.args[5]:
                yield node, source


def _is_barrier(node: Any) -> bool:
    """Whether a value comes from `sign_times_size`."""
    if node.target is not _ATEN.mul.Tensor or not all(isinstance(part, fx.Node) for part in node.args):
        return False
    return [operation(part) for part in node.args] == ["sign", "abs"]


def _float_paddings(graph: fx.GraphModule) -> _Places:
    for node in graph.graph.nodes:
        if node.target in _PADS and operation(node.args[0]) == "dequantize_per_tensor":
            readers = list(node.users)
            if not all(operation(reader) == "quantize_per_tensor" for reader in readers):
                yield node, node.args[0]
