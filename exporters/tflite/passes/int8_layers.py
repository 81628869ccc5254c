"""Make int8 layers of those that LiteRT's converter leaves in float between int8 values."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from lightning_edge.exporters.passes.graph import graphs_in, operation
from lightning_edge.exporters.tflite import edit as tflite_edit
from lightning_edge.exporters.tflite.graph import op_name, schema_module
from lightning_edge.network import Deployable

# Where an operation has what it is fed, its weight and its bias; and the first version with int8 and a bias.
_PLACES = {"TRANSPOSE_CONV": (2, 1, 3), "CONV_2D": (0, 1, 2), "FULLY_CONNECTED": (0, 1, 2)}
_VERSIONS = {"TRANSPOSE_CONV": 3, "CONV_2D": 3, "FULLY_CONNECTED": 4}
# Operations that a layer may end with, under the same names.
_ACTIVATIONS = frozenset({"RELU", "RELU6", "RELU_N1_TO_1"})
# From PyTorch's order of a weight's axes to LiteRT's, by the operation in the network.
_ORDERS = {"conv_transpose2d": (1, 2, 3, 0), "linear": (0, 1)}


@dataclass(frozen=True)
class _Weight:
    """An int8 weight of the network in LiteRT's order, output channels first; one scale for each, or one for all."""

    levels: Tensor
    scales: Tensor

    def is_in(self, values: Tensor) -> bool:
        """Whether a float weight of the file is this one."""
        if values.shape != self.levels.shape:
            return False
        scales = self.scales.view(-1, *[1] * (values.dim() - 1))
        return torch.allclose(self.levels * scales, values, rtol=1e-6, atol=0.0)


@dataclass(frozen=True)
class _Layer:
    """A float layer of the file between int8 values: its operation, the bias added behind it, and what it ends with."""

    op: Any
    source: int
    weight: _Weight
    bias: Tensor | None
    activation: int


def quantize_layers(model: Any, network: Deployable) -> None:
    """Compute layers in int8 that the converter left in float.

    Given: a dequantization, a layer with a float weight and a quantization. The weight is one that an int8 weight of
    the network stands for, by which it is found again.

    Result: the layer on int8 values. What nothing reads then is left for `tflite_edit.drop_unread`.

    Why: LiteRT has int8 kernels for these, but its converter (litert-torch 0.10) has no int8 form of transposed
    convolutions, and joins two linear layers that share a weight and an input into one float product.

    Args:
        model: The file of an int8 network, as converted.
        network: That network.
    """
    weights = _weights(network)
    for graph in model.subgraphs:
        makers = tflite_edit.makers(graph)
        places: dict[int, int] = {}
        graph.operators = [_in_int8(model, graph, makers, op, weights, places) or op for op in graph.operators]


def _in_int8(
    model: Any, graph: Any, makers: dict[int, Any], quantize: Any, weights: list[_Weight], places: dict[int, int]
) -> Any | None:
    """Give the int8 layer that stands for a quantization and the float layer in front of it; ``None`` if there is none.

    ``places`` are the tensors of weights that are in the graph already, by the weight.
    """
    if op_name(model, quantize) != "QUANTIZE":
        return None
    found = _float_layer(model, graph, makers, int(quantize.inputs[0]), weights)
    result = graph.tensors[int(quantize.outputs[0])]
    if found is None or result.type != schema_module().TensorType.INT8:
        return None
    op, (data, weight, bias) = found.op, _PLACES[op_name(model, found.op)]
    layer = copy.copy(op)
    layer.builtinOptions = copy.copy(op.builtinOptions)
    activation = layer.builtinOptions.fusedActivationFunction = _needed(found.activation, result.quantization)
    layer.inputs = [*(int(index) for index in op.inputs[: max(data, weight) + 1]), -1]
    if id(found.weight) not in places:
        levels, scales = found.weight.levels, found.weight.scales.tolist()
        places[id(found.weight)] = tflite_edit.add_constant(model, graph, levels, "int8", scales)
    layer.inputs[data], layer.inputs[weight] = found.source, places[id(found.weight)]
    if found.bias is not None:
        (step,) = graph.tensors[found.source].quantization.scale
        steps = found.weight.scales.double() * float(step)
        levels = (found.bias / steps).round()
        layer.inputs[bias] = tflite_edit.add_constant(model, graph, levels, "int32", steps.tolist())
    elif op_name(model, op) == "TRANSPOSE_CONV":
        layer.inputs.pop()  # the one kernel that counts its inputs
    layer.outputs = quantize.outputs
    code = model.operatorCodes[layer.opcodeIndex]
    code.version = max(code.version, _VERSIONS[op_name(model, op)] + (activation != _activations().NONE))
    return layer


