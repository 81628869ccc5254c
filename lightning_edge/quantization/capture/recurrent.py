"""Recurrent layers written out step by step, so that their products are int8. Knows torch only.

The input's products of all steps are one linear layer. Each step multiplies the state by the same weight, and all steps
share its quantizers: ranges are one, and a file holds the weight once. With W the input's and U the state's weights:

- GRU (Cho et al. 2014, arXiv:1406.1078, with the reset behind the product as torch has it): r, z = sigmoid(W x + U h),
  n = tanh(W x + r * U h), h' = n + z * (h - n).
- LSTM (Hochreiter and Schmidhuber 1997): i, f, o = sigmoid(W x + U h), g = tanh(W x + U h), c' = f * c + i * g,
  h' = o * tanh(c').

W x and U h are int8, and so is the h that U multiplies, in the range that it is known to have, -1 to 1. The state stays
float, because a slow state moves by less than an int8 step at a time. The gates are float as well: they are a few
values each, and int8 takes two conversions more for every operation. Tried on a GRU of 64 units over 16 steps, int8
gates gave a larger file (67 kB for 45 in ONNX), a slower one (199 us for 179) and a signal to noise lower by 1.5 dB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lightning_edge.quantization.capture.nodes import (
    FED_RANGE,
    FIXED_RANGE,
    FLOAT,
    JOINING,
    MOVES_VALUES,
    SHARES,
    SPLITTING,
    call,
)
from lightning_edge.quantization.plan import Plan, node_names, precision_of
from lightning_edge.user_warnings import warn

aten = torch.ops.aten

_LSTM_LAYER, _LSTM_CELL = aten.lstm.input, aten.lstm_cell.default
_LAYERS = {aten.gru.input, _LSTM_LAYER}
_CELLS = {aten.gru_cell.default, _LSTM_CELL}
# What stays float as a whole where it is not written out.
RECURRENT = {*_LAYERS, *_CELLS, aten.gru.data, aten.lstm.data, aten.rnn_relu.input, aten.rnn_tanh.input}
# Scale and zero point of a state, which is between -1 and 1.
_STATE_RANGE = (1 / 128, 0)
# A step is some 20 operations, about 1 kB of a file: a layer of many weights may make more of them.
_STEPS, _MOST_STEPS, _WEIGHTS_A_STEP = 16, 100, 300

_State = tuple[Node, ...]


@dataclass(frozen=True)
class _Weights:
    """Of one layer in one direction, as torch has them: gate below gate."""

    of_input: Node
    of_state: Node
    input_bias: Node | None
    state_bias: Node | None


def write_out_recurrent(graph: GraphModule, plan: Plan) -> None:
    """Write GRUs and LSTMs, as layers or as cells, step by step; tell of those that stay as they are.

    Args:
        graph: A captured graph; changed in place.
        plan: Layers that are float by it stay as they are.
    """
    written: list[Node] = []
    for node in list(graph.graph.nodes):
        if node.target not in RECURRENT or precision_of(node_names(node), plan) == "float":
            continue
        reason = _reason_to_stay(node)
        if reason:
            name = node_names(node)[-1] if node_names(node) else node.name
            warn(f"{name} stays float in the int8 network: {reason}.")
            continue
        with graph.graph.inserting_before(node):
            (_Cell if node.target in _CELLS else _Layer)(graph, node).write()
        written.append(node)
    if written:
        graph.graph.eliminate_dead_code()
    # A layer is random by its dropout, which nothing takes for dead code.
    for node in set(written).intersection(graph.graph.nodes):
        graph.graph.erase_node(node)


def float_states(graph: GraphModule) -> set[Node]:
    """Find the arithmetic of states, and what moves a state between it and the network's inputs and outputs.

    Args:
        graph: A captured graph with recurrent layers written out.
    """
    states = {node for node in graph.graph.nodes if FLOAT in node.meta}
    found = set(states)
    for node in states:
        for source in node.all_input_nodes:
            chain = _moved_from(source)
            if chain[-1].op in ("placeholder", "get_attr") or chain[-1].target is aten.zeros.default:
                found.update(chain[:-1])
    moved, candidates = set(states), []
    for node in graph.graph.nodes:
        if node not in states and _moves(node) and moved.issuperset(node.all_input_nodes):
            moved.add(node)
            candidates.append(node)
    for node in reversed(candidates):
        if all(user.op == "output" or user in found for user in node.users):
            found.add(node)
    return found


class _Written:
    """Inserts the operations that take the place of a recurrent one.

    Args:
        graph: Changed at its present insertion point.
        node: The operation.
    """

    def __init__(self, graph: GraphModule, node: Node) -> None:
        self.graph = graph
        self.node = node
        self.step: Callable[[_Weights, Node, int, _State], _State] = self._gru_step
        if node.target in (_LSTM_LAYER, _LSTM_CELL):
            self.step = self._lstm_step

    def op(self, target: Any, *args: Any) -> Node:
        """Insert an operation."""
        return call(self.graph, target, *args, instead_of=self.node)

    def of_input(self, x: Node, weights: _Weights) -> Node:
        """Insert the input's product, of one step or of all."""
        return self._shared(weights, "input", aten.linear.default, x, weights.of_input, weights.input_bias)

    def _gru_step(self, weights: _Weights, of_input: Node, at: int, state: _State) -> _State:
        (hidden,) = state
        size = int(hidden.meta["val"].shape[1])
        of_state = self._of_state(hidden, weights)
        both = self._float(aten.add.Tensor, self._slice(of_input, at, 2 * size), self._slice(of_state, 0, 2 * size))
        both = self._float(aten.sigmoid.default, both)
        reset, update = self._slice(both, 0, size), self._slice(both, size, size)
        kept = self._float(aten.mul.Tensor, reset, self._slice(of_state, 2 * size, size))
        new = self._float(aten.add.Tensor, self._slice(of_input, at + 2 * size, size), kept)
        new = self._float(aten.tanh.default, new)
        change = self._float(aten.mul.Tensor, update, self._float(aten.sub.Tensor, hidden, new))
        return (self._bounded(aten.add.Tensor, new, change),)

    def _lstm_step(self, weights: _Weights, of_input: Node, at: int, state: _State) -> _State:
        hidden, cell = state
        size = int(hidden.meta["val"].shape[1])
        gates = self._float(aten.add.Tensor, self._slice(of_input, at, 4 * size), self._of_state(hidden, weights))
        both = self._float(aten.sigmoid.default, self._slice(gates, 0, 2 * size))
        write, forget = self._slice(both, 0, size), self._slice(both, size, size)
        new = self._float(aten.tanh.default, self._slice(gates, 2 * size, size))
        read = self._float(aten.sigmoid.default, self._slice(gates, 3 * size, size))
        kept, added = self._float(aten.mul.Tensor, forget, cell), self._float(aten.mul.Tensor, write, new)
        cell = self._float(aten.add.Tensor, kept, added)
        return self._bounded(aten.mul.Tensor, read, self._float(aten.tanh.default, cell)), cell

    def _of_state(self, hidden: Node, weights: _Weights) -> Node:
        made = self._shared(weights, "state", aten.linear.default, hidden, weights.of_state, weights.state_bias)
        made.meta[FED_RANGE] = _STATE_RANGE
        return made

    def _slice(self, x: Node, start: int, size: int) -> Node:
        """Insert what takes channels, none where it would take all."""
        if size == x.meta["val"].shape[1]:
            return x
        return self._float(aten.slice.Tensor, x, 1, start, start + size)

    def _float(self, target: Any, *args: Any) -> Node:
        made = self.op(target, *args)
        made.meta[FLOAT] = True
        return made

    def _bounded(self, target: Any, *args: Any) -> Node:
        """Insert an operation that gives a state."""
        made = self._float(target, *args)
        made.meta[FIXED_RANGE] = _STATE_RANGE
        return made

    def _shared(self, weights: _Weights, role: str, target: Any, *args: Any) -> Node:
        """Insert a product whose result has one range in all steps with these weights."""
        made = self.op(target, *args)
        made.meta[SHARES] = f"{weights.of_state.name} {role}"
        return made


