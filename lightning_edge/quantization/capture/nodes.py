"""Insert operations and constants into a captured graph, with what is known of their results. Knows torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten

# One operand, all of whose values the result holds once, in another order or shape.
REARRANGES = {
    aten.view.default,
    aten.view_as.default,
    aten.reshape.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.mT.default,
    aten.adjoint.default,
    aten.t.default,
    aten.rot90.default,
    aten.atleast_2d.default,
    aten.atleast_3d.default,
    aten.type_as.default,
    aten.contiguous.default,
    aten.clone.default,
}
# One operand, whose values are all that the result holds, or zeros besides.
MOVES_VALUES = {
    *REARRANGES,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.adaptive_max_pool2d.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.index_select.default,
    aten.diagonal.default,
    aten.unfold.default,
    aten.narrow.default,
    aten.broadcast_to.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.repeat.default,
    aten.tile.default,
    aten.repeat_interleave.self_int,
    aten.roll.default,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    aten.flip.default,
    aten.to.dtype,
}
# One operand, several results, each read through operator.getitem.
SPLITTING = {
    aten.chunk.default,
    aten.unsafe_chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
    aten.hsplit.int,
    aten.vsplit.int,
    aten.dsplit.int,
    aten.unbind.int,
}
JOINING = {
    aten.cat.default,
    aten.concat.default,
    aten.concatenate.default,
    aten.stack.default,
    aten.hstack.default,
    aten.vstack.default,
    aten.dstack.default,
    aten.column_stack.default,
}
DROPOUTS = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}
# Of an operation that stands for another: which modules it was called in.
_STACK = "nn_module_stack"
# Scale and zero point of a value whose range is known before anything is observed.
FIXED_RANGE = "edge_fixed_range"
# (factor, shift) of a layer whose weights were scaled: it gives factor * y + shift where the user's layer gives y.
SCALED = "edge_scaled"
# Of a convolution: it stands for a pool and is no layer of the network.
POOLS = "edge_pools"
# Of an operation that stays float between int8 values, as the state of a recurrent layer does.
FLOAT = "edge_float"
# Of a layer that is one step of many: scale and zero point of what it is fed, whose quantizer all steps share.
FED_RANGE = "edge_fed_range"
# Of an operation whose result has one range with those of the same key.
SHARES = "edge_shares"
# How the names of constants begin that forward() makes of Python numbers: they are the graph's own.
LIFTED = "lifted_out_of_"
# Of attention: the probability with which it drops its weights in training.
DROPS = "edge_drops"


def depends_on_input(node: Node) -> bool:
    """Whether a value depends on what the network is fed, beyond how many samples that are."""
    before = [node]
    for one in before:  # grows while it is walked
        if one.op == "placeholder":
            return True
        if one.target is not aten.sym_size.int:
            before.extend(parent for parent in one.all_input_nodes if parent not in before)
    return False


def call(graph: GraphModule, target: Any, *args: Any, instead_of: Node | None = None) -> Node:
    """Insert an operation with the shape and type of its result, which torchao reads when it places quantizers.

    Args:
        graph: Changed at its present insertion point.
        target: The operation.
        args: Its arguments; nodes have their values in ``meta["val"]``.
        instead_of: The user's operation that it takes the place of, whose module it then belongs to.
    """
    node = graph.graph.call_function(target, args)
    values = torch.fx.node.map_arg(args, lambda arg: arg.meta["val"])
    node.meta["val"] = target(*values)
    if instead_of is not None and _STACK in instead_of.meta:
        node.meta[_STACK] = instead_of.meta[_STACK]
    return node


def constant(graph: GraphModule, name: str, value: Tensor, like: Tensor) -> Node:
    """Insert a constant of the graph's own, as a buffer.

    Args:
        graph: Changed at its present insertion point.
        name: Name of the buffer, one that the network does not have.
        value: The constant.
        like: A value of the graph, whose type and device it gets.
    """
    value = value.to(dtype=like.dtype, device=like.device)
    graph.register_buffer(name, value)
    node = graph.graph.get_attr(name)
    with like.fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return node
