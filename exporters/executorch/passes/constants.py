"""What a network computes from its own values alone, computed before it is lowered for ExecuTorch.

Its lowering keeps such operations, which then run at every call, on slower kernels outside the delegate: attention
masks out of ranges of positions, biases looked up by relative position, position embeddings.
"""

from __future__ import annotations

import torch

# Their operations say how a value is stored, and are what a backend looks for.
_QUANTIZERS = {"quantized_decomposed", "torchao", "quant"}


def computed_before(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Put constants in the place of operations that give the same at every call, in place.

    Args:
        program: A network in ATen operations; those that draw random numbers, and those of quantizers, stay.
    """
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    stay = {target for target in targets if not _is_plain(target)}
    changed: torch.export.ExportedProgram = constant_prop_pass(program, custom_skip_targets=stay)
    return changed


def _is_plain(target: object) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return target.__class__.__name__ == "builtin_function_or_method"  # getitem
    return target.namespace not in _QUANTIZERS and torch.Tag.nondeterministic_seeded not in target.tags
