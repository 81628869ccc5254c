"""From the fake-quantized network in training to an int8 graph: a copy, its constants computed, quantizers replaced."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lightning_edge.errors import CompressionError
from lightning_edge.network import Deployable
from lightning_edge.quantization.calibration_check import open_empty_ranges
from lightning_edge.quantization.network import quantized_forward, quiet_torchao
from lightning_edge.quantization.train.layers import GraphDropout, LiveBatchNorm, RoundedBias, StopGradient
from lightning_edge.quiet import quiet_libraries
from lightning_edge.tracing import tracing

aten = torch.ops.aten


def convert(module: nn.Module) -> Deployable:
    """Convert the quantized network in ``module`` to an int8 graph, as a copy on the CPU.

    A `CalibrationWarning` names layers that gave nothing but 0 on all that their ranges were observed on. They
    have a range of 0 to 1 then.

    Args:
        module: A LightningModule or network after quantization-aware training, or what `quantize` returned.

    Raises:
        CompressionError: If nothing in ``module`` is quantized, its ranges were never observed, or a weight is NaN or
            infinite.
    """
    quiet_libraries()

    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    _, child = quantized_forward(module)
    with quiet_torchao():
        prepared = copy.deepcopy(child.bind()).cpu()
    _widen(prepared)
    _refuse_unobserved(prepared)
    _refuse_not_finite(prepared)
    open_empty_ranges(prepared)
    _take_out(prepared)
    _drop_idle_clips(prepared)
    _compute_constants(prepared)
    with tracing(), quiet_torchao():
        converted = convert_pt2e(prepared, fold_quantize=True)
    inputs = child.inputs.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    made = Deployable(converted, inputs, "int8", tuple(_output_scales(converted)), child.call.match)
    made.calibration = child.calibration
    return made


def _widen(graph: GraphModule) -> None:
    """Let a graph of a network in half precision or double compute in float32, as its files will."""
    own = {parameter.dtype for parameter in graph.parameters() if parameter.is_floating_point()} - {torch.float32}
    if not own:
        return
    graph.float()

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in own:
            return value.float()
        return torch.float32 if isinstance(value, torch.dtype) and value in own else value

    for node in graph.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(wide, (node.args, dict(node.kwargs)))
        if "val" in node.meta:  # torchao dequantizes to the type that is noted here
            node.meta["val"] = pytree.tree_map(wide, node.meta["val"])
    graph.recompile()


def _refuse_unobserved(graph: GraphModule) -> None:
    for module in graph.modules():
        observer = getattr(module, "activation_post_process", None)
        minimum = getattr(observer, "min_val", None)
        if hasattr(module, "observing") and minimum is not None and not torch.isfinite(minimum).all():
            raise CompressionError(
                "A quantizer of the network never saw a finite value: its range is empty or not a number. Train or "
                "calibrate the quantized network before converting it, and check its weights and inputs for NaN."
            )


def _refuse_not_finite(graph: GraphModule) -> None:
    broken = [name for name, parameter in graph.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        raise CompressionError(
            f"{', '.join(broken)} of the network is not finite (NaN or infinity), which no int8 weight can hold. Look "
            "at the loss for divergence, and take an earlier checkpoint."
        )


def _take_out(graph: GraphModule) -> None:
    """Remove dropouts and stopped gradients, and give layers with a live BatchNorm their bias instead."""
    for node in list(graph.graph.nodes):
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, LiveBatchNorm):
            layer, _, bias = node.args[:3]
            layer.args = (*layer.args[:2], bias, *layer.args[3:])
        if isinstance(module, LiveBatchNorm | GraphDropout | StopGradient):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
            graph.delete_submodule(str(node.target))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _drop_idle_clips(graph: GraphModule) -> None:
    """Remove clips that the quantizer behind them does by saturating, where a kernel would not do both in one.

    What follows a layer, a sum or a difference as ReLU or ReLU6 is part of that operation on every target.
    """
    from lightning_edge.quantization.train.fused import clips_anyway
    from lightning_edge.quantization.train.quantizer import WEIGHTED

    joining = {*WEIGHTED, aten.add.Tensor, aten.sub.Tensor}
    for node in list(graph.graph.nodes):
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        clip = node.args[0] if hasattr(module, "observing") else None
        if not isinstance(clip, Node) or len(clip.users) > 1 or not clips_anyway(clip, module):  # type: ignore[arg-type]
            continue
        source: Any = clip.args[0]
        if clip.target in (aten.relu.default, aten.relu6.default) and source.target in joining:
            continue
        if source.op == "call_module":  # a clip by itself, of values that are quantized already
            continue
        node.replace_input_with(clip, source)
        graph.graph.erase_node(clip)
    graph.recompile()


def _compute_constants(graph: GraphModule) -> None:
    """Evaluate what depends on parameters alone, such as weights with a BatchNorm in them."""
    computed: dict[Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            computed[node] = _attribute(graph, node)
        elif node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), RoundedBias):
            computed[node] = graph.get_submodule(str(node.target))(computed[node.args[0]])
        elif node.op == "call_function" and node.all_input_nodes and all(p in computed for p in node.all_input_nodes):
            with torch.no_grad():
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda parent: computed[parent])
                computed[node] = node.target(*args, **kwargs)
    for index, (node, value) in enumerate(computed.items()):
        read = any(reader not in computed for reader in node.users)
        if node.op == "get_attr" or not read or not isinstance(value, Tensor):
            continue
        name = f"constant_{index}"
        graph.register_parameter(name, nn.Parameter(value.detach().contiguous(), requires_grad=False))
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


def _attribute(graph: GraphModule, node: Node) -> Any:
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _output_scales(graph: GraphModule) -> Iterator[float | None]:
    """The step of each output: the scale of the dequantize operation it comes from, if it comes from one.

    Of a 16-bit output it is the step that 8 bits over the same range would have, by which all outputs are judged: what
    leads to it may well be 8 bits wide.
    """
    output = next(node for node in graph.graph.nodes if node.op == "output")
    outputs: list[Any] = []
    torch.fx.node.map_arg(output.args, outputs.append)
    for node in outputs:
        quantized = node.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default
        widening = 256 if quantized and node.args[5] == torch.int16 else 1
        yield float(node.args[1]) * widening if quantized else None
