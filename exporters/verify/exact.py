"""A converted network without rounding but its own: what int8 kernels compute, which sum integers.

A converted graph is dequantizations, float operations and quantizations. In float32 its sums depend on their order, and
so on the size of the batch; where a value lies between two integers, that tips it. On a MobileNetV2 such a value moved
outputs by up to 11 steps between a batch of 1 and one of 16, while LiteRT and ONNX Runtime lay 3 steps at most from
the same graph in float64, where products of int8 values and scales are as good as exact.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_edge.exporters.passes.graph import operation
from lightning_edge.exporters.verify.integer_convolutions import convolve_integers
from lightning_edge.network import Deployable


def exact(network: Deployable) -> Deployable:
    """Give an int8 network in float64, which takes and gives what it does; a float one as it is.

    Args:
        network: What is exported.
    """
    if network.precision != "int8" or not isinstance(network.graph, fx.GraphModule):
        return network
    graph = copy.deepcopy(network.graph).double()
    if convolve_integers(graph):
        graph.graph.eliminate_dead_code()
    for node in list(graph.graph.nodes):
        replaced = _REPLACED.get(operation(node))
        if node.op == "placeholder":
            _widen(graph, node)
        elif operation(node) == "quantize_per_tensor" and node.args[0].op == "placeholder":
            continue  # as a file does it: in float32
        elif replaced is not None:
            node.target, node.kwargs = replaced, {}
        else:
            node.args, node.kwargs = pytree.tree_map(_in_double, (node.args, {**_own_type(node), **node.kwargs}))
    graph.recompile()
    return network.with_graph(_Narrowing(graph))


class _Narrowing(nn.Module):
    """Gives float32 where a graph gives float64."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return pytree.tree_map_only(Tensor, _narrow, self.graph(*args, **kwargs))


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype is torch.float64 else tensor


def _widen(graph: fx.GraphModule, placeholder: fx.Node) -> None:
    """Let what is fed be read in float64, but for quantizations."""
    others = [reader for reader in placeholder.users if operation(reader) != "quantize_per_tensor"]
    if others:
        with graph.graph.inserting_after(placeholder):
            wide = graph.graph.call_function(_wide, (placeholder,))
        for reader in others:
            reader.replace_input_with(placeholder, wide)


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _own_type(node: fx.Node) -> dict[str, torch.dtype]:
    """The type of a float constant that is made in the graph, which may stand there by default only."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.all_input_nodes:
        return {}
    named = any(argument.name == "dtype" for argument in node.target._schema.arguments)
    value = node.meta.get("val")
    return {"dtype": value.dtype} if named and isinstance(value, Tensor) else {}


def _in_double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _quantize(x: Tensor, scale: float, zero_point: int, lowest: int, highest: int, dtype: torch.dtype) -> Tensor:
    # A quotient, since a product with 1 / scale would move exact halves.
    return (x / scale).round_().add_(zero_point).clamp_(lowest, highest).to(dtype)


def _dequantize(x: Tensor, scale: float, zero_point: int, *_: Any) -> Tensor:
    return x.double().sub_(zero_point).mul_(scale)


def _dequantize_channels(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, *_: Any) -> Tensor:
    shape = [1] * x.dim()
    shape[axis] = -1
    levels = x.double() if zero_point is None else x.double() - zero_point.view(shape)
    return levels * scale.view(shape)


_REPLACED = {
    "quantize_per_tensor": _quantize,
    "dequantize_per_tensor": _dequantize,
    "dequantize_per_channel": _dequantize_channels,
}
