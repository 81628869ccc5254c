"""Activations in the operations that XNNPACK has."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from lightning_edge.exporters.passes.base import each_node
from lightning_edge.exporters.passes.graph import constant, insert, operation, replaced

_ATEN = torch.ops.aten


@each_node
def clamp_as_hardtanh(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Clamp as hardtanh does.

    Given: ``clamp`` of floats.

    Result: ``hardtanh`` with the same bounds.

    Why: XNNPACK's lowering joins only that with the layer before it in int8 (executorch 1.4).
    """
    if node.target is not _ATEN.clamp.default or not node.meta["val"].is_floating_point():
        return False
    given = dict(zip(("min", "max"), node.args[1:], strict=False)) | node.kwargs
    limit = torch.finfo(torch.float32).max
    low, high = given.get("min"), given.get("max")
    bounds = (-limit if low is None else low, limit if high is None else high)
    return replaced(graph, node, insert(graph, node, _ATEN.hardtanh.default, node.args[0], *bounds))


@each_node
def multiply_cubes(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Multiply for the third power, as in GELU's approximation.

    Given: ``x ** 3``.

    Result: ``x * x * x``.

    Why: XNNPACK has the second power only (executorch 1.4).
    """
    if node.target is not _ATEN.pow.Tensor_Scalar or node.args[1] != 3:
        return False
    x = node.args[0]
    return replaced(graph, node, insert(graph, node, _ATEN.mul.Tensor, insert(graph, node, _ATEN.mul.Tensor, x, x), x))


@each_node
def write_out_softplus(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Write out softplus and mish.

    Given: ``softplus(x)``, or ``mish(x)``, which is x tanh(softplus(x)).

    Result: ``relu(x) + log(1 + exp(-|x|))`` and what else it takes, in operations that XNNPACK has.

    Why: with 8-bit values around it, ExecuTorch 1.4 fails to lower its own choice by size, or to run it.
    """
    if node.target not in (_ATEN.softplus.default, _ATEN.mish.default):
        return False
    # Its threshold only says from where on softplus is x, to rounding.
    given = dict(zip(("beta", "threshold"), node.args[1:], strict=False)) | node.kwargs
    beta = float(str(given.get("beta", 1.0)))
    source: Any = node.args[0]
    if beta != 1.0:
        factor = constant(graph, node, "beta", torch.tensor([beta]), node)
        source = insert(graph, node, _ATEN.mul.Tensor, source, factor)
    size = insert(graph, node, _ATEN.abs.default, source)
    small = insert(graph, node, _ATEN.exp.default, insert(graph, node, _ATEN.neg.default, size))
    one = constant(graph, node, "one", torch.tensor([1.0]), node)
    rest = insert(graph, node, _ATEN.log.default, insert(graph, node, _ATEN.add.Tensor, small, one))
    result = insert(graph, node, _ATEN.add.Tensor, insert(graph, node, _ATEN.relu.default, source), rest)
    if beta != 1.0:
        inverse = constant(graph, node, "inverse", torch.tensor([1 / beta]), node)
        result = insert(graph, node, _ATEN.mul.Tensor, result, inverse)
    if node.target is _ATEN.mish.default:
        result = insert(graph, node, _ATEN.mul.Tensor, source, insert(graph, node, _ATEN.tanh.default, result))
    return replaced(graph, node, result)


@each_node
def write_out_tanh_gelu(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Write out the tanh form of GELU in float networks.

    Given: ``gelu(x, approximate="tanh")`` of a value that is not dequantized.

    Result: ``0.5 * x * (1 + tanh(0.7978846 * (x + 0.044715 * x ** 3)))``.

    Why: XNNPACK's one GELU is the exact one (executorch 1.4), which differs by up to 0.0005. That is below a step of
    8-bit values, and in int8 the exact form is one look-up in a table: there it stays.
    """
    is_tanh = node.target is _ATEN.gelu.default and node.kwargs.get("approximate") == "tanh"
    if not is_tanh or operation(node.args[0]).startswith("dequantize"):  # type: ignore[arg-type]
        return False
    x: Any = node.args[0]

    def times(value: Any, role: str, factor: float) -> fx.Node:
        return insert(graph, node, _ATEN.mul.Tensor, value, constant(graph, node, role, torch.tensor([factor]), x))

    cube = times(
        insert(graph, node, _ATEN.mul.Tensor, insert(graph, node, _ATEN.mul.Tensor, x, x), x), "cube", 0.044715
    )
    inner = times(insert(graph, node, _ATEN.add.Tensor, x, cube), "root", math.sqrt(2 / math.pi))
    one = constant(graph, node, "one", torch.tensor([1.0]), x)
    outer = insert(graph, node, _ATEN.add.Tensor, insert(graph, node, _ATEN.tanh.default, inner), one)
    return replaced(graph, node, insert(graph, node, _ATEN.mul.Tensor, times(x, "half", 0.5), outer))
