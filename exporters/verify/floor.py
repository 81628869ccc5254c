"""The bytes that a network's values need by themselves, whatever format they are written in."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor, fx, nn

from lightning_edge.exporters.passes.graph import operation
from lightning_edge.network import Deployable

_FLOAT = 4
# Bytes of a weight in each scheme that gives weights a scale for each output channel.
_WEIGHT = {"int8_weight_only": 1.0, "int8_dynamic": 1.0, "int4_weight_only": 0.5, "int4_dynamic": 0.5}


def floor_bytes(network: Deployable, scheme: str | None = None, *, sparse: bool = False) -> int:
    """Count the bytes below which no file of a network can come without coding its values in fewer bits.

    int8: a byte for each weight, four for each bias (an int32) and each scale; zero points of weights are 0 and need
    none. Float: four bytes a parameter, one value a channel for a BatchNorm, which becomes the bias of its layer.
    In a scheme, weights in its width with a scale for each output channel; of a palette the indices and the table; of
    a sparse one the values that are not zero and one bit for each place.

    Args:
        network: What is exported.
        scheme: How a float network's weights are stored.
        sparse: Whether an int8 network's weights are stored without their zeros: a bit for each place, a byte for each
            that is not zero.
    """
    if isinstance(network.graph, fx.GraphModule):
        values = sum(_bytes_of(tensor, sparse) for tensor in _values(network.graph))
        return values + _FLOAT * _whole_scales(network.graph)
    total = 0.0
    seen: set[int] = set()
    for module in network.graph.modules():
        for name, parameter in module.named_parameters(recurse=False):
            folded = isinstance(module, nn.modules.batchnorm._BatchNorm) and name == "weight"
            if id(parameter) not in seen and not folded:
                total += _parameter_bytes(parameter, scheme)
            seen.add(id(parameter))
    return round(total)


def _parameter_bytes(parameter: Tensor, scheme: str | None) -> float:
    count = parameter.numel()
    if scheme == "fp16":
        return 2 * count
    if scheme is None or parameter.dim() < 2:
        return _FLOAT * count
    if scheme.startswith("palette"):
        bits = int(scheme.removeprefix("palette"))
        return count * bits / 8 + float(_FLOAT * min(1 << bits, count))
    if scheme == "sparse":
        return min(_FLOAT * count, _FLOAT * int(parameter.count_nonzero()) + count / 8)
    return _WEIGHT[scheme] * count + _FLOAT * parameter.shape[0]


def _values(graph: fx.GraphModule) -> list[Tensor]:
    """The distinct constants of a converted graph, but for zero points."""
    found: dict[str, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and not all(_is_zero_point(node, reader) for reader in node.users):
            found[node.target] = attrgetter(node.target)(graph)
    return list(found.values())


def _whole_scales(graph: fx.GraphModule) -> int:
    """How many constants have one scale for all, which is a number in the graph and none of its constants."""
    return len(
        {
            node.args[0]
            for node in graph.graph.nodes
            if operation(node) == "dequantize_per_tensor" and node.args[0].op == "get_attr"
        }
    )


def _is_zero_point(node: fx.Node, reader: fx.Node) -> bool:
    return "quantize_per_channel" in str(reader.target) and reader.args[2] is node


def _bytes_of(tensor: Tensor, sparse: bool) -> int:
    if sparse and not tensor.is_floating_point() and tensor.element_size() == 1:
        return min(tensor.numel(), int(tensor.count_nonzero()) + (tensor.numel() + 7) // 8)
    return tensor.numel() * (_FLOAT if tensor.is_floating_point() else tensor.element_size())
