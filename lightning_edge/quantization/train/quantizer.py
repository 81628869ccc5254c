"""Where quantizers go: our annotations on torchao's base classes, the same for every target.

The scheme is the one ExecuTorch (XNNPACK), Core ML and LiteRT all accept: int8 activations, affine, one scale per
tensor; int8 weights, symmetric, one scale per output channel, or for linear layers one per tensor where asked. Each
operation of the graph falls in one of a few kinds, which are the tables below; what is in none of them stays float, and
so does what a plan says shall.

Import this module only where torchao may be imported.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
)
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from lightning_edge.errors import CompressionError
from lightning_edge.quantization.capture.masks import masked_scores
from lightning_edge.quantization.capture.nodes import FED_RANGE, FLOAT, JOINING, MOVES_VALUES, POOLS, SHARES, SPLITTING
from lightning_edge.quantization.capture.nodes import FIXED_RANGE as KNOWN_RANGE
from lightning_edge.quantization.capture.norms import logarithms, written_norms
from lightning_edge.quantization.capture.recurrent import RECURRENT, float_states
from lightning_edge.quantization.plan import LinearWeights, Plan, check_patterns, node_names, precision_of
from lightning_edge.quantization.train.fake_quantize import FakeQuantize
from lightning_edge.quantization.train.histogram import FastHistogramObserver
from lightning_edge.quantization.train.specs import activation_spec, fixed_spec, weight_spec, wide_activation_spec

aten = torch.ops.aten

# Operation -> axis of its weight that counts output channels.
WEIGHTED: dict[Any, int] = {
    aten.conv1d.default: 0,
    aten.conv2d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.default: 0,
    aten.conv3d.padding: 0,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
    aten.linear.default: 0,
}

# The result is quantized once, behind the activation, when it has no other reader.
FUSABLE_ACTIVATIONS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default}

# Two quantized operands, one quantized result.
BINARY = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.matmul.default,
    aten.bmm.default,
}

# One quantized operand, a result with a range of its own.
UNARY = {
    *FUSABLE_ACTIVATIONS,
    aten.hardswish.default,
    aten.silu.default,
    aten.gelu.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.mean.dim,
    aten.mean.default,
    aten.sum.dim_IntList,
}

# The result lies in a range that is known, and that TFLite's kernels insist on.
FIXED_RANGE: dict[Any, tuple[float, int]] = {
    aten.sigmoid.default: (1 / 256, -128),
    aten.hardsigmoid.default: (1 / 256, -128),
    aten.softmax.int: (1 / 256, -128),
    aten._softmax.default: (1 / 256, -128),
    aten.tanh.default: (1 / 128, 0),
}

# One operand, and results within the range of its values.
AVERAGES = {
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bilinear2d.default,
}

# The result keeps the operand's scale, or a kernel would have to rescale it.
SAME_RANGE = {*MOVES_VALUES, *AVERAGES, aten.pad.default, aten.constant_pad_nd.default}

# What a plan can name.
_QUANTIZABLE = {*WEIGHTED, *BINARY, *UNARY, *FIXED_RANGE, *SAME_RANGE, *SPLITTING, *JOINING}


class EdgeQuantizer(Quantizer):  # type: ignore[misc]
    """Annotate a captured graph for int8 on every target.

    Args:
        averaging: Weight of the newest batch in the moving average of activation ranges; ``None`` for
            post-training quantization, which searches the range of least error over all batches instead.
        plan: What becomes of which layers; all int8 if not given.
        linear_weights: Whether the weight of a linear layer has a scale for each output or one for all.
    """

    def __init__(
        self, averaging: float | None, plan: Plan | None = None, linear_weights: LinearWeights = "per_channel"
    ) -> None:
        super().__init__()
        observer: Callable[..., Any] = FastHistogramObserver
        wide: Callable[..., Any] = MinMaxObserver
        if averaging is not None:
            wide = observer = MovingAverageMinMaxObserver.with_args(averaging_constant=averaging)
        self._narrow_activation = activation_spec(FakeQuantize.with_args(observer=observer))
        self._wide_activation = wide_activation_spec(FakeQuantize.with_args(observer=wide))
        self._plan: Plan = plan or {}
        self._first: dict[Any, Node] = {}
        self._one_scale = {aten.linear.default} if linear_weights == "per_tensor" else set()
        self._float: set[Node] = set()
        self._wide: set[Node] = set()
        self.quantized: list[str] = []

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark which inputs and outputs of which nodes are quantized; the names of the nodes go to ``quantized``.

        Raises:
            CompressionError: If a pattern of the plan names nothing, or the plan leaves no layer to quantize.
        """
        activations = fed_nodes(model)
        masked = masked_scores(model)
        self._float |= written_norms(model, activations) | logarithms(model, activations)
        if self._plan:
            self._follow_plan(model, activations)
        self._float |= float_states(model)
        for node in model.graph.nodes:
            if node not in activations or node in self._float or _annotation(node) is not None or not _is_float(node):
                continue
            if node in masked:
                if node.target in FIXED_RANGE:  # the softmax, float in front and int8 behind
                    self._annotate(node, {}, fixed_spec(*FIXED_RANGE[node.target]))
                continue
            self._activation = self._wide_activation if node in self._wide else self._narrow_activation
            if node.target in WEIGHTED:
                self._annotate_weighted(node, activations)
            elif node.target in BINARY:
                self._annotate_op(node, [arg for arg in node.args[:2] if isinstance(arg, Node)])
            elif node.target in FIXED_RANGE:
                self._annotate_op(node, [node.args[0]], fixed_spec(*FIXED_RANGE[node.target]))
            elif node.target in UNARY:
                self._annotate_op(node, [node.args[0]])
            elif node.target in SAME_RANGE:
                self._annotate_shared(node, [node.args[0]])
            elif node.target in JOINING:
                self._annotate_shared(node, list(node.args[0]))
            elif _is_part(node):
                self._annotate_split(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: every annotation comes from the tables of this module."""

    def _follow_plan(self, model: GraphModule, activations: set[Node]) -> None:
        """Find what stays float and what has 16-bit activations.

        What lies between layers goes with them: it stays float, or has 16 bits, where all that it is fed does. What
        moves the network's input to its first layers goes with those.
        """
        quantizable = {node for node in activations if node.target in _QUANTIZABLE or _is_part(node)}
        nodes = [node for node in model.graph.nodes if node in quantizable]
        names = {node: node_names(node) for node in nodes}
        layers_as_a_whole = [node for node in model.graph.nodes if node.target in RECURRENT]
        names_of_all = [*names.values(), *map(node_names, layers_as_a_whole)]
        known = dict.fromkeys(name for found in names_of_all for name in reversed(found))
        check_patterns(self._plan, known, "the network")
        for node in nodes:
            word = precision_of(names[node], self._plan)
            sources = [source for source in node.all_input_nodes if source in activations]
            moves = not is_layer(node)
            if word == "float" or (moves and self._float.issuperset(sources)):
                self._float.add(node)
            elif node.target not in FIXED_RANGE and (word == "int8_a16" or (moves and self._wide.issuperset(sources))):
                self._wide.add(node)
        moved = {node for node in activations if node.op == "placeholder"}
        for node in nodes:
            if node.target in SAME_RANGE and node.args[0] in moved:
                moved.add(node)
        for node in reversed([node for node in nodes if node in moved and node.users]):
            for chosen in (self._float, self._wide):
                if chosen.issuperset(node.users):
                    chosen.add(node)
        layers = [node for node in nodes if is_layer(node) and node.args[1] not in activations]
        if layers and self._float.issuperset(layers):
            raise CompressionError(
                f"skip and precisions leave all {len(layers)} layers of the network in float; leave quantization out"
            )

    def _annotate_weighted(self, node: Node, activations: set[Node]) -> None:
        x, weight = node.args[:2]
        if weight in activations:
            self._annotate_op(node, [x, weight])
            return
        axis = WEIGHTED[node.target]
        grouped_transpose = axis == 1 and len(node.args) > 6 and node.args[6] != 1
        whole = grouped_transpose or node.target in self._one_scale
        inputs = {x: self._state_spec(x), weight: weight_spec(None if whole else axis)}
        first = self._first.get(node.meta.get(SHARES))
        if first is not None:
            inputs[weight] = SharedQuantizationSpec((first.args[1], first))
        if FED_RANGE in node.meta:
            inputs[x] = SharedQuantizationSpec((first.args[0], first)) if first else fixed_spec(*node.meta[FED_RANGE])
        self._annotate(node, inputs, self._activation)

    def _annotate_op(self, node: Node, operands: list[Any], output: QuantizationSpec | None = None) -> None:
        inputs = {operand: self._spec(operand) for operand in operands if _is_float(operand)}
        if inputs:
            self._annotate(node, inputs, output or self._spec(node))

    def _annotate(self, node: Node, inputs: dict[Any, Any], output: QuantizationSpec) -> None:
        """Quantize a node's inputs, and its output: behind the activation that is its only reader, if there is one."""
        self.quantized.append(node.name)
        if SHARES in node.meta:
            first = self._first.setdefault(node.meta[SHARES], node)
            output = output if first is node else SharedQuantizationSpec(first)
        activation = next(iter(node.users)) if len(node.users) == 1 else None
        fused = (
            activation is not None
            and activation.target in FUSABLE_ACTIVATIONS
            and node.target not in UNARY
            and activation not in self._float
        )
        node.meta["quantization_annotation"] = QuantizationAnnotation(
            input_qspec_map=inputs, output_qspec=None if fused else output, _annotated=True
        )
        if fused and activation is not None:
            output = self._spec(activation) if KNOWN_RANGE in activation.meta else output
            self.quantized.append(activation.name)
            activation.meta["quantization_annotation"] = QuantizationAnnotation(output_qspec=output, _annotated=True)

    def _spec(self, node: Node) -> QuantizationSpec:
        """How a value is quantized: by the range it is known to have, or by what is observed."""
        known = node.meta.get(KNOWN_RANGE)
        return self._activation if known is None or self._activation is self._wide_activation else fixed_spec(*known)

    def _state_spec(self, node: Any) -> QuantizationSpec:
        """How a value is quantized that is float itself: by the known range of a recurrent layer's state."""
        return self._spec(node) if FLOAT in node.meta else self._activation

    def _annotate_shared(self, node: Node, operands: list[Node]) -> None:
        first, *rest = operands
        if not _is_float(first):
            return
        shared, spec = SharedQuantizationSpec((first, node)), self._state_spec(first)
        producer = _annotation(first)
        if producer is not None and producer.output_qspec is not None:
            spec = shared = _at_root(SharedQuantizationSpec(first))
        inputs: dict[Node, Any] = {first: spec, **dict.fromkeys(rest, shared)}
        origin = shared.edge_or_node[0] if isinstance(shared.edge_or_node, tuple) else None
        if origin in rest:
            # Joined to what was made of it: all readers of one value share by themselves, and by name it is a circle.
            inputs[origin] = self._activation
        self.quantized.append(node.name)
        node.meta["quantization_annotation"] = QuantizationAnnotation(
            input_qspec_map=inputs, output_qspec=shared, _annotated=True
        )

    def _annotate_split(self, node: Node) -> None:
        """Share each part's range with the operand of the split, which itself has no tensor for an output."""
        split = node.args[0]
        assert isinstance(split, Node)
        source = split.args[0]
        assert isinstance(source, Node)
        producer = _annotation(source)
        shared = SharedQuantizationSpec((source, split))
        is_quantized = producer is not None and producer.output_qspec is not None
        if is_quantized:
            shared = _at_root(SharedQuantizationSpec(source))
        if _annotation(split) is None:
            spec = shared if is_quantized else self._activation
            split.meta["quantization_annotation"] = QuantizationAnnotation({source: spec}, None, _annotated=True)
        self.quantized.append(node.name)
        node.meta["quantization_annotation"] = QuantizationAnnotation(output_qspec=shared, _annotated=True)


def is_layer(node: Node) -> bool:
    """Whether an operation is a convolution or linear layer of the network, and not what a pool was written as."""
    return node.target in WEIGHTED and POOLS not in node.meta


def _is_part(node: Node) -> bool:
    """Whether this is one of the results of a split."""
    whole = node.args[0] if node.target is operator.getitem else None
    return isinstance(whole, Node) and whole.target in SPLITTING


def _annotation(node: Node) -> Any:
    return node.meta.get("quantization_annotation")


def _at_root(shared: SharedQuantizationSpec) -> SharedQuantizationSpec:
    """Share with what has a range of its own: torchao follows chains of sharing, and fails where two of them meet."""
    while True:
        place = shared.edge_or_node
        node = place[1] if isinstance(place, tuple) else place
        found = _annotation(node)
        spec = found.input_qspec_map.get(place[0]) if isinstance(place, tuple) else found.output_qspec
        if not isinstance(spec, SharedQuantizationSpec):
            return shared
        shared = spec


def fed_nodes(model: GraphModule) -> set[Node]:
    """Nodes that depend on what the network is fed; all others are constants or computed from parameters."""
    found: set[Node] = set()
    for node in model.graph.nodes:
        if node.op == "placeholder" or any(parent in found for parent in node.all_input_nodes):
            found.add(node)
    return found


def _is_float(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
