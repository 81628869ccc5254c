"""The graph as it is run: the same values as the prepared graph's, in fewer passes over memory.

The prepared graph is what torchao converts, node by node. For training it is rewritten:

- A layer's weight and bias come from one module, `LayerWeights`.
- ReLU, ReLU6 and hardtanh in front of a fake-quantizer become its clipping: rounding keeps order, so the values and
  gradients are the same, and a pass forward and one backward are saved.
- A fake-quantizer behind an operation that only moves values, and that shares its range with the quantizer in front
  of it, goes: its values are on the grid already. Behind an average it rounds and no longer observes: means lie inside
  the range that they share, and a moving average over both would be too narrow for what is in front (torchao's is).
- Convolutions get their images in the memory format that a CPU is fastest with.

Import this module only where torchao may be imported.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torchao.quantization.pt2e.observer import FixedQParamsObserver, MovingAverageMinMaxObserver

from lightning_edge.quantization.capture.graph import FoldedBatchNorm
from lightning_edge.quantization.capture.nodes import FED_RANGE, MOVES_VALUES
from lightning_edge.quantization.train.fake_quantize import FakeQuantize
from lightning_edge.quantization.train.layers import LiveBatchNorm, RoundedBias
from lightning_edge.quantization.train.memory_format import put_channels_innermost
from lightning_edge.quantization.train.quantizer import AVERAGES, WEIGHTED
from lightning_edge.quantization.train.ranges import HIGHEST
from lightning_edge.quantization.train.weights import LayerWeights, fuses

aten = torch.ops.aten


def fuse(
    network: nn.Module, child: nn.Module, prepared: GraphModule, batch_norms: Sequence[FoldedBatchNorm]
) -> GraphModule:
    """Write the graph that is run.

    Its attributes are looked up in the network and in the child at every call: whatever replaces a tensor there (a
    move to a device, a pruned layer) is followed.

    Args:
        network: The user's module, whose parameters and buffers the graph reads.
        child: What holds the modules and constants that only the graph has.
        prepared: The prepared graph, which stays as it is.
        batch_norms: What `capture` folded.
    """
    graph = copy.deepcopy(prepared.graph)
    modules = {node: prepared.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    unread = {node for node in graph.nodes if not node.users}  # what is there for its effect, and stays
    runner = GraphModule(nn.Module(), Graph())
    # A copy has the same nodes in the same order, though not always by the same names.
    nodes = {node.name: copied for node, copied in zip(prepared.graph.nodes, graph.nodes, strict=True)}
    folded = {nodes[batch_norm.layer]: batch_norm for batch_norm in batch_norms}
    steps: dict[tuple[Any, ...], Node] = {}
    for index, layer in enumerate([node for node in graph.nodes if node.target in WEIGHTED]):
        key = (modules.get(layer.args[1]), *layer.args[2:3])
        if FED_RANGE in layer.meta and key in steps:  # a recurrent layer computes its weight once for all its steps
            layer.args = (layer.args[0], *steps[key].args[1:])
            continue
        steps[key] = layer
        _fuse_weights(graph, layer, modules, nodes, folded.get(layer), runner, f"weights_{index}")
    for node, module in modules.items():
        if isinstance(module, FakeQuantize):
            _drop_repeated(node, module, modules)
            _fuse_activation(node, module)
    for node in reversed(graph.nodes):
        if not node.users and node not in unread and node.op != "placeholder":
            graph.erase_node(node)
    _mark_joint(graph, modules)
    _look_up(graph, network, child, modules, runner)
    put_channels_innermost(graph)
    graph.lint()
    runner.graph = graph
    return runner


def _fuse_weights(
    graph: Graph,
    layer: Any,
    modules: Mapping[Node, nn.Module],
    nodes: Mapping[str, Node],
    folded: FoldedBatchNorm | None,
    runner: GraphModule,
    name: str,
) -> None:
    """Give a layer its weight and bias from one `LayerWeights`, if it has a quantized weight."""
    quantizer = modules.get(layer.args[1])
    if not isinstance(quantizer, FakeQuantize) or not fuses(quantizer):
        return
    norm = next((user for user in layer.users if isinstance(modules.get(user), LiveBatchNorm)), None)
    live = None if norm is None else modules[norm]
    assert live is None or isinstance(live, LiveBatchNorm)
    weight, bias = layer.args[1].args[0], layer.args[2] if len(layer.args) > 2 else None
    if norm is not None:
        bias = norm.args[2]
    rounding = None if bias is None else modules.get(bias)
    input_quantizer = rounding.quantizers[0] if isinstance(rounding, RoundedBias) else None
    parameters: list[Any] = [weight, bias if input_quantizer is None or bias is None else bias.args[0]]
    if folded is not None:
        parts = (folded.layer_bias, folded.gamma, folded.beta, folded.mean, folded.variance)
        parameters = [weight.args[0], *(nodes.get(part or "") for part in parts)]
    unscaled = live is not None and len(layer.users) == 1
    fused = LayerWeights(quantizer, input_quantizer, folded.eps if folded else 0.0, live if unscaled else None)
    runner.add_module(name, fused)
    with graph.inserting_before(layer):
        both = graph.call_module(name, tuple(parameters))
        new_weight = graph.call_function(operator.getitem, (both, 0))
        new_bias = None if bias is None else graph.call_function(operator.getitem, (both, 1))
    layer.update_arg(1, new_weight)
    if norm is None:
        layer.args = (*layer.args[:2], new_bias, *layer.args[3:])
    elif live is not None and live.folded:
        layer.args = (*layer.args[:2], new_bias, *layer.args[3:])
        norm.replace_all_uses_with(layer)
    else:
        norm.update_arg(2, new_bias)
        if unscaled:
            norm.update_arg(1, None)


def _drop_repeated(node: Any, module: FakeQuantize, modules: Mapping[Node, nn.Module]) -> None:
    """Take away a fake-quantizer whose input is on its grid already; let one whose input is in its range only round."""
    source: Any = node.args[0]
    averaged = False
    if source.target is aten.avg_pool2d.default and len(source.args) > 6 and source.args[6] is not None:
        return  # with a divisor of its own it may be a sum, which lies outside the range
    while source.target in {*MOVES_VALUES, *AVERAGES} or _pads_with_zeros(source):
        averaged = averaged or source.target in AVERAGES
        source = source.args[0]
    if source is node.args[0] or modules.get(source) is not module:
        return
    if averaged:
        node.kwargs = {"observed": True}
    else:
        node.replace_all_uses_with(node.args[0])


def _mark_joint(graph: Graph, modules: Mapping[Node, nn.Module]) -> None:
    """Tell quantizers that observe several values in one run, such as all that are concatenated."""
    observing = Counter(modules[node] for node in graph.nodes if node in modules and not node.kwargs.get("observed"))
    for module, count in observing.items():
        if isinstance(module, FakeQuantize):
            module.joint = count > 1


def _pads_with_zeros(node: Any) -> bool:
    if node.target is aten.constant_pad_nd.default:
        return len(node.args) < 3 or node.args[2] == 0
    if node.target is not aten.pad.default:
        return False
    mode = node.args[2] if len(node.args) > 2 else "constant"
    return mode != "constant" or len(node.args) < 4 or not node.args[3]


def _fuse_activation(node: Node, module: FakeQuantize) -> None:
    """Let a fake-quantizer clip what the activation in front of it would."""
    activation: Any = node.args[0]
    if len(activation.users) > 1 or module.is_per_channel:
        return
    if type(module.activation_post_process) is FixedQParamsObserver and clips_anyway(activation, module):
        node.args = (activation.args[0],)
        return
    clipping = _clipping(activation)
    if clipping is None:
        return
    if isinstance(module.activation_post_process, MovingAverageMinMaxObserver | FixedQParamsObserver):
        node.args = (activation.args[0], *clipping)


def _clipping(node: Node) -> tuple[float, float] | None:
    """Between which values an activation clips, if that is all it does, and to the same numbers in every float type."""
    limits = clip_limits(node)
    if limits is None:
        return None
    low, high = limits
    exact = all(float(torch.tensor(value).bfloat16()) == value for value in (low, high) if value != HIGHEST)
    return (low, high) if exact and low < high else None


def clips_anyway(activation: Node, module: FakeQuantize) -> bool:
    """Whether a quantizer behind an activation that clips saturates within what is left: the clip changes nothing."""
    limits = clip_limits(activation)
    if limits is None or module.is_per_channel:
        return False
    scale, zero_point = (float(value) for value in module.calculate_qparams())
    lowest, highest = (scale * (level - zero_point) for level in (module.quant_min, module.quant_max))
    # Half a step would be enough, were it not for the gradient at the edge.
    return lowest >= limits[0] - 1e-3 * scale and highest <= limits[1] + 1e-3 * scale


def clip_limits(node: Node) -> tuple[float, float] | None:
    """Between which values an activation clips, if that is all it does."""
    if node.target is aten.relu.default:
        return 0.0, HIGHEST
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target is aten.hardtanh.default:
        low, high = (float(value) for value in (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :]))  # type: ignore[arg-type]
        return low, high
    return None


def _look_up(
    graph: Graph, network: nn.Module, child: nn.Module, modules: Mapping[Node, nn.Module], runner: GraphModule
) -> None:
    """Let every attribute of the graph be found in the network, in the child, or in the graph that is run."""
    added = dict(child.get_submodule("added").named_children())
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            owner = "quantizers" if target.split(".")[0] in child._buffers else "network"
            node.target = f"{owner}.{target}"
        elif node in modules and target in added:
            node.target = f"quantizers.added.{target}"
        elif node in modules:
            runner.add_module(target, modules[node])
    # Not through add_module(): the network is no part of the graph, and its parent in the end.
    runner._modules["network"], runner._modules["quantizers"] = network, child
