"""The network as one graph of ATen operations, in eval mode, ready for quantizers.

What is taken out and kept beside the graph: dropout, which goes back in behind the quantizers, and BatchNorm, which
becomes part of the weights of the layer before it. Knows torch only.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs

aten = torch.ops.aten

DROPOUTS = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}

# Bookkeeping that torch.export leaves in a graph and that computes nothing.
_BOOKKEEPING = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range.default}

# Operations with a weight that a BatchNorm behind them can go into -> axis of the weight's output channels.
_FOLDABLE: dict[Any, int] = {
    aten.conv1d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.default: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.default: 0,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
    aten.linear.default: 0,
}


@dataclass(frozen=True)
class Dropout:
    """A dropout taken out of the graph: what it read, who read it, and its own settings."""

    source: str
    readers: tuple[str, ...]
    operator: Any
    probability: float


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
    dropouts: tuple[Dropout, ...]
    batch_norms: tuple[FoldedBatchNorm, ...]


def capture(network: nn.Module, inputs: Inputs) -> Captured:
    """Capture ``network`` as it is in eval mode, for batches of any size.

    The network itself is left as it was, and the graph's parameters and buffers are the network's own.

    Args:
        network: Any module that torch.export takes.
        inputs: One call of it; only shapes and types matter, and only two samples are used.

    Raises:
        CompressionError: If torch.export refuses the network, or if it computes something else in training
            than in evaluation (beyond dropout and BatchNorm), which one graph cannot do.
    """
    inputs = _two_samples(inputs)
    with _mode(network, training=False):
        graph = _export(network, inputs)
    with _mode(network, training=True):
        trained = _operations(_export(network, inputs))
    _refuse_other_path(network, _operations(graph), trained)
    _make_functional(graph)
    _drop_idle_masks(graph)
    batch_norms = tuple(_fold_batch_norms(graph))
    dropouts = tuple(_take_out_dropouts(graph))
    graph.graph.lint()
    graph.recompile()
    return Captured(graph, dropouts, batch_norms)


@contextmanager
def _mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode of every module and put back, module by module, what the user had; likewise BatchNorm's counters."""
    modes = {module: module.training for module in network.modules()}
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()} if training else {}
    # momentum=None averages over all batches, which reads its counter as a Python number: no graph can hold that.
    averaging = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.momentum is None]
    try:
        for module in modes:
            module.training = training
        for module in averaging:
            module.momentum = 0.1
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module in averaging:
            module.momentum = None
        for name, buffer in network.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


def _export(network: nn.Module, inputs: Inputs) -> GraphModule:
    device_type = next((tensor.device.type for tensor in inputs.tensors), "cpu")
    try:
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            program = torch.export.export(
                network, inputs.args, dict(inputs.kwargs), dynamic_shapes=_dynamic_batch(network, inputs), strict=False
            )
    except Exception as error:  # torch.export raises many kinds, all of them about the user's network here
        reason = str(error).strip().splitlines()
        raise CompressionError(
            f"{type(network).__name__} cannot be captured as one graph by torch.export: "
            f"{reason[0] if reason else type(error).__name__} Batches of any size must run through forward() without "
            "Python branches on values of tensors."
        ) from error
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    for node in list(graph.graph.nodes):
        counts = node.target is aten.add_.Tensor and "num_batches_tracked" in str(getattr(node.args[0], "target", ""))
        if node.target in _BOOKKEEPING or counts:
            if node.users:
                node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _two_samples(inputs: Inputs) -> Inputs:
    """Cut or repeat to a batch of two: torch.export takes a dimension of one for a constant."""
    if inputs.batch_size >= 2:
        return inputs.sample(size=2)
    return inputs.map(lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor)


def _dynamic_batch(network: nn.Module, inputs: Inputs) -> dict[str, Any]:
    batch_size, batch = inputs.batch_size, torch.export.Dim("batch", min=1)

    def spec(leaf: Any) -> dict[int, Any] | None:
        carries_batch = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch_size
        return {0: batch} if carries_batch else None

    bound = inspect.signature(network.forward).bind(*inputs.args, **inputs.kwargs)
    return {name: pytree.tree_map(spec, value) for name, value in bound.arguments.items()}


def _operations(graph: GraphModule) -> list[str]:
    """Names of the operations in order, without what differs between the modes by design."""
    return [
        str(node.target)
        for node in graph.graph.nodes
        if node.op == "call_function" and _functional(node.target) not in DROPOUTS
    ]


def _refuse_other_path(network: nn.Module, evaluated: list[str], trained: list[str]) -> None:
    if evaluated == trained:
        return
    pairs = zip([*evaluated, "the end"], [*trained, "the end"], strict=False)
    in_evaluation, in_training = next((pair for pair in pairs if pair[0] != pair[1]), ("the end", "the end"))
    raise CompressionError(
        f"{type(network).__name__} computes something else in training than in evaluation: {in_training} in training "
        f"where evaluation has {in_evaluation}. One quantized graph serves both, so forward() must not branch on "
        "self.training; name the part that does not branch with module=..., or move the branch out of the network."
    )


