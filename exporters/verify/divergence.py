"""Where a file begins to compute something else than its network: values inside both, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lightning_edge.exporters.artifact import Artifact
from lightning_edge.exporters.passes.graph import CLIPS, VIEWS, operation
from lightning_edge.exporters.run.runner import Intermediate
from lightning_edge.network import Deployable, Inputs, sort_keywords

# Kernels round in their own ways, and a runtime gives values inside a file from others than those it is fast with:
# ResNet-8 lay up to 1.1 steps off on average by rounding alone. What is no rounding lies further off.
_MEAN_STEPS = 2.0
_SAME_SCALE = 1e-5
# Files in half precision round their scales, and those of sums are quotients of such.
_SAME_SCALE_IN_HALF = 2e-3


@dataclass(frozen=True)
class Divergence:
    """The first layer whose values in the file are not those of the network.

    Attributes:
        layer: Name of the layer in the network.
        operation: What computes it in the file.
        mean_steps: Mean difference, in quantization steps of the layer's output.
        max_steps: Largest difference, in the same.
    """

    layer: str
    operation: str
    mean_steps: float
    max_steps: float

    def __str__(self) -> str:
        """Say it in words."""
        return (
            f"The first layer that differs is {self.layer!r} ({self.operation} in the file): "
            f"{self.mean_steps:.3g} steps of its output on average and {self.max_steps:g} at most, on one sample"
        )


def first_divergence(network: Deployable, inputs: Inputs, found: Sequence[Intermediate]) -> Divergence | None:
    """Find the first quantized value of a converted graph that a file computes otherwise.

    A value of the graph is looked for among those of the file that have its scale, zero point and number of elements;
    of several it is the closest. What the file does not have, because it computes some operations in one, is passed
    over.

    Args:
        network: A converted int8 network.
        inputs: One sample.
        found: The values inside the file for that sample, in any order and layout.

    Returns:
        Where they part; ``None`` if no layer by itself lies far off.
    """
    for layer, scale, zero_point, values in _graph_values(network.graph, network.arranged(inputs)):
        for tolerance in (_SAME_SCALE, _SAME_SCALE_IN_HALF):
            alike = [
                (difference, other.operation)
                for other in found
                if other.zero_point == zero_point and abs(other.scale - scale) <= tolerance * scale
                for difference in _differences(values, other.values)
            ]
            if alike:
                break
        if not alike:
            continue
        difference, name = min(alike, key=lambda pair: float(pair[0].mean()))
        if float(difference.mean()) > _MEAN_STEPS:
            return Divergence(layer, name, float(difference.mean()), float(difference.max()))
    return None


def explanation(network: Deployable, artifact: Artifact) -> str:
    """Say where a file begins to differ from its network, or why that cannot be said; one sentence.

    Args:
        network: What was exported; its own sample is run.
        artifact: The file.
    """
    if network.precision == "fp32":
        return "Values inside are compared for int8 networks only"
    try:
        inputs = sort_keywords(network.inputs)
        tensors = artifact.ready(inputs.tensors)
        found = artifact.runner.intermediates(tensors)
        if found is None:
            return f"{artifact.runner.runtime} does not give the values inside a file"
        divergence = first_divergence(network, network.inputs, found)
    except Exception as error:
        # What explains an error must not take its place.
        return f"Values inside the file could not be looked at ({type(error).__name__}: {error})"
    return "On the network's own sample no single layer lies far off" if divergence is None else str(divergence)


def _graph_values(graph: torch.nn.Module, inputs: Inputs) -> Iterator[tuple[str, float, int, Tensor]]:
    """Run a converted graph on one sample; give every quantized value with the name of its layer."""
    assert isinstance(graph, fx.GraphModule)
    recorder = _Recorder(graph)
    with torch.no_grad():
        recorder.run(*pytree.tree_leaves((inputs.args, dict(inputs.kwargs))), enable_io_processing=False)
    for node, values in recorder.found:
        yield _layer(node), float(node.args[1]), int(node.args[2]), values


class _Recorder(fx.Interpreter):
    """Keeps what the quantize operations of activations give."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: list[tuple[Any, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run an operation, and keep it if it quantizes."""
        result = super().run_node(n)
        if operation(n) == "quantize_per_tensor" and _source(n).op != "placeholder":
            (value,) = n.all_input_nodes
            # What only moves values has a layout of its own, which the file may not have.
            if operation(value) not in VIEWS:
                self.found.append((n, result))
        return result


def _source(node: fx.Node) -> fx.Node:
    """What computes a quantized value: the operation before it, through those that only clip or move."""
    value: Any = node.args[0]
    while isinstance(value.args[0] if value.args else None, fx.Node) and (
        operation(value) in CLIPS | VIEWS or operation(value).startswith(("quantize_", "dequantize_"))
    ):
        value = value.args[0]
    assert isinstance(value, fx.Node)
    return value


def _layer(node: fx.Node) -> str:
    """The user's name of what computes a value, or the graph's where the module that does has none."""
    source = _source(node)
    stack = list((source.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack and stack[-1][0] else source.name


def _differences(one: Tensor, other: Tensor) -> Iterator[Tensor]:
    """Compare integers in each way they may lie: in one order, or the channels of one first and of the other last.

    A file may have channels of zeros behind those of the network, for its kernels' sake.
    """
    if one.dim() == other.dim() > 1 and one.shape[1] < other.shape[1] and one.shape[2:] == other.shape[2:]:
        other = other[:, : one.shape[1]]
    if one.numel() != other.numel():
        return
    one, other = one.double(), other.double()
    if other.dim() > 2 and other.movedim(-1, 1).shape == one.shape:
        yield (one - other.movedim(-1, 1)).abs()
    if other.dim() > 2:
        yield (one.flatten() - other.movedim(1, -1).flatten()).abs()
    yield (one.flatten() - other.flatten()).abs()
