"""Write operations in the form that XNNPACK takes, or takes without a fault: averages, softmax of images, attention."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lightning_edge.exporters.executorch.passes.graph import (
    QUANTIZE,
    constant,
    insert,
    quantized,
    replaced,
    sizes,
    sliced,
    view,
)
from lightning_edge.exporters.passes.graph import shape_of

_ATEN = torch.ops.aten

_POOLS = {_ATEN.avg_pool2d.default, _ATEN.adaptive_avg_pool2d.default}
_UPSAMPLES = {_ATEN.upsample_nearest2d.vec, _ATEN.upsample_nearest2d.default}
_SQUEEZES = {_ATEN.squeeze.default, _ATEN.squeeze.dim, _ATEN.squeeze.dims, _ATEN.unsqueeze.default}
_SPLITS = {_ATEN.chunk.default, _ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.unbind.int}


def in_its_forms(graph: fx.GraphModule, backend: str) -> bool:
    """Rewrite averages, softmax over the rows of images, LayerNorm, attention in float, and what takes parts.

    A mean over height and width that does not keep them leaves the delegate, and so does an average pool over the whole
    image; an int8 network then computes its average in float. Softmax behind a convolution is delegated, and wrong. Of
    attention torch makes a softmax that minds rows with everything masked, most of it outside the delegate. Dimensions
    of one that come and go, one of a dimension, and parts of it leave the delegate, which has views and slices, and so
    does LayerNorm, which it has as what that is made of.

    Args:
        graph: What is lowered, rewritten in place; the first dimension of its inputs may be free.
        backend: Vulkan has the same forms of averages and softmax, and the rest as it is. ExecuTorch's own kernels
            take a split for one number of samples only.

    Returns:
        Whether anything was rewritten.
    """
    rewrites = {"vulkan": [_mean, _pool, _softmax], "portable": [_split], "xnnpack": _REWRITES}[backend]
    changed = [rewrite(graph, node) for rewrite in rewrites for node in list(graph.graph.nodes)]
    graph.graph.lint()
    graph.recompile()
    return any(changed)


def _mean(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Take a mean over height and width, of tokens or of features, as one over height and width that keeps them."""
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
    image = view(graph, before, features, [*_in_two(others), 1, count])
    return quantized(graph, before, image, features)


def _in_two(others: Sequence[Any]) -> tuple[Any, Any]:
    """Give what stands before the features as two dimensions, the samples first where there are some."""
    if len(others) > 1 or not isinstance(others[0], int):
        return others[0], math.prod(others[1:])
    return 1, others[0]


def _extreme(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Take the largest or smallest along dimensions with these kept, and drop them behind: what the delegate has."""
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


def _pool(graph: fx.GraphModule, node: fx.Node) -> bool:
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


def _attention(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Compute attention without a mask, under one that is always the same, or causal, as two products and a softmax."""
    if node.target is not _ATEN.scaled_dot_product_attention.default:
        return False
    query, key, value, *others = node.args
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), others, strict=False)) | node.kwargs
    scale, causal = given.pop("scale", None), given.pop("is_causal", False)
    mask = _added_mask(graph, given.pop("attn_mask", None))
    apart = any(shape_of(operand)[:-2] != shape_of(query)[:-2] for operand in (key, value))
    if mask is None or any(other is not None and other for other in given.values()) or apart:
        return False
    factor = torch.tensor([shape_of(query)[-1] ** -0.5 if scale is None else float(str(scale))])
    scaled = insert(graph, node, _ATEN.mul.Tensor, query, constant(graph, node, "factor", factor, query))
    scores = insert(graph, node, _ATEN.matmul.default, scaled, insert(graph, node, _ATEN.transpose.int, key, -2, -1))
    if causal:
        unseen = torch.ones(shape_of(query)[-2], shape_of(key)[-2], dtype=torch.bool).triu(1)
        mask = mask + torch.zeros(unseen.shape).masked_fill(unseen, -torch.inf)
    if mask.any():
        scores = insert(graph, node, _ATEN.add.Tensor, scores, constant(graph, node, "mask", mask, query))
    scores.meta["val"] = query.meta["val"] @ key.meta["val"].mT  # type: ignore[union-attr]
    weights = insert(graph, node, _ATEN.softmax.int, scores, -1)
    weights.meta["val"] = scores.meta["val"]
    result = insert(graph, node, _ATEN.matmul.default, weights, value)
    return replaced(graph, node, result)


def _added_mask(graph: fx.GraphModule, mask: Any) -> torch.Tensor | None:
    """Give what a mask adds to the scores, 0 without one; ``None`` if that is not known, or leaves nothing of a row."""
    if mask is None:
        return torch.zeros(())
    if mask.target is _ATEN.expand.default:  # to the samples, which a sum spreads it to anyway
        mask = mask.args[0]
    if mask.op != "get_attr":
        return None
    value: torch.Tensor = operator.attrgetter(str(mask.target))(graph)
    if value.dtype is torch.bool:
        value = torch.zeros(value.shape).masked_fill(~value, -torch.inf)
    return None if bool((value == -torch.inf).all(-1).any()) else value


