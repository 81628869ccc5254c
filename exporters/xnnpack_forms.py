"""Write operations in the one form that XNNPACK takes, or takes without a fault: global averages, softmax of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_ATEN = torch.ops.aten
# By name, since they exist only where torchao has been imported.
_QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
_DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"


def in_its_forms(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Rewrite global averages, and softmax over the rows of images; the rest stays.

    A mean over height and width that does not keep them leaves the delegate, and so does an average pool over the whole
    image; an int8 network then computes its average in float. Softmax behind a convolution is delegated, and wrong.
    """
    graph = program.module()
    assert isinstance(graph, fx.GraphModule)
    changed = [rewrite(graph, node) for node in list(graph.graph.nodes) for rewrite in (_mean, _pool, _softmax)]
    if not any(changed):
        return program
    graph.graph.lint()
    graph.recompile()
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    with torch.no_grad():
        return torch.export.export(graph, args, kwargs, strict=False)


def _mean(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.target is not _ATEN.mean.dim or (len(node.args) > 2 and node.args[2]) or node.kwargs:
        return False
    source, dims = node.args[:2]
    rank = len(_shape(source))
    if rank != 4 or not isinstance(dims, list | tuple) or sorted(int(str(dim)) % rank for dim in dims) != [2, 3]:
        return False
    kept = _insert(graph, node, _ATEN.mean.dim, source, [-1, -2], True)
    readers = list(node.users)
    if len(readers) == 1 and str(readers[0].target) == _QUANTIZE:
        # The mean needs its own quantizers, or it is no int8 operation; the same ones, so nothing is rounded twice.
        kept = _quantized(graph, node, kept, source, readers[0].args[1:])
    flat = _insert(graph, node, _ATEN.view.default, kept, list(_shape(source)[:2]))
    node.replace_all_uses_with(flat)
    graph.graph.erase_node(node)
    return True


def _pool(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.target is not _ATEN.avg_pool2d.default or len(node.args) > 3 or _shape(node)[2:] != (1, 1):
        return False
    source, kernel = node.args[:2]
    assert isinstance(source, fx.Node)
    assert isinstance(kernel, list | tuple)
    sizes = [int(str(size)) for size in kernel] * (2 // len(kernel))
    for dim, size in zip((2, 3), sizes, strict=True):
        source = _first(graph, node, source, dim, size)
    node.replace_all_uses_with(_insert(graph, node, _ATEN.mean.dim, source, [-1, -2], True))
    graph.graph.erase_node(node)
    return True


def _softmax(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Compute a softmax over the last of four dimensions on three.

    Behind a convolution the lowering keeps four dimensions with the channels last. It renumbers the axes of what it
    hands over (concatenation, slices, padding), but not that of softmax, which then is one over the channels.
    """
    if node.target is not _ATEN.softmax.int or len(_shape(node)) != 4 or node.args[1] not in (-1, 3):
        return False
    batch, *_, last = shape = list(_shape(node))
    flat = _insert(graph, node, _ATEN.view.default, node.args[0], [batch, -1, last])
    result = _insert(graph, node, node.target, flat, -1, *node.args[2:])
    node.replace_all_uses_with(_insert(graph, node, _ATEN.view.default, result, shape))
    graph.graph.erase_node(node)
    return True


def _first(graph: fx.GraphModule, before: fx.Node, source: fx.Node, dim: int, size: int) -> fx.Node:
    """Cut rows that the pool leaves out, in the quantization of what they are cut from."""
    if _shape(source)[dim] == size:
        return source
    cut = _insert(graph, before, _ATEN.slice.Tensor, source, dim, 0, size)
    cut = _quantized(graph, before, cut, source, source.args[1:])
    cut.meta["val"] = source.meta["val"].narrow(dim, 0, size)
    return cut


def _quantized(graph: fx.GraphModule, before: fx.Node, node: fx.Node, like: Any, scale: tuple[Any, ...]) -> fx.Node:
    """Quantize and dequantize ``node`` if ``like``, which it was made from, is dequantized itself."""
    quantize = like.args[0] if str(like.target) == _DEQUANTIZE else None
    if not isinstance(quantize, fx.Node) or str(quantize.target) != _QUANTIZE:
        return node
    return _insert(graph, before, like.target, _insert(graph, before, quantize.target, node, *scale), *scale)


def _insert(graph: fx.GraphModule, before: fx.Node, target: Any, *args: Any) -> fx.Node:
    with graph.graph.inserting_before(before):
        return graph.graph.call_function(target, args)


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
