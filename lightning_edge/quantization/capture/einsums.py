"""Einsums of one operand that only reorder its dimensions, as the permutations they are. Knows torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from lightning_edge.quantization.capture.nodes import call

aten = torch.ops.aten


def permutation(graph: GraphModule, node: Node) -> Node:
    """Write ``einsum("abc->acb", x)`` as a permutation, whose range is that of ``x``; any other einsum stays.

    Args:
        graph: A captured graph, at the insertion point in front of the node.
        node: An einsum.
    """
    equation, operands = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(operands, list | tuple)
    before, arrow, after = equation.replace(" ", "").partition("->")
    if len(operands) > 1 or not arrow or not before.isalpha() or len(set(before)) < len(before):
        return node  # sums, diagonals, and dots for any number of dimensions
    if sorted(before) != sorted(after):
        return node
    order: Any = [before.index(letter) for letter in after]
    return call(graph, aten.permute.default, operands[0], order, instead_of=node)