class _Cell(_Written):
    """One step: ``aten.gru_cell`` or ``aten.lstm_cell``."""

    def write(self) -> None:
        """Put the step in the place of the operation."""
        given: tuple[Any, ...] = (*self.node.args, None, None)
        x, state, *weights = given[:6]
        states = (state,) if isinstance(state, Node) else tuple(state)
        cell = _Weights(*weights)
        results = self.step(cell, self.of_input(x, cell), 0, states)
        _replace(self.node, results)


class _Layer(_Written):
    """All steps of one or several layers: ``aten.gru`` or ``aten.lstm``."""

    def write(self) -> None:
        """Put the steps in the place of the operation."""
        given: tuple[Any, ...] = self.node.args
        x, first, parameters, has_biases, count, dropout, _, both_ways, batch_first = given
        firsts = (first,) if isinstance(first, Node) else first
        directions = 2 if both_ways else 1
        weights = list(_weights(parameters, has_biases))
        sequence = x if batch_first else _transposed(self, x)
        lasts: list[_State] = []
        for layer in range(count):
            if layer and dropout:
                sequence = self.op(aten.dropout.default, sequence, dropout, False)
            by_direction = []
            for direction in range(directions):
                index = layer * directions + direction
                state = tuple(self.op(aten.select.int, part, 0, index) for part in firsts)
                states = self._run(sequence, weights[index], state, backwards=direction == 1)
                by_direction.append([hidden for hidden, *_ in states])
                lasts.append(states[0 if direction else -1])
            steps = list(zip(*by_direction, strict=True))
            sequence = self._joined([hidden for step in steps for hidden in step], len(steps))
        self._replace(sequence, [step[0] for step in steps] if directions == 1 else [], lasts, bool(batch_first))

    def _run(self, sequence: Node, weights: _Weights, state: _State, *, backwards: bool) -> list[_State]:
        """Give the states after each step, in the order of the steps."""
        count = sequence.meta["val"].shape[1]
        if count == 1:
            sequence = self.op(aten.flatten.using_ints, sequence, 1)
        of_input = self.of_input(sequence, weights)
        if count > 1:
            of_input = self.op(aten.flatten.using_ints, of_input, 1)
        gates = int(weights.of_state.meta["val"].shape[0])
        states: dict[int, _State] = {}
        for step in reversed(range(count)) if backwards else range(count):
            state = states[step] = self.step(weights, of_input, step * gates, state)
        return [states[step] for step in range(count)]

    def _joined(self, hidden: list[Node], count: int) -> Node:
        """Join the states of all steps to (batch, steps, channels)."""
        row = self.op(aten.cat.default, hidden, 1) if len(hidden) > 1 else hidden[0]
        return self.op(aten.unflatten.int, row, 1, [count, row.meta["val"].shape[1] // count])

    def _replace(self, sequence: Node, steps: list[Node], lasts: list[_State], batch_first: bool) -> None:
        for user in list(self.node.users):
            index: Any = user.args[1]
            if index == 0:
                _read_steps(user, steps, 1 if batch_first else 0)
                result = sequence if batch_first else self.op(aten.transpose.int, sequence, 0, 1)
            else:
                parts = [last[index - 1] for last in lasts]
                _read_steps(user, parts, 0)
                whole = len(parts) > 1
                result = self.op(aten.stack.default, parts) if whole else self.op(aten.unsqueeze.default, parts[0], 0)
            user.replace_all_uses_with(result)


def _read_steps(sequence: Node, steps: Sequence[Node], axis: int) -> None:
    """Let what selects one step of a sequence read that step, through slices that take everything."""
    for user in list(sequence.users):
        if user.target is aten.slice.Tensor and tuple(user.args[2:]) == (0, sys.maxsize):
            _read_steps(user, steps, axis)
        elif user.target is aten.select.int and steps and int(str(user.args[1])) % 3 == axis:
            user.replace_all_uses_with(steps[int(str(user.args[2]))])


def _replace(node: Node, results: _State) -> None:
    if node.target is not _LSTM_CELL:
        node.replace_all_uses_with(results[0])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(results[int(str(user.args[1]))])


def _transposed(writer: _Written, x: Node) -> Node:
    """Put the batch before the steps; what did the opposite just before is taken back."""
    if x.target is aten.transpose.int and sorted(int(str(axis)) % 3 for axis in x.args[1:]) == [0, 1]:
        return x.args[0]  # type: ignore[return-value]
    return writer.op(aten.transpose.int, x, 0, 1)


def _weights(parameters: Sequence[Node], has_biases: bool) -> Iterator[_Weights]:
    size = 4 if has_biases else 2
    for start in range(0, len(parameters), size):
        part = parameters[start : start + size]
        yield _Weights(part[0], part[1], *(part[2:] if has_biases else (None, None)))


def _reason_to_stay(node: Node) -> str:
    """Say why a recurrent layer cannot be written out; empty if it can."""
    if node.target not in _LAYERS | _CELLS:
        return "only GRU and LSTM on whole sequences are written out in int8, no packed sequences and no plain RNN"
    given: tuple[Any, ...] = node.args
    x, state = given[:2]
    hidden = state if isinstance(state, Node) else state[0]
    if not _is_bounded(hidden):
        return (
            "its first state is neither zero, nor an input of the network, nor the state of such a layer, so that it "
            "may be outside -1 to 1, the range that a state has in int8"
        )
    if node.target in _CELLS:
        return ""
    parameters, has_biases, count = given[2:5]
    directions = 2 if given[7] else 1
    if len(parameters) != count * directions * (4 if has_biases else 2):
        return "its states are projected (proj_size)"
    value = x.meta["val"]
    steps = value.shape[1 if given[8] else 0] if value.dim() == 3 else None
    if not isinstance(steps, int):
        return "the number of its steps is not fixed"
    weights = sum(part.meta["val"].numel() for part in parameters if part.meta["val"].dim() == 2)
    most = min(max(_STEPS, weights // _WEIGHTS_A_STEP), _MOST_STEPS)
    if steps > most:
        return (
            f"it makes {steps} steps, and with {weights} weights at most {most} are written out, or the file would "
            "hold more operations than weights. Feed it fewer steps at a time, with its state as an input"
        )
    return ""


def _is_bounded(hidden: Node) -> bool:
    """Whether a first state lies between -1 and 1, as all that follow it do."""
    first = _moved_from(hidden)[-1]
    is_outside = first.op == "placeholder" or first.target is aten.zeros.default
    return is_outside or first.meta.get(FIXED_RANGE) == _STATE_RANGE


def _moved_from(node: Node) -> list[Node]:
    """A value, what it was moved from, and so on to one that is computed."""
    chain = [node]
    while _moves(chain[-1]) and chain[-1].target not in JOINING:
        chain.append(chain[-1].all_input_nodes[0])
    return chain


def _moves(node: Node) -> bool:
    return node.target in MOVES_VALUES or node.target in JOINING or node.target in SPLITTING or node.target is getitem
