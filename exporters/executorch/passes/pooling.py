"""Means, extremes and average pools in the forms that XNNPACK has."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from lightning_edge.exporters.executorch.passes.graph import QUANTIZE, in_two_dimensions, quantized, sliced, view
from lightning_edge.exporters.passes.base import each_node
from lightning_edge.exporters.passes.graph import insert, replaced, shape_of

_ATEN = torch.ops.aten
_POOLS = {_ATEN.avg_pool2d.default, _ATEN.adaptive_avg_pool2d.default}


@each_node
def keep_dimensions_of_means(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Average over dimensions that are kept, and drop them in a view.

    Given: a mean over height and width, of tokens or of features.

    Result: a mean over height and width that keeps them, of an image, and a view in the shape of the result.

    Why: XNNPACK has no other mean (executorch 1.4): it would run outside the delegate, in float where it is int8.
    """
    if node.target is not _ATEN.mean.dim or node.kwargs:
        return False
    source, dims = node.args[:2]
    keeps, rank = len(node.args) > 2 and bool(node.args[2]), len(shape_of(source))
    over = sorted(int(str(dim)) % rank for dim in dims) if isinstance(dims, list | tuple) and rank else []
    if rank in (2, 3, 4) and over == [rank - 1]:
        source = _image_of_features(graph, node, source)
    elif (rank, over) in ((3, [1]), (4, [1, 2])) and not keeps:
        source = _image_of_tokens(graph, node, source)
    elif (rank, over) != (4, [2, 3]) or keeps:
        return False
    kept = insert(graph, node, _ATEN.mean.dim, source, [-1, -2], True)
    return _reshaped(graph, node, kept, source)


def _image_of_tokens(graph: fx.GraphModule, before: fx.Node, tokens: Any) -> fx.Node:
    """Give tokens, or an image with the channels last, as an image of one column, in their quantization."""
    batch, *counts, channels = shape_of(tokens)
    count = math.prod(counts)
    column = view(graph, before, tokens, [batch, count, 1, channels])
    column = quantized(graph, before, column, tokens)
    return quantized(graph, before, insert(graph, before, _ATEN.permute.default, column, [0, 3, 1, 2]), tokens)


def _image_of_features(graph: fx.GraphModule, before: fx.Node, features: Any) -> fx.Node:
    """Give rows of features as an image one high with a channel for each row, in their quantization."""
    *others, count = shape_of(features)
    image = view(graph, before, features, [*in_two_dimensions(others), 1, count])
    return quantized(graph, before, image, features)


@each_node
def keep_dimensions_of_extremes(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Take the largest or smallest along dimensions that are kept, and drop them in a view.

    Given: ``amax`` or ``amin`` that drops its dimensions.

    Result: one that keeps them, and a view.

    Why: XNNPACK has no other (executorch 1.4).
    """
    if node.target not in (_ATEN.amax.default, _ATEN.amin.default) or (len(node.args) > 2 and node.args[2]):
        return False
    kept = insert(graph, node, node.target, *node.args[:2], True)
    return _reshaped(graph, node, kept, node.args[0])


def _reshaped(graph: fx.GraphModule, node: fx.Node, kept: fx.Node, source: Any) -> bool:
    """Let what keeps the dimensions of its source stand for a node that does not, viewed in the node's shape; True."""
    readers = list(node.users)
    if len(readers) == 1 and str(readers[0].target) == QUANTIZE:
        # It needs its own quantizers, or it is no int8 operation; the same ones, so nothing is rounded twice.
        kept = quantized(graph, node, kept, source, scale=readers[0].args[1:])
    return replaced(graph, node, view(graph, node, kept, shape_of(node)))


@each_node
def average_whole_images(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Average whole images by a mean.

    Given: an average pool whose result is one value a channel.

    Result: a mean over height and width that keeps them, of the part of the image that the pool covers.

    Why: XNNPACK has no such pool in int8 (executorch 1.4): it would run in float, outside the delegate.
    """
    if node.target not in _POOLS or len(node.args) > 3 or shape_of(node)[2:] != (1, 1):
        return False
    source, kernel = node.args[:2]
    assert isinstance(source, fx.Node)
    assert isinstance(kernel, list | tuple)
    if node.target is _ATEN.avg_pool2d.default:
        sizes = [int(str(size)) for size in kernel] * (2 // len(kernel))
        for dim, size in zip((2, 3), sizes, strict=True):
            source = _first(graph, node, source, dim, size)
    return replaced(graph, node, insert(graph, node, _ATEN.mean.dim, source, [-1, -2], True))


def _first(graph: fx.GraphModule, before: fx.Node, source: fx.Node, dim: int, size: int) -> fx.Node:
    """Cut rows that the pool leaves out, in the quantization of what they are cut from."""
    if shape_of(source)[dim] == size:
        return source
    cut = sliced(graph, before, source, dim, 0, size)
    cut.meta["val"] = source.meta["val"].narrow(dim, 0, size)
    return cut
