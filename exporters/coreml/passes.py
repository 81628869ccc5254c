"""Passes for coremltools' converter: constants, operations that it does not know, and moves that it joins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_edge.exporters.passes.base import Pass, apply_passes
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


def apply_to_program(network: Deployable, passes: Sequence[Pass]) -> torch.export.ExportedProgram:
    """Export a network with passes applied to its program; a program that changed is exported again."""
    program = network.program()
    graph = program.module(check_guards=False)
    return network.with_graph(graph).program() if apply_passes(graph, passes) else program


def write_out(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Write out what the converter does not know.

    Given: choices between a tensor and a number, channel shuffles, recurrent layers.

    Result: the operations that they are made of, of recurrent layers step by step.

    Why: coremltools 9 has no lowering for them.
    """
    drop_inner_quantizers(program)
    table: dict[Any, Callable[..., Any]] = dict(_WRITTEN_OUT)
    if any(node.target in _RECURRENT for node in program.graph.nodes):
        known = torch.export.default_decompositions()
        table |= {target: known[target] for target in _RECURRENT}
    written: torch.export.ExportedProgram = program.run_decompositions(table)
    return written


def drop_inner_quantizers(program: torch.export.ExportedProgram) -> None:
    """Drop quantizers between operations that only move values, in place.

    Given: a value of more than five dimensions that is dequantized, moved and quantized again in the same scale; or one
    that is quantized twice with nothing in between.

    Result: the moves without the quantizers between them.

    Why: Core ML has five dimensions. Windows of attention are cut by a reshape to six, a transpose and a reshape back,
    which coremltools 9 joins only if nothing stands between them. A constant that is quantized twice is taken for
    integers by it (T5's biases of positions).
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
