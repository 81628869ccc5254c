"""What the operations of a converted graph are called, and which of them compute nothing of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

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


def graphs_in(network: nn.Module) -> list[fx.GraphModule]:
    """The captured graphs of a network: itself, or those in a module around it."""
    return [module for module in network.modules() if isinstance(module, fx.GraphModule)]


def operation(node: fx.Node) -> str:
    """The plain name of an aten operation, without namespace, overload and in-place mark."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target._schema.name.split("::")[-1].rstrip("_")


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of what a node gives, if that is one tensor; of anything else none."""
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tuple(known.shape) if isinstance(known, torch.Tensor) else ()