def _layer_norm(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Compute LayerNorm over the last dimension in means, which are those of an image one high, and what is between.

    In float32 alone: means of half precision lose what the one operation keeps.
    """
    if node.target is not _ATEN.layer_norm.default:
        return False
    source, sizes, *given = node.args
    weight, bias, eps = (*given, *(None, None, 1e-5)[len(given) :])[:3]
    *others, channels = shape_of(source)
    is_float = isinstance(source, fx.Node) and source.meta["val"].dtype is torch.float32
    if not is_float or not isinstance(sizes, list | tuple) or len(sizes) > 1 or len(others) not in (1, 2, 3):
        return False
    batch, count = _in_two(others)
    if len(others) > 2:  # as tokens: what is four-dimensional is kept with another axis last
        others = [batch, count]
        source = view(graph, node, source, [*others, channels])
        source.meta["val"] = node.meta["val"].view(*others, channels)

    def mean(value: Any) -> fx.Node:
        image = view(graph, node, value, [batch, count, 1, channels])
        kept = insert(graph, node, _ATEN.mean.dim, image, [-1, -2], True)
        return view(graph, node, kept, [*others, 1])

    centred = insert(graph, node, _ATEN.sub.Tensor, source, mean(source))
    variance = mean(insert(graph, node, _ATEN.mul.Tensor, centred, centred))
    small = constant(graph, node, "eps", torch.tensor([float(str(eps))]), source)
    root = insert(graph, node, _ATEN.rsqrt.default, insert(graph, node, _ATEN.add.Tensor, variance, small))
    result = insert(graph, node, _ATEN.mul.Tensor, centred, root)
    if weight is not None:
        result = insert(graph, node, _ATEN.mul.Tensor, result, weight)
    if bias is not None:
        result = insert(graph, node, _ATEN.add.Tensor, result, bias)
    if len(shape_of(node)) > 3:
        result = view(graph, node, result, shape_of(node))
    return replaced(graph, node, result)


def _softmax(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Compute a softmax over the last of four dimensions on three.

    Behind a convolution the lowering keeps four dimensions with the channels last. It renumbers the axes of what it
    hands over (concatenation, slices, padding), but not that of softmax, which then is one over the channels.
    """
    if node.target is not _ATEN.softmax.int or len(shape_of(node)) != 4 or node.args[1] not in (-1, 3):
        return False
    batch, *between, last = shape = shape_of(node)
    flat = insert(graph, node, _ATEN.reshape.default, node.args[0], sizes([batch, math.prod(between), last]))
    result = insert(graph, node, node.target, flat, -1, *node.args[2:])
    return replaced(graph, node, view(graph, node, result, shape))


def _squeeze(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Drop or add dimensions of one as a view."""
    if node.target not in _SQUEEZES:
        return False
    return replaced(graph, node, view(graph, node, node.args[0], shape_of(node)))


def _whole(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Read what all is taken of: of a free dimension, such as the samples in ``x[:, 0]``, that is not seen before."""
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


def _select(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Take one of a dimension as a slice."""
    if node.target is not _ATEN.select.int:
        return False
    source, dim, index = node.args
    return replaced(graph, node, _taken(graph, node, source, dim, index))


def _split(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Take parts of a dimension as slices."""
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
            replaced(graph, part, _taken(graph, part, source, dim, index))
        elif part is not None:
            replaced(graph, part, insert(graph, part, _ATEN.slice.Tensor, source, dim, start, start + length))
        start += length
    graph.graph.erase_node(node)
    return True


def _taken(graph: fx.GraphModule, before: fx.Node, source: Any, dim: Any, index: Any) -> fx.Node:
    """Give one of a dimension without that, in the quantization of what it is taken from."""
    start = index % shape_of(source)[dim]
    kept = sliced(graph, before, source, dim, start, start + 1)
    return view(graph, before, kept, shape_of(before))


def _roll(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Roll a dimension by joining its two parts the other way around; it is an index by computed places otherwise."""
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


def _clamp(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Clamp as hardtanh does, which alone is taken together with the layer before it in int8."""
    if node.target is not _ATEN.clamp.default or not node.meta["val"].is_floating_point():
        return False
    given = dict(zip(("min", "max"), node.args[1:], strict=False)) | node.kwargs
    limit = torch.finfo(torch.float32).max
    low, high = given.get("min"), given.get("max")
    bounds = (-limit if low is None else low, limit if high is None else high)
    return replaced(graph, node, insert(graph, node, _ATEN.hardtanh.default, node.args[0], *bounds))


def _cube(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Multiply x by itself twice for its third power, as in GELU's approximation: the delegate has the second only."""
    if node.target is not _ATEN.pow.Tensor_Scalar or node.args[1] != 3:
        return False
    x = node.args[0]
    return replaced(graph, node, insert(graph, node, _ATEN.mul.Tensor, insert(graph, node, _ATEN.mul.Tensor, x, x), x))


def _softplus(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Compute softplus, and x tanh(softplus(x)), in operations that the delegate has.

    With 8-bit values around it, ExecuTorch (1.4) fails to lower its own choice by size, or to run it.
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


def _upsample(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Repeat rows and columns by concatenating them to themselves, with the channels last.

    Upsampling to the nearest is a portable kernel otherwise, in float.
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
    result = repeated(result, [batch, height, columns * channels], tall)
    result = like_source(view(graph, node, result, [batch, rows, columns, channels]))
    return replaced(graph, node, insert(graph, node, _ATEN.permute.default, result, [0, 3, 1, 2]))


_REWRITES = [
    _layer_norm,
    _attention,
    _mean,
    _extreme,
    _pool,
    _softmax,
    _squeeze,
    _whole,
    _select,
    _split,
    _roll,
    _clamp,
    _cube,
    _softplus,
    _upsample,
]
