"""Compute what is the same at every call before a network is converted."""

from __future__ import annotations

import operator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_edge.exporters.passes.graph import shape_of

_ATEN = torch.ops.aten
# They make a value larger and nothing else: what they are fed is kept instead.
_SPREADS = {_ATEN.expand.default, _ATEN.expand_as.default, _ATEN.repeat.default}
# Numbers in a file that are worth an operation.
_MANY = 1024
# Of what they are fed they look at the shape and type alone.
_LIKE = {
    _ATEN.full_like.default,
    _ATEN.new_full.default,
    _ATEN.new_ones.default,
    _ATEN.new_zeros.default,
    _ATEN.ones_like.default,
    _ATEN.zeros_like.default,
}


def fold_constants(module: fx.GraphModule) -> bool:
    """Replace operations that give the same at every call by constants.

    Given: operations on constants alone, such as positions, masks and tables of sines.

    Result: one constant in their place. Operations on trained parameters stay: converters fold these, and know which
    of them are shared. Operations that draw random numbers stay, and so do those of quantizers.

    Why: a converter may not know such an operation, and a runtime computes it at every call, less exactly than torch.
    """
    values = _known(module)
    wanted: dict[fx.Node, None] = {}
    for node in values:
        if any(user not in values for user in node.users):
            origin: Any = node
            while origin.target in _SPREADS:
                origin = origin.args[0]
            is_made = origin.op == "call_function" and origin.target is not _ATEN.full.default
            if is_made and isinstance(values[origin], Tensor):
                wanted[origin] = None
    for node in wanted:
        with module.graph.inserting_before(node):
            constant = _stored(module, node.name, values[node])
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant)
    if wanted:
        for node in values:
            if node.target is _ATEN._assert_tensor_metadata.default:  # true, since it was run
                module.graph.erase_node(node)
    return bool(wanted)


def _stored(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """Insert a constant; one number many times, such as zeros to fill up channels with, as that number."""
    if value.numel() > _MANY and bool((value == value.flatten()[0]).all()):
        options: Any = {"dtype": value.dtype, "device": value.device}
        return module.graph.call_function(_ATEN.full.default, (list(value.shape), value.flatten()[0].item()), options)
    module.register_buffer(f"computed_before_{name}", value.contiguous())
    return module.graph.get_attr(f"computed_before_{name}")


@torch.no_grad()
def _known(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """The values of all nodes that are the same at every call; none if any of them is written over."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(module)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                values[node] = value
        elif node.target in _LIKE and len(node.all_input_nodes) == 1:
            values[node] = node.target(torch.empty(shape_of(node.args[0])), *node.args[1:], **_options(node))
        elif node.op == "call_function" and all(source in values for source in node.all_input_nodes):
            target: Any = node.target
            if isinstance(target, torch._ops.OpOverload):
                if target._schema.is_mutable:
                    return {}
                if target.namespace != "aten" or torch.Tag.nondeterministic_seeded in target.tags:
                    continue
            elif target is not operator.getitem:
                continue
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = target(*args, **kwargs)
    return values


def _options(node: fx.Node) -> dict[str, Any]:
    """Keyword arguments of an operation that makes a value like another, with the type and device that it has."""
    made = node.meta["val"]
    return {**node.kwargs, "dtype": made.dtype, "device": made.device}
