"""Keep apart what converters would join: a layer that stays float from the int8 around it, 8 bits from 16 bits.

LiteRT's converter quantizes a float layer by itself where int8 goes in and int8 comes out, and drops a change from 8 to
16 bits or back. XNNPACK's lowering quantizes a float padding behind int8, and then refuses the float layer behind that.
An operation that changes no value, and that they do not see through, between the two keeps both as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from lightning_edge.exporters.passes.graph import graphs_in
from lightning_edge.exporters.passes.precision import float_layers

_ATEN = torch.ops.aten
_PADS = {_ATEN.pad.default, _ATEN.constant_pad_nd.default}

Barrier = Callable[[fx.Graph, Any], fx.Node]


def sign_times_size(graph: fx.Graph, source: Any) -> fx.Node:
    """Write ``sign(x) * |x|``; `tflite_simplify` takes it out of the file again."""
    sign = graph.call_function(_ATEN.sign.default, (source,))
    return graph.call_function(_ATEN.mul.Tensor, (sign, graph.call_function(_ATEN.abs.default, (source,))))


def negated_twice(graph: fx.Graph, source: Any) -> fx.Node:
    """Write ``-(-x)``."""
    return graph.call_function(_ATEN.neg.default, (graph.call_function(_ATEN.neg.default, (source,)),))


def apart_for_litert(network: nn.Module) -> nn.Module:
    """Put a barrier before each float layer, and between activations of different width; on a copy if there is any."""
    return _with_barriers(network, _float_inputs_and_width_changes, sign_times_size)


def apart_for_xnnpack(network: nn.Module) -> nn.Module:
    """Put a barrier between int8 and a padding that stays float; on a copy if there is any."""
    return _with_barriers(network, _float_paddings, negated_twice)


# An operation, and what it is fed that is to come through a barrier.
_Places = Iterator[tuple[fx.Node, Any]]


def _with_barriers(network: nn.Module, places: Callable[[fx.GraphModule], _Places], barrier: Barrier) -> nn.Module:
    if not any(True for graph in graphs_in(network) for _ in places(graph)):
        return network
    network = copy.deepcopy(network)
    for module in graphs_in(network):
        for node, source in list(places(module)):
            with module.graph.inserting_before(node):
                node.replace_input_with(source, barrier(module.graph, source))
        module.recompile()
    return network


def _float_inputs_and_width_changes(module: fx.GraphModule) -> _Places:
    for layer in float_layers(module):
        yield layer, layer.args[0]
    for node in module.graph.nodes:
        if node.target is _ATEN.einsum.default:  # what is constant in it is float
            yield from ((node, factor) for factor in node.args[1] if factor.op != "get_attr")
        source = node.args[0] if node.args else None
        if "dequantize_per_tensor" in str(getattr(source, "target", "")) and str(node.target).startswith(
            "quantized_decomposed.quantize_per_tensor"
        ):
            assert isinstance(source, fx.Node)
            if source.args[5] != node.args[5]:
                yield node, source


def _float_paddings(module: fx.GraphModule) -> _Places:
    for node in module.graph.nodes:
        if node.target in _PADS and "dequantize" in str(getattr(node.args[0], "target", "")):
            readers = list(node.users)
            if not all("quantize_per_tensor" in str(reader.target) for reader in readers):
                yield node, node.args[0]