def _functional(target: Any) -> Any:
    """The operation that returns what an in-place one (``relu_``) writes; any other target as it is."""
    if not isinstance(target, torch._ops.OpOverload):
        return target
    name = target._schema.name.split("::")[1]
    if not name.endswith("_") or name.endswith("__") or target.namespace != "aten":
        return target
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, target._overloadname, target) if packet is not None else target


def _make_functional(graph: GraphModule) -> None:
    """Replace in-place operations, so that a quantizer's result is never overwritten behind its back."""
    for node in list(graph.graph.nodes):
        functional = _functional(node.target) if node.op == "call_function" else node.target
        written = node.args[0] if node.args else None
        if functional is node.target or not isinstance(written, Node):
            continue
        node.target = functional
        later = False
        for reader in graph.graph.nodes:
            if later and reader in written.users:
                reader.replace_input_with(written, node)
            later = later or reader is node


def _drop_idle_masks(graph: GraphModule) -> None:
    """Take attention masks away that mask nothing: no converter sees through how they are computed."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is not aten.scaled_dot_product_attention.default:
            continue
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if isinstance(mask, Node) and mask.meta["val"].dtype == torch.bool and _masks_nothing(graph, mask):
            node.replace_input_with(mask, None)
    graph.graph.eliminate_dead_code()


def _masks_nothing(graph: GraphModule, mask: Node) -> bool:
    """Whether a Boolean mask is all True whatever the network is fed, as transformers makes it for encoders."""
    values: dict[Node, Any] = {}

    def value(node: Node) -> Any:
        if node in values:
            return values[node]
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(graph)
        elif node.target is aten.sym_size.int and node.args[1] == 0:
            values[node] = 1  # the batch: what holds for one sample holds for all, or it would depend on the input
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            raise LookupError(node.name)
        return values[node]

    try:
        with torch.no_grad():
            return bool(value(mask).all())
    except LookupError:
        return False


def _take_out_dropouts(graph: GraphModule) -> Iterator[Dropout]:
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in DROPOUTS:
            source = node.args[0]
            yield Dropout(source.name, tuple(user.name for user in node.users), node.target, float(node.args[1]))
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)


def _fold_batch_norms(graph: GraphModule) -> Iterator[FoldedBatchNorm]:
    """Write each BatchNorm into the weight and bias of the layer before it, as operations on those parameters."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not aten.batch_norm.default:
            continue
        x, gamma, beta, mean, variance, _, momentum, eps, _ = node.args
        if mean is None or x.meta["val"].dim() < 2:
            continue
        if x.target in _FOLDABLE and len(x.users) == 1 and not _is_grouped_transpose(x):
            layer = x
        elif x.meta["val"].dim() == 4:
            layer = _depthwise_identity(graph, node, x)
        else:
            continue
        with graph.graph.inserting_before(layer):
            scale = _call(graph, aten.rsqrt.default, _call(graph, aten.add.Tensor, variance, eps))
            if gamma is not None:
                scale = _call(graph, aten.mul.Tensor, scale, gamma)
            layer_bias = layer.args[2] if len(layer.args) > 2 else None
            if layer_bias is None:
                centered = _call(graph, aten.neg.default, mean)
            else:
                centered = _call(graph, aten.sub.Tensor, layer_bias, mean)
            bias = _call(graph, aten.mul.Tensor, centered, scale)
            if beta is not None:
                bias = _call(graph, aten.add.Tensor, bias, beta)
            shape = [1] * layer.args[1].meta["val"].dim()
            shape[_FOLDABLE[layer.target]] = -1
            weight = _call(graph, aten.mul.Tensor, layer.args[1], _call(graph, aten.view.default, scale, shape))
        layer.args = (layer.args[0], weight, bias, *layer.args[3:])
        node.replace_all_uses_with(layer)
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


def _depthwise_identity(graph: GraphModule, node: Node, x: Node) -> Node:
    """Put a depthwise 1x1 convolution with weights of one before a BatchNorm that follows no layer.

    Together they are one depthwise convolution, which every target runs in int8; a BatchNorm alone is a float
    multiply and add on all of them.
    """
    channels = x.meta["val"].shape[1]
    name = f"identity_of_{node.name}"
    value = x.meta["val"]
    graph.register_buffer(name, torch.ones(channels, 1, 1, 1, dtype=value.dtype, device=value.device))
    with graph.graph.inserting_before(node):
        weight = graph.graph.get_attr(name)
        with value.fake_mode:
            weight.meta["val"] = torch.ones(channels, 1, 1, 1, dtype=value.dtype, device=value.device)
        return _call(graph, aten.conv2d.default, x, weight, None, [1, 1], [0, 0], [1, 1], channels)


def _is_grouped_transpose(layer: Node) -> bool:
    return bool(_FOLDABLE[layer.target] == 1 and len(layer.args) > 6 and layer.args[6] != 1)


def _call(graph: GraphModule, target: Any, *args: Any) -> Node:
    """Insert an operation with the shape and type of its result, which torchao reads when it places quantizers."""
    node = graph.graph.call_function(target, args)
    values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
    node.meta["val"] = target(*values)
    return node


def _name(node: Node | None) -> str | None:
    return None if node is None else node.name
