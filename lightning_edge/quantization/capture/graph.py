"""The network as one graph of ATen operations, in eval mode, ready for quantizers.

What is taken out and kept beside the graph: dropout, which goes back in behind the quantizers, and BatchNorm, which
becomes part of the weights of the layer before it. Activations are written out, see `decompose`. Knows torch only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.quantization.capture.decompose import decompose
from lightning_edge.quantization.capture.exported import two_samples
from lightning_edge.quantization.capture.in_place import make_functional
from lightning_edge.quantization.capture.masks import drop_idle_masks
from lightning_edge.quantization.capture.nodes import DROPOUTS, SCALED, call, constant, depends_on_input
from lightning_edge.quantization.capture.recurrent import write_out_recurrent
from lightning_edge.quantization.capture.regularizers import Regularizer, as_dropouts, find_regularizers
from lightning_edge.quantization.capture.train_eval_graph import capture_modes
from lightning_edge.quantization.plan import Plan

aten = torch.ops.aten

# Operations with a weight that a BatchNorm behind them can go into -> axis of the weight's output channels.
_FOLDABLE: dict[Any, int] = {
    aten.conv1d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.default: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.default: 0,
    aten.conv3d.padding: 0,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
    aten.linear.default: 0,
}


@dataclass(frozen=True)
class TakenOut:
    """A dropout or detach, which changes no value in evaluation, taken out of the graph.

    Attributes:
        source: Name of the node it read.
        readers: Names of the nodes that read it, directly or through others that were taken out.
        operator: The operation, or the `Regularizer` that the dropout stands for.
        probability: The dropout's own; ``None`` for a detach.
        owner: Name of the submodule in whose ``forward`` it is called, whose mode says whether it drops.
    """

    source: str
    readers: tuple[str, ...]
    operator: Any
    probability: float | None
    owner: str


@dataclass(frozen=True)
class FoldedBatchNorm:
    """A BatchNorm that became part of a layer's weights, by names of nodes of the graph.

    Attributes:
        layer: The convolution or linear operation.
        scale: gamma / sqrt(variance + eps), one value per channel.
        layer_bias: The bias it had before, if it had one.
        gamma: BatchNorm's weight, if it has one.
        beta: BatchNorm's bias, if it has one.
        mean: Its running mean.
        variance: Its running variance.
        name: The BatchNorm's name in the network.
        momentum: The user's.
        eps: The user's.
    """

    layer: str
    scale: str
    layer_bias: str | None
    gamma: str | None
    beta: str | None
    mean: str
    variance: str
    name: str
    momentum: float
    eps: float


@dataclass(frozen=True)
class Captured:
    """A network's graph, and what was taken out of it."""

    graph: GraphModule
    taken_out: tuple[TakenOut, ...]
    batch_norms: tuple[FoldedBatchNorm, ...]


def capture(
    network: nn.Module,
    inputs: Inputs,
    *,
    written_out: bool = True,
    trained: bool = True,
    steps_written_out: Plan | None = None,
) -> Captured:
    """Capture ``network`` as it is in eval mode, for batches of any size.

    The network itself is left as it was, and the graph's parameters and buffers are the network's own.

    Args:
        network: Any module that torch.export takes.
        inputs: One call of it; only shapes and types matter, and only two samples are used.
        written_out: Whether activations are written in the operations that every target has in int8.
        trained: Whether the graph will be trained. If not, what the network does in training does not matter.
        steps_written_out: The plan by which recurrent layers are written out step by step; ``None`` for none.

    Raises:
        CompressionError: If torch.export refuses the network, or if it is to be trained and computes something else
            in training than in evaluation (beyond dropout and BatchNorm), which one graph cannot do.
    """
    inputs = two_samples(inputs)
    regularizers = find_regularizers(network, inputs)
    with as_dropouts(regularizers):
        graph = capture_modes(network, inputs, trained=trained)
    make_functional(graph, type(network).__name__)
    drop_idle_masks(graph)
    if steps_written_out is not None:
        write_out_recurrent(graph, steps_written_out)
    if written_out:
        decompose(graph)
    batch_norms = tuple(_fold_batch_norms(graph))
    taken_out = tuple(_take_out(graph, network, regularizers))
    graph.graph.lint()
    graph.recompile()
    return Captured(graph, taken_out, batch_norms)


def _take_out(graph: GraphModule, network: nn.Module, regularizers: dict[str, nn.Module]) -> list[TakenOut]:
    modules = dict(network.named_modules())
    found = [n for n in graph.graph.nodes if n.op == "call_function" and n.target in {*DROPOUTS, aten.detach.default}]
    taken_out = []
    for node in found:
        source, probability = node.args[0], None
        if node.target in DROPOUTS:
            probability = float(node.args[1])
            if node.args[2] and probability > 0:
                raise CompressionError(
                    f"{type(network).__name__} drops values in evaluation too: {node.target} with training=True. An "
                    "exported file cannot; give functional dropout training=self.training."
                )
        while source in found:
            source = source.args[0]
        readers = [name for user in node.users for name in _readers(user, found)]
        owner = _owner(node, modules)
        operator = Regularizer(regularizers[owner]) if owner in regularizers else node.target
        taken_out.append(TakenOut(source.name, tuple(readers), operator, probability, owner))
    for node in found:
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    return taken_out


