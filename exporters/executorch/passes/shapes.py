"""Selections, splits, rolls and upsampling as views, slices and concatenations, which XNNPACK has."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from lightning_edge.exporters.executorch.passes.graph import quantized, sliced, view
from lightning_edge.exporters.passes.base import each_node
from lightning_edge.exporters.passes.graph import insert, replaced, shape_of

_ATEN = torch.ops.aten
_UPSAMPLES = {_ATEN.upsample_nearest2d.vec, _ATEN.upsample_nearest2d.default}
_SQUEEZES = {_ATEN.squeeze.default, _ATEN.squeeze.dim, _ATEN.squeeze.dims, _ATEN.unsqueeze.default}
_SPLITS = {_ATEN.chunk.default, _ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.unbind.int}


@each_node
def view_squeezes(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Drop or add dimensions of one by a view.

    Given: ``squeeze`` or ``unsqueeze``.

    Result: a view.

    Why: XNNPACK has views, and none of these (executorch 1.4).
    """
    if node.target not in _SQUEEZES:
        return False
    return replaced(graph, node, view(graph, node, node.args[0], shape_of(node)))


@each_node
def drop_whole_slices(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Drop slices that take all of a dimension.

    Given: a slice from the start to the end with a step of one, such as the first in ``x[:, 0]``.

    Result: the value it is selected from.

    Why: a no-op would run outside the delegate.
    """
    if node.target is not _ATEN.slice.Tensor:
        return False
    given = dict(zip(("start", "stop", "step"), node.args[2:], strict=False))
    stop = given.get("stop")
    is_end = stop is None or (isinstance(stop, int) and stop >= sys.maxsize)
    if given.get("start") or given.get("step", 1) != 1 or not is_end:
        return False
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.graph.erase_node(node)
    return True


@each_node
def drop_single_repeats(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Drop repetitions that give one copy.

    Given: a ``repeat`` or ``tile`` once in each of the dimensions there are, such as a position embedding for a batch
    of one.

    Result: what it repeats.

    Why: a no-op would run outside the delegate.
    """
    if node.target not in (_ATEN.repeat.default, _ATEN.tile.default):
        return False
    source, times = node.args
    assert isinstance(source, fx.Node)
    if any(count != 1 for count in times) or source.meta["val"].dim() < len(times):  # type: ignore[union-attr, arg-type]
        return False
    node.replace_all_uses_with(source)
    graph.graph.erase_node(node)
    return True


@each_node
def slice_selections(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Select by a slice.

    Given: ``select``: one of a dimension.

    Result: a slice, and a view without that dimension.

    Why: XNNPACK has slices, and no selection (executorch 1.4).
    """
    if node.target is not _ATEN.select.int:
        return False
    source, dim, index = node.args
    return replaced(graph, node, _selected(graph, node, source, dim, index))


@each_node
def slice_splits(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Split by slices.

    Given: ``chunk``, ``split`` or ``unbind``.

    Result: a slice for each part that is read.

    Why: XNNPACK has slices, and no split (executorch 1.4).
    """
    if node.target not in _SPLITS:
        return False
    source, *given = node.args
    dim = given.pop() if len(given) == (1 if node.target is _ATEN.unbind.int else 2) else node.kwargs.get("dim", 0)
    start = 0
    parts = {int(str(part.args[1])): part for part in node.users}
    for index, value in enumerate(node.meta["val"]):
        part = parts.get(index)
        length = 1 if node.target is _ATEN.unbind.int else value.shape[dim]
        if part is not None and node.target is _ATEN.unbind.int:
            replaced(graph, part, _selected(graph, part, source, dim, index))
        elif part is not None:
            replaced(graph, part, insert(graph, part, _ATEN.slice.Tensor, source, dim, start, start + length))
        start += length
    graph.graph.erase_node(node)
    return True


def _selected(graph: fx.GraphModule, before: fx.Node, source: Any, dim: Any, index: Any) -> fx.Node:
    """Give one of a dimension without that, in the quantization of what it is taken from."""
    start = index % shape_of(source)[dim]
    kept = sliced(graph, before, source, dim, start, start + 1)
    return view(graph, before, kept, shape_of(before))


@each_node
def join_rolled_parts(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Roll by joining two parts the other way around.

    Given: ``roll`` along named dimensions.

    Result: two slices and a concatenation for each dimension.

    Why: ExecuTorch's own decomposition is an index by computed places, outside the delegate.
    """
    if node.target is not _ATEN.roll.default or len(node.args) < 3 or not node.args[2]:
        return False
    result, shifts, dims = node.args
    shape, source = shape_of(node), result
    for shift, dim in zip(shifts, dims, strict=True):  # type: ignore[arg-type]
        start = -shift % shape[dim]
        if start:
            parts = [sliced(graph, node, result, dim, *ends) for ends in ((start, shape[dim]), (0, start))]
            result = quantized(graph, node, insert(graph, node, _ATEN.cat.default, parts, dim), source)
    return replaced(graph, node, result)  # type: ignore[arg-type]


@each_node
def join_upsampled_rows(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Repeat rows and columns by joining them to themselves, in NHWC.

    Given: upsampling to the nearest by whole factors up to four.

    Result: views and concatenations, each in the quantization of the image.

    Why: it is a portable kernel in float otherwise (executorch 1.4).
    """
    if node.target not in _UPSAMPLES:
        return False
    source: Any = node.args[0]
    (batch, channels, height, width), (*_, rows, columns) = shape_of(source), shape_of(node)
    tall, wide = rows // height, columns // width
    if (rows, columns) != (tall * height, wide * width) or not 1 <= tall <= 4 or not 1 <= wide <= 4:
        return False

    def like_source(value: fx.Node) -> fx.Node:
        return quantized(graph, node, value, source)

    def repeated(value: fx.Node, shape: list[int], times: int) -> fx.Node:
        # A view for each: XNNPACK is handed concatenations of two different tensors or more.
        parts = [like_source(view(graph, node, value, shape)) for _ in range(times)]
        return like_source(insert(graph, node, _ATEN.cat.default, parts, 2)) if times > 1 else parts[0]

    last = like_source(insert(graph, node, _ATEN.permute.default, source, [0, 2, 3, 1]))
    result = repeated(last, [batch, height * width, channels], wide)
    # Only concatenations leave columns and channels in one piece of memory, which a view of them as one needs.
    row = [columns * channels] if wide > 1 else [columns, channels]
    result = repeated(result, [batch, height, *row], tall)
    result = like_source(view(graph, node, result, [batch, rows, columns, channels]))
    return replaced(graph, node, insert(graph, node, _ATEN.permute.default, result, [0, 3, 1, 2]))
