"""Activations that converters write in a form that loses their value."""

from __future__ import annotations

import torch
from torch import fx

from lightning_edge.exporters.passes.base import each_node
from lightning_edge.exporters.passes.graph import insert, replaced

_ATEN = torch.ops.aten


@each_node
def write_out_log_sigmoid(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Write log-sigmoid by softplus.

    Given: ``log_sigmoid(x)``.

    Result: ``-softplus(-x)``.

    Why: torch.onnx 2.13 writes ``log(sigmoid(x))``, which is -inf below -104. LiteRT's converter (litert-torch 0.10)
    writes a minimum with a number, which it moves to NHWC on one side only.
    """
    if node.target is not _ATEN.log_sigmoid.default:
        return False
    negative = insert(graph, node, _ATEN.neg.default, node.args[0])
    negative.meta["val"] = node.meta["val"]
    positive = insert(graph, node, _ATEN.softplus.default, negative)
    positive.meta["val"] = node.meta["val"]
    return replaced(graph, node, insert(graph, node, _ATEN.neg.default, positive))
