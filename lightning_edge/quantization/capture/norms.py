"""Norms that a network writes out (RMSNorm, ``x / x.norm()``), and logarithms: what int8 would lose. Knows torch only.

They stay float between the int8 values around them, as a LayerNorm in one operation does. In int8 the numbers that they
divide by would be lost: a square has twice the digits of its value, and of a mean that is small beside others nothing
is left, so that the quotient is as large as what keeps it from dividing by zero allows. A logarithm of values that
int8 rounds to zero is minus infinity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from lightning_edge.quantization.capture.nodes import REARRANGES

aten = torch.ops.aten

_SUMS = {aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default}
_SIZES = {
    aten.linalg_vector_norm.default,
    aten.norm.Scalar,
    aten.norm.ScalarOpt_dim,
    aten.std.correction,
    aten.std.dim,
    aten.var.correction,
    aten.var.dim,
}
_SQUARES = {aten.pow.Tensor_Scalar, aten.square.default, aten.abs.default}
_WITH_NUMBERS = {
    aten.add.Scalar,
    aten.add.Tensor,
    aten.div.Scalar,
    aten.div.Tensor,
    aten.mul.Scalar,
    aten.mul.Tensor,
    aten.sub.Scalar,
    aten.sub.Tensor,
}
_INVERSES = {aten.reciprocal.default, aten.rsqrt.default}
_LOGARITHMS = {aten.log.default, aten.log1p.default, aten.log2.default, aten.log10.default}
_SHAPING = {
    *REARRANGES,
    aten.expand.default,
    aten.expand_as.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.to.dtype,
    aten.unsqueeze.default,
}
_PASSING = {*_SHAPING, aten.clamp.default, aten.clamp_min.default, aten.sqrt.default}


def written_norms(graph: GraphModule, fed: set[Node]) -> set[Node]:
    """Find the operations of norms that are written out, from the squares to the scale and shift behind them.

    Args:
        graph: A captured graph.
        fed: The nodes of it that depend on what the network is fed.
    """
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if node.target in _INVERSES:
            divisor: Any = node.args[0]
        elif node.target is aten.div.Tensor and node.args[1] in fed:
            divisor = node.args[1]
        else:
            continue
        trail = _trail(divisor, fed)
        if trail:
            found |= {*trail, node}
            for result in _products(node) if node.target in _INVERSES else [node]:
                found |= {
                    result,
                    *_scaled(result, fed),
                    *(part for operand in result.args for part in _centred(operand)),
                }
    return found


def logarithms(graph: GraphModule, fed: set[Node]) -> set[Node]:
    """Find logarithms and the operations of single values that lead to them, back to the layer whose values these are.

    Args:
        graph: A captured graph.
        fed: The nodes of it that depend on what the network is fed.
    """
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if node.target not in _LOGARITHMS:
            continue
        found.add(node)
        source: Any = node.args[0]
        while source in fed and source not in found:
            reduced = source.target in _SUMS or _is_square(source)
            following = source.args[0] if reduced else _single_operand(source, fed)
            if following is None:
                break
            found.add(source)
            source = following
    return found


def _single_operand(node: Node, fed: set[Node]) -> Any:
    """The one value that an operation of single values is fed, numbers and constants aside; ``None`` of others."""
    if node.target in _PASSING:
        return node.args[0]
    operands = [arg for arg in node.args[:2] if arg in fed] if node.target in _WITH_NUMBERS else []
    return operands[0] if len(operands) == 1 else None


def _trail(divisor: Node, fed: set[Node]) -> list[Node]:
    """What a size is made by, back to the values that it is the size of; nothing of what is no size."""
    found, node = [], divisor
    while node.target not in _SUMS | _SIZES:
        following = _single_operand(node, fed)
        if not isinstance(following, Node):
            return []
        found.append(node)
        node = following
    found.append(node)
    squares = node.args[0]
    assert isinstance(squares, Node)
    if node.target in _SUMS and _is_square(squares):
        found.append(squares)
        found += _centred(squares.args[0])
    return found


def _is_square(node: Node) -> bool:
    return node.target in _SQUARES or (node.target is aten.mul.Tensor and node.args[0] is node.args[1])


def _centred(node: Any) -> list[Node]:
    """A difference between a value and its mean, and that mean; nothing of what is none."""
    if not isinstance(node, Node) or node.target is not aten.sub.Tensor:
        return []
    value, mean = node.args[:2]
    is_one = isinstance(mean, Node) and mean.target in _SUMS and mean.args[0] is value
    return [node, mean] if is_one else []  # type: ignore[list-item]


def _products(inverse: Node) -> list[Node]:
    """The products that an inverse is a factor of."""
    found, reached = [], [inverse]
    for node in reached:  # grows while it is walked
        for user in node.users:
            if user.target is aten.mul.Tensor:
                found.append(user)
            elif user.target in _SHAPING and user.args[0] is node:
                reached.append(user)
    return [*found, *reached]


def _scaled(node: Node, fed: set[Node]) -> list[Node]:
    """What scales and shifts a norm's result by numbers of the network's own, for nobody else."""
    found: list[Node] = []
    while len(node.users) == 1:
        (user,) = node.users
        is_affine = user.target in _WITH_NUMBERS and fed.isdisjoint({*user.all_input_nodes} - {node})
        if not is_affine and user.target is not aten.to.dtype:
            break
        found.append(user)
        node = user
    return found