def _readers(node: Node, taken_out: list[Node]) -> list[str]:
    if node not in taken_out:
        return [node.name]
    return [name for user in node.users for name in _readers(user, taken_out)]


def _owner(node: Node, modules: dict[str, nn.Module]) -> str:
    """Name of the innermost submodule that a node was called in; ``""`` for the network."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [path for path, _ in stack.values() if path in modules]
    return str(names[-1]) if names else ""


def _fold_batch_norms(graph: GraphModule) -> Iterator[FoldedBatchNorm]:
    """Write each BatchNorm into the weight and bias of the layer before it, as operations on those parameters."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not aten.batch_norm.default:
            continue
        x, gamma, beta, mean, variance, _, momentum, eps, _ = node.args
        if mean is None and not depends_on_input(x):
            _normalize_weights(graph, node)
            continue
        if mean is None:
            raise CompressionError(
                "A BatchNorm of the network keeps no running statistics (track_running_stats=False), so that every "
                "output depends on the other samples of its batch, which no exported file can compute. Give it "
                "running statistics, or use GroupNorm or InstanceNorm."
            )
        foldable = x.target in _FOLDABLE and len(x.users) == 1 and not _is_grouped_transpose(x)
        # Channels of a linear layer are last, those of a BatchNorm second.
        if foldable and (x.target is not aten.linear.default or x.meta["val"].dim() == 2):
            layer = x
        else:
            layer = _depthwise_identity(graph, node, x)
        with graph.graph.inserting_before(layer):
            scale = call(graph, aten.rsqrt.default, call(graph, aten.add.Tensor, variance, eps))
            if gamma is not None:
                scale = call(graph, aten.mul.Tensor, scale, gamma)
            layer_bias = layer.args[2] if len(layer.args) > 2 else None
            if layer_bias is None:
                centered = call(graph, aten.neg.default, mean)
            else:
                centered = call(graph, aten.sub.Tensor, layer_bias, mean)
            bias = call(graph, aten.mul.Tensor, centered, scale)
            if beta is not None:
                bias = call(graph, aten.add.Tensor, bias, beta)
            shape = [1] * layer.args[1].meta["val"].dim()
            shape[_FOLDABLE[layer.target]] = -1
            weight = call(graph, aten.mul.Tensor, layer.args[1], call(graph, aten.view.default, scale, shape))
        layer.args = (layer.args[0], weight, bias, *layer.args[3:])
        with graph.graph.inserting_after(layer):
            squeezes = layer is not x and x.meta["val"].dim() == 2
            result = call(graph, aten.squeeze.dim, layer, 2) if squeezes else layer
        if SCALED in node.meta:
            result.meta[SCALED] = node.meta[SCALED]
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
        yield FoldedBatchNorm(
            layer=layer.name,
            scale=scale.name,
            layer_bias=_name(layer_bias),
            gamma=_name(gamma),
            beta=_name(beta),
            mean=mean.name,
            variance=variance.name,
            name=str(mean.target).rpartition(".")[0],
            momentum=momentum,
            eps=eps,
        )


def _normalize_weights(graph: GraphModule, node: Node) -> None:
    """Write out a normalization of weights, which networks with standardized weights take BatchNorm's function for."""
    x, gamma, beta, *_, eps, _ = node.args
    assert isinstance(x, Node)
    rank = x.meta["val"].dim()
    axes = [axis for axis in range(rank) if axis != 1]
    shape = [1, -1] + [1] * (rank - 2)
    with graph.graph.inserting_before(node):
        centred = call(graph, aten.sub.Tensor, x, call(graph, aten.mean.dim, x, axes, True))
        variance = call(graph, aten.mean.dim, call(graph, aten.mul.Tensor, centred, centred), axes, True)
        inverse = call(graph, aten.rsqrt.default, call(graph, aten.add.Tensor, variance, eps))
        result = call(graph, aten.mul.Tensor, centred, inverse)
        for parameter, target in ((gamma, aten.mul.Tensor), (beta, aten.add.Tensor)):
            if parameter is not None:
                result = call(graph, target, result, call(graph, aten.view.default, parameter, shape))
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)


def _depthwise_identity(graph: GraphModule, node: Node, x: Node) -> Node:
    """Put a depthwise convolution with weights of one before a BatchNorm that follows no layer.

    Together they are one depthwise convolution, which every target runs in int8; a BatchNorm alone is a float
    multiply and add on all of them, and one that torchao searches for its own patterns for half a minute.
    """
    value = x.meta["val"]
    channels, spatial = value.shape[1], max(1, value.dim() - 2)
    convolution = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[spatial]
    with graph.graph.inserting_before(node):
        weight = constant(graph, f"identity_of_{node.name}", torch.ones(channels, *[1] * (spatial + 1)), value)
        if value.dim() == 2:
            x = call(graph, aten.unsqueeze.default, x, 2)
        return call(graph, convolution, x, weight, None, [1] * spatial, [0] * spatial, [1] * spatial, channels)


def _is_grouped_transpose(layer: Node) -> bool:
    return bool(_FOLDABLE[layer.target] == 1 and len(layer.args) > 6 and layer.args[6] != 1)


def _name(node: Node | None) -> str | None:
    return None if node is None else node.name
