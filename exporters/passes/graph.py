"""Queries and edits of graphs: what operations are called, which only move values, and how nodes are put in."""

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


def insert(graph: fx.GraphModule, before: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Insert an operation in front of a node."""
    with graph.graph.inserting_before(before):
        return graph.graph.call_function(target, args)


def replaced(graph: fx.GraphModule, node: fx.Node, result: fx.Node) -> bool:
    """Replace a node by a result, which gets its shape; return True."""
    result.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)
    return True


def constant(graph: fx.GraphModule, before: fx.Node, role: str, value: torch.Tensor, like: Any) -> fx.Node:
    """Insert a constant in front of the node that reads it, named by its role, in the type of another value."""
    name = f"{role}_of_{before.name}"
    graph.register_buffer(name, value.to(like.meta["val"].dtype))
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)
