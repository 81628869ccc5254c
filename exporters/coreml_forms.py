"""Operations that coremltools' converter does not know, written out in those that it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_ATEN = torch.ops.aten
_RECURRENT = (_ATEN.gru.input, _ATEN.lstm.input, _ATEN.rnn_tanh.input, _ATEN.rnn_relu.input)
# It knows where() with tensors, but not with a number on its right.
_WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    _ATEN.where.ScalarOther: lambda condition, chosen, other: torch.where(
        condition, chosen, torch.full((), other, dtype=chosen.dtype)
    ),
    _ATEN.channel_shuffle.default: lambda x, groups: x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2),
}


def in_its_forms(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Write out what it does not know: choices between a tensor and a number, shuffles, recurrent layers by steps."""
    table: dict[Any, Callable[..., Any]] = dict(_WRITTEN_OUT)
    if any(node.target in _RECURRENT for node in program.graph.nodes):
        known = torch.export.default_decompositions()
        table |= {target: known[target] for target in _RECURRENT}
    written: torch.export.ExportedProgram = program.run_decompositions(table)
    return written
