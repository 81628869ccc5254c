"""One graph for training and evaluation, of networks whose two modes are written differently. Knows torch only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs, flatten_outputs
from lightning_edge.quantization.capture.exported import exported
from lightning_edge.quantization.capture.in_place import functional
from lightning_edge.quantization.capture.nodes import DROPOUTS, DROPS, LIFTED

aten = torch.ops.aten

# Left out of a graph where the tensor has the layout already, which attention dropout decides.
_LAYOUT = {aten.contiguous.default, aten.clone.default}

# Operations that are told the mode.
_BY_MODE = {
    aten.batch_norm.default,
    aten.instance_norm.default,
    aten.scaled_dot_product_attention.default,
    aten.gru.input,
    aten.lstm.input,
    aten.rnn_relu.input,
    aten.rnn_tanh.input,
}

# Largest difference between the two modes, relative to the largest output: rounding of float32.
_TOLERANCE = 1e-4


def capture_modes(network: nn.Module, inputs: Inputs, *, trained: bool) -> GraphModule:
    """Capture the graph of evaluation, and where the network is to be trained make sure that it serves training too.

    Where evaluation goes another way to the same values the graph of training is given, with nothing random in it. So
    do networks that keep in evaluation what they compute from their weights (LeViT's and EfficientFormer's attention
    biases): the weights learn in training's graph only.

    Args:
        network: The network.
        inputs: One call of it, of two samples.
        trained: Whether the graph will be trained; if not, training matters only where evaluation has no graph.

    Returns:
        The graph. The dropout inside its attention is noted on it if it will be trained.

    Raises:
        CompressionError: If there is no graph, or if it is to be trained and the modes compute different values.
    """
    evaluation = exported(network, inputs, training=False)
    if isinstance(evaluation, GraphModule):
        if not trained:
            return evaluation
        # To compare the two modes, shapes in numbers will do.
        sample = exported(network, inputs, training=True, any_batch=False)
        if isinstance(sample, GraphModule) and _operations(evaluation, inputs) == _operations(sample, inputs):
            _note_attention_dropout(evaluation, sample)
            return evaluation
    training = exported(network, inputs, training=True, all_layers=trained)
    if isinstance(training, CompressionError):
        raise evaluation if isinstance(evaluation, CompressionError) else training
    if isinstance(evaluation, GraphModule) and _operations(evaluation, inputs) == _operations(training, inputs):
        _note_attention_dropout(evaluation, training)
        return evaluation
    quiet = _without_randomness(training)
    try:
        with _evaluating(network), torch.no_grad():
            expected = network(*inputs.args, **inputs.kwargs)
            outputs = quiet(*inputs.args, **inputs.kwargs)
    except Exception:  # neither can be said to serve both
        outputs = expected = None
    if expected is not None and _is_same(outputs, expected):
        return quiet
    if isinstance(evaluation, CompressionError):
        raise evaluation
    raise _other_path(type(network).__name__, _operations(evaluation, inputs), _operations(training, inputs))


def _operations(graph: GraphModule, inputs: Inputs) -> list[str]:
    """The operations in order with what they are given, without what differs between the modes by design.

    Sizes that depend on that of the batch are those that they have for ``inputs``.
    """
    described: list[str] = []
    known: dict[Node, str] = {}
    for node in graph.graph.nodes:
        target, value = functional(node.target), node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            expression = value.node.expr
            known[node] = str(expression.xreplace(dict.fromkeys(expression.free_symbols, inputs.batch_size)))
        elif node.op == "get_attr" and str(node.target).startswith(LIFTED):
            known[node] = str(getattr(graph, str(node.target)).tolist())
        elif node.op not in ("call_function", "output"):
            known[node] = str(node.target)
        elif target in {*DROPOUTS, *_LAYOUT} or _takes_all(node):
            known[node] = known[node.all_input_nodes[0]]
        else:
            known[node] = f"value {len(described)}"
            given: Any = node.all_input_nodes if target in _BY_MODE else (node.args, dict(node.kwargs))
            words = torch.fx.node.map_arg(given, lambda source: _Word(known[source]))
            described.append(f"{node.target}{words}" if node.op == "call_function" else f"the result {words}")
    return described


def _takes_all(node: Node) -> bool:
    """Whether a node is a slice of everything, as in x[:, 0]; a graph of shapes in numbers leaves it out."""
    return node.target is aten.slice.Tensor and tuple(node.args[2:]) == (0, sys.maxsize)


class _Word(str):
    """Text that is shown as it is inside a tuple."""

    __slots__ = ()
    __repr__ = str.__str__


def _other_path(network: str, evaluated: list[str], trained: list[str]) -> CompressionError:
    pairs = zip([*evaluated, "the end"], [*trained, "the end"], strict=False)
    in_evaluation, in_training = next((pair for pair in pairs if pair[0] != pair[1]), ("the end", "the end"))
    return CompressionError(
        f"{network} computes something else in training than in evaluation: {in_training} in training "
        f"where evaluation has {in_evaluation}, to other values. One quantized graph serves both, so forward() must "
        "not branch on self.training. Random regularization such as stochastic depth may, in a module of its own that "
        "gives its one input back in evaluation. Otherwise name the part that does not branch with module=..., or move "
        "the branch out of the network."
    )


def _note_attention_dropout(graph: GraphModule, training: GraphModule) -> None:
    """Keep the dropout inside attention, which is an argument, and in evaluation 0, for where it is written out."""
    attention = aten.scaled_dot_product_attention.default
    evaluated, trained = ([n for n in g.graph.nodes if n.target is attention] for g in (graph, training))
    for node, other in zip(evaluated, trained, strict=True):
        node.meta[DROPS] = _drops(other)


def _drops(attention: Node) -> Any:
    return attention.args[4] if len(attention.args) > 4 else attention.kwargs.get("dropout_p", 0.0)


def _without_randomness(training: GraphModule) -> GraphModule:
    """Have dropouts and BatchNorms of a graph of training do what they do in evaluation, in place."""
    for node in training.graph.nodes:
        target = functional(node.target)
        if target in DROPOUTS:
            node.update_arg(2, False)
        elif target is aten.batch_norm.default:
            node.update_arg(5, False)
        elif target is aten.scaled_dot_product_attention.default:
            node.meta[DROPS] = _drops(node)
            if len(node.args) > 4:
                node.update_arg(4, 0.0)
            elif "dropout_p" in node.kwargs:
                node.update_kwarg("dropout_p", 0.0)
    training.recompile()
    return training


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation by its own methods, which may keep or forget things, and back module by module."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.train()
        network.eval()
        yield
    finally:
        network.train()
        for module, mode in modes.items():  # parents come first
            if module.training != mode:
                module.train(mode)


def _is_same(outputs: object, expected: object) -> bool:
    if pytree.tree_structure(outputs) != pytree.tree_structure(expected):
        return False
    pairs = list(zip(flatten_outputs(outputs), flatten_outputs(expected), strict=True))
    return all(_is_close(output, wanted) for output, wanted in pairs)


def _is_close(output: Tensor, wanted: Tensor) -> bool:
    if output.shape != wanted.shape or output.dtype != wanted.dtype:
        return False
    if not wanted.is_floating_point() or not wanted.numel():
        return torch.equal(output, wanted)
    return float((output - wanted).abs().max()) <= _TOLERANCE * float(wanted.abs().max())
