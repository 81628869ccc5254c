"""Operations that coremltools' converter does not know, written out in those that it does; and moves that it joins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_edge.exporters.passes.base import apply_passes
from lightning_edge.exporters.passes.fold_constants import fold_constants
from lightning_edge.exporters.passes.graph import VIEWS, operation
from lightning_edge.network import Deployable

# On the exported program, before it is converted.
PASSES = (
    fold_constants,  # the converter does not know all that makes positions and masks
)

_ATEN = torch.ops.aten
_MOST_DIMENSIONS = 5
# Operations that change the layout in memory alone.
_NOTHING = frozenset({"clone", "contiguous"})
_RECURRENT = (_ATEN.gru.input, _ATEN.lstm.input, _ATEN.rnn_tanh.input, _ATEN.rnn_relu.input)
# It knows where() with tensors, but not with a number on its right.
_WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    _ATEN.where.ScalarOther: lambda condition, chosen, other: torch.where(
        condition, chosen, torch.full((), other, dtype=chosen.dtype)
    ),
    _ATEN.concatenate.default: lambda tensors, dim=0: torch.cat(tensors, dim),
    _ATEN.channel_shuffle.default: lambda x, groups: x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2),
}


def program_of(network: Deployable) -> torch.export.ExportedProgram:
    """Export a network, without what it computes at every call alike."""
    program = network.program()
    graph = program.module(check_guards=False)
    return network.with_graph(graph).program() if apply_passes(graph, PASSES) else program


def in_its_forms(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Write out what it does not know: choices between a tensor and a number, shuffles, recurrent layers by steps."""
    _move_at_once(program)
    table: dict[Any, Callable[..., Any]] = dict(_WRITTEN_OUT)
    if any(node.target in _RECURRENT for node in program.graph.nodes):
        known = torch.export.default_decompositions()
        table |= {target: known[target] for target in _RECURRENT}
    written: torch.export.ExportedProgram = program.run_decompositions(table)
    return written


def _move_at_once(program: torch.export.ExportedProgram) -> None:
    """Take out quantizations between operations that only move values through more dimensions than Core ML has.

    It has five, and windows of attention are cut by a reshape to six, a transpose and a reshape back, which the
    converter joins into what it has if nothing stands between them. A value that is quantized twice, with nothing in
    between that moves it, is taken for integers by the converter where it is a constant (T5's biases of positions).
    """
    for node in program.graph.nodes:
        if operation(node) != "quantize_per_tensor":
            continue
        moves = VIEWS if node.args[0].meta["val"].dim() > _MOST_DIMENSIONS else _NOTHING
        source = node.args[0]
        while operation(source) in moves:
            source = source.args[0]
        if not operation(source).startswith("dequantize_per_tensor") or source.args[1:] != node.args[1:]:
            continue
        for reader in list(node.users):
            if operation(reader).startswith("dequantize_per_tensor"):
                reader.replace_all_uses_with(node.args[0])
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
