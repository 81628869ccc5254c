"""Passes before coremltools' converter: constants, operations that it lacks, and moves that it joins."""

from __future__ import annotations

import torch

from lightning_edge.exporters.coreml.decompositions import decompositions
from lightning_edge.exporters.passes.fold_constants import fold_constants
from lightning_edge.exporters.passes.graph import VIEWS, operation
from lightning_edge.exporters.passes.resizes import pick_nearest
from lightning_edge.exporters.passes.trim_kernels import trim_kernels

# On the exported program, before it is converted.
PASSES = (
    trim_kernels,  # weights that only meet padding are left out
    pick_nearest,  # the converter knows resizes of images by plain nearest only, whose rows Core ML rounds by itself
    fold_constants,  # the converter does not know all that makes positions and masks
)

_MOST_DIMENSIONS = 5
# Operations that change the layout in memory alone.
_NOTHING = frozenset({"clone", "contiguous"})


def write_out(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Write out what the converter does not know.

    Given: operations that the converter has no lowering for, or one that computes something else at large and small
    values: log_softmax, GELU, RMSNorm, GroupNorm, reciprocals, boolean masks, recurrent layers and others.

    Result: the operations that they are made of, of recurrent layers step by step.

    Why: coremltools 9 writes log_softmax as ``log(softmax(x))``, drops ``approximate`` of GELU, adds 0.0001 to what it
    divides by, and has no lowering for the others; see `decompositions`.
    """
    drop_inner_quantizers(program)
    written: torch.export.ExportedProgram = program.run_decompositions(decompositions(program.graph))
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
