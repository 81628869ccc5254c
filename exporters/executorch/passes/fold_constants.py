"""Fold constants: compute once, before lowering, what does not depend on the inputs."""

from __future__ import annotations

import torch

# Quantizers say how a value is stored; the backends look for them.
_QUANTIZERS = {"quantized_decomposed", "torchao", "quant"}


def fold_constants(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Replace operations on constants by their results, in place.

    Given: an operation whose inputs are all constants, such as a mask made from a range of positions, a bias looked up
    by relative position, or a position embedding.
    Result: a constant.
    Why: ExecuTorch's lowering keeps such operations. They would run at every call, on kernels outside the delegate.

    It changes an exported program and not a graph, so it runs before `PASSES`.

    Args:
        program: A network in ATen operations. Quantizers and operations that draw random numbers stay.

    Returns:
        The program with the constants folded.
    """
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    stay = {target for target in targets if not _is_foldable(target)}
    changed: torch.export.ExportedProgram = constant_prop_pass(program, custom_skip_targets=stay)
    return changed


def _is_foldable(target: object) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return target.__class__.__name__ == "builtin_function_or_method"  # getitem
    return target.namespace not in _QUANTIZERS and torch.Tag.nondeterministic_seeded not in target.tags
