"""What the operations of a converted graph are called, and which of them compute nothing of their own."""

from __future__ import annotations

import torch
from torch import fx

# Activations that are part of the layer before them.
CLIPS = frozenset({"clamp", "clamp_min", "hardtanh", "relu", "relu6"})
# Operations that hand their first argument's values on unchanged.
VIEWS = frozenset(
    {
        "alias",
        "clone",
        "contiguous",
        "expand",
        "flatten",
        "permute",
        "reshape",
        "select",
        "slice",
        "squeeze",
        "t",
        "transpose",
        "unsqueeze",
        "view",
    }
)


def operation(node: fx.Node) -> str:
    """The plain name of an aten operation, without namespace, overload and in-place mark."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target._schema.name.split("::")[-1].rstrip("_")
