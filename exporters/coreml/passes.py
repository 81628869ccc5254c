"""Rewrites of a network for coremltools: its passes, and the operations that are decomposed at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from lightning_edge.exporters.passes.base import Pass
from lightning_edge.exporters.passes.fold_constants import compute_before
from lightning_edge.exporters.passes.graph import VIEWS, operation
from lightning_edge.network import Deployable

_ATEN = torch.ops.aten
_MOST_DIMENSIONS = 5
# Operations that only change the layout in memory.
_NO_OPS = frozenset({"clone", "contiguous"})
_RECURRENT = (_ATEN.gru.input, _ATEN.lstm.input, _ATEN.rnn_tanh.input, _ATEN.rnn_relu.input)
# Operations that the converter lacks; it has where() for tensors, but not with a number as its last argument.
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _ATEN.where.ScalarOther: lambda condition, chosen, other: torch.where(
        condition, chosen, torch.full((), other, dtype=chosen.dtype)
    ),
    _ATEN.concatenate.default: lambda tensors, dim=0: torch.cat(tensors, dim),
    _ATEN.channel_shuffle.default: lambda x, groups: x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2),
}


def drop_inner_quantizers(module: fx.GraphModule) -> bool:
    """Remove a quantizer that repeats the one before it, so that the moves between them are adjacent.

    Given:
        dequantize -> reshape (to six dimensions) -> quantize -> dequantize -> transpose -> ...
    Result:
        dequantize -> reshape (to six dimensions) -> transpose -> ...
    Why:
        Core ML has five dimensions. Window attention reshapes to six, transposes and reshapes back; coremltools joins
        these into what Core ML has only if nothing stands between them. It also takes a constant that is quantized
        twice, with no move in between, for integers (T5's position biases).
    """
    changed = False
    for node in module.graph.nodes:
        if operation(node) != "quantize_per_tensor":
            continue
        moves = VIEWS if node.args[0].meta["val"].dim() > _MOST_DIMENSIONS else _NO_OPS
        source = node.args[0]
        while operation(source) in moves:
            source = source.args[0]
        if not operation(source).startswith("dequantize_per_tensor") or source.args[1:] != node.args[1:]:
            continue
        for reader in list(node.users):
            if operation(reader).startswith("dequantize_per_tensor") and reader.users:
                reader.replace_all_uses_with(node.args[0])
                changed = True
    return changed


PASSES: tuple[Pass, ...] = (
    compute_before,  # first: coremltools lacks operations that only make constants, and the next pass reads shapes
    drop_inner_quantizers,  # coremltools joins moves through six dimensions only where nothing stands between them
)


def rewrite(network: Deployable, passes: Sequence[Pass] = PASSES) -> torch.export.ExportedProgram:
    """Export a network, apply passes, and decompose the operations that coremltools lacks.

    Args:
        network: The network; it stays as it is.
        passes: The passes, first to last.
    """
    program = network.program()
    for apply in passes:
        module = program.module(check_guards=False)
        if isinstance(module, fx.GraphModule) and apply(module):
            module.graph.eliminate_dead_code()
            module.recompile()
            program = network.with_graph(module).program()
    table: dict[Any, Callable[..., Any]] = dict(_DECOMPOSITIONS)
    if any(node.target in _RECURRENT for node in program.graph.nodes):
        known = torch.export.default_decompositions()
        table |= {target: known[target] for target in _RECURRENT}
    decomposed: torch.export.ExportedProgram = program.run_decompositions(table)
    return decomposed
