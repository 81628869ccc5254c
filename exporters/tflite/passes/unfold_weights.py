"""Write int8 constants as float constants that are quantized, for LiteRT's converter."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import fx

from lightning_edge.exporters.passes.graph import operation

_QUANTIZED = torch.ops.quantized_decomposed
_QUANTIZE = {
    "dequantize_per_channel": _QUANTIZED.quantize_per_channel.default,
    "dequantize_per_tensor": _QUANTIZED.quantize_per_tensor.default,
}


def unfold_weights(graph: fx.GraphModule) -> bool:
    """Quantize constants in the graph.

    Given: ``dequantize(constant of integers)``.

    Result: ``dequantize(quantize(constant of floats))``, the floats being what the integers stand for. Quantizing them
    gives the same integers again: each is a whole number of steps.

    Why: LiteRT's converter refuses constants of integers (litert-torch 0.10), and quantizes those of floats by itself.
    It rounds halves otherwise than torch does, and there are none here.
    """
    changed = False
    for node in list(graph.graph.nodes):
        quantize = _QUANTIZE.get(operation(node))
        if quantize is None:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            continue
        with torch.no_grad():
            arguments = fx.node.map_arg(node.args, lambda part: attrgetter(str(part.target))(graph).detach())
            values = node.target(*arguments)
        name = f"unfolded_{source.name}"
        while hasattr(graph, name):  # another operation may read the same integers in other steps
            name += "_"
        graph.register_buffer(name, values)
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(name)
            constant.meta = {**source.meta, "val": node.meta.get("val")}
            quantized = graph.graph.call_function(quantize, (constant, *node.args[1:]))
            quantized.meta = dict(source.meta)
        node.update_arg(0, quantized)
        changed = True
    return changed