def _needed(activation: int, quantization: Any) -> int:
    """Give an activation, or none where the values behind it saturate within what it leaves.

    TensorFlow Lite Micro's transposed convolution ignores its activation.
    """
    kinds = _activations()
    limits = {kinds.RELU: (0.0, math.inf), kinds.RELU6: (0.0, 6.0), kinds.RELU_N1_TO_1: (-1.0, 1.0)}
    (scale,), (zero_point,) = quantization.scale, quantization.zeroPoint
    lowest, highest = ((level - int(zero_point)) * float(scale) for level in (-128, 127))
    low, high = limits.get(activation, (math.inf, -math.inf))
    idle = lowest >= low - 1e-3 * scale and highest <= high + 1e-3 * scale
    return int(kinds.NONE if idle else activation)


def _activations() -> Any:
    return schema_module().ActivationFunctionType


def _float_layer(model: Any, graph: Any, makers: dict[int, Any], index: int, weights: list[_Weight]) -> _Layer | None:
    """Find the layer that computes a float tensor from an int8 one, with a weight of the network."""
    kinds = _activations()
    op, added, activations = makers.get(index), None, []
    if op is not None and op_name(model, op) in _ACTIVATIONS:
        activations.append(getattr(kinds, op_name(model, op)))
        op = makers.get(int(op.inputs[0]))
    if op is not None and op_name(model, op) == "ADD":
        constants = [_floats(model, graph, int(part)) for part in op.inputs]
        if constants[0] is not None or constants[1] is None:
            return None
        added = constants[1]
        activations.append(op.builtinOptions.fusedActivationFunction)
        op = makers.get(int(op.inputs[0]))
    if op is None or op_name(model, op) not in _PLACES:
        return None
    activations.append(op.builtinOptions.fusedActivationFunction)
    data, weight, bias = _PLACES[op_name(model, op)]
    source = makers.get(int(op.inputs[data]))
    values = _floats(model, graph, int(op.inputs[weight]))
    own = _floats(model, graph, int(op.inputs[bias])) if len(op.inputs) > bias else None
    if source is None or op_name(model, source) != "DEQUANTIZE" or values is None:
        return None
    if graph.tensors[int(source.inputs[0])].type != schema_module().TensorType.INT8:
        return None
    if added is not None and (activations[-1] != kinds.NONE or (own is not None and bool(own.any()))):
        return None
    active = [kind for kind in activations if kind != kinds.NONE]
    if len(active) > 1:
        return None
    match = next((known for known in weights if known.is_in(values)), None)
    if match is None:
        return None
    total = own if added is None else added.flatten()
    if total is not None and total.numel() != len(match.levels):
        return None
    return _Layer(op, int(source.inputs[0]), match, total, active[0] if active else kinds.NONE)


def _weights(network: Deployable) -> list[_Weight]:
    graph, found = network.graph, []
    for part in graphs_in(graph):
        for node in part.graph.nodes:
            weight: Any = node.args[1] if operation(node) in _ORDERS else None
            if weight is None or not operation(weight).startswith("dequantize_"):
                continue
            stored, scales = weight.args[0], weight.args[1]
            if stored.op == "get_attr":
                levels = attrgetter(str(stored.target))(part).permute(_ORDERS[operation(node)])
                steps = attrgetter(str(scales.target))(part) if isinstance(scales, fx.Node) else torch.tensor([scales])
                found.append(_Weight(levels, steps.float()))
                if operation(node) == "conv_transpose2d":  # with stride 1 it becomes a convolution
                    found.append(_Weight(levels.flip(1, 2), steps.float()))
    return found


def _floats(model: Any, graph: Any, index: int) -> Tensor | None:
    """Give a float constant of the file; ``None`` for other tensors, and for an argument that is left out."""
    values = None if index < 0 else tflite_edit.constant(model, graph, index, "float32")
    return None if values is None else torch.from_numpy(values.copy())
