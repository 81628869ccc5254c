"""Leave out weights of convolutions that only ever meet padding."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from lightning_edge.exporters.passes.graph import operation, shape_of

_CONVOLUTIONS = {name: getattr(torch.ops.aten, name).default for name in ("conv1d", "conv2d", "conv3d")}
# What an operation does where it is given no stride, padding and dilation, by their places among its arguments.
_DEFAULTS = {3: 1, 4: 0, 5: 1}
_PADDING = 4


def trim_kernels(graph: fx.GraphModule) -> bool:
    """Trim kernels to the weights that meet values.

    Given: a convolution, padded with zeros, whose kernel is wider than its image, as the last ones of a network made
    for large images are when it is fed with small ones.

    Result: a convolution with a smaller kernel and less padding. What is left out multiplied zeros. Weights that
    something else reads as well stay.

    Why: a file has one size of image. Of ResNet-18 with ten classes, over 32 x 32 pixels, 62 % of the
    weights never meet a value.
    """
    stored = Counter(node.target for node in graph.graph.nodes if node.op == "get_attr")
    changed = False
    for node in graph.graph.nodes:
        weight = _stored_weight(node)
        if weight is None or len(weight.users) > 1 or stored[weight.target] > 1:
            continue
        values = attrgetter(str(weight.target))(graph)
        kept = _kept(node, values.shape[2:])
        if kept is None:
            continue
        less = values.detach()
        for axis, (start, end) in enumerate(kept[0], 2):
            less = less.narrow(axis, start, end - start)
        less = less.contiguous()
        holder, _, name = str(weight.target).rpartition(".")
        is_trained = isinstance(values, nn.Parameter)
        setattr(graph.get_submodule(holder), name, nn.Parameter(less, values.requires_grad) if is_trained else less)
        weight.meta.pop("val", None)
        node.target = _CONVOLUTIONS[operation(node)]
        node.update_arg(_PADDING, kept[1])
        changed = True
    return changed


def _stored_weight(node: fx.Node) -> fx.Node | None:
    """Where a convolution's weight is stored, in front of its quantization; ``None`` if it is computed or shared."""
    if operation(node) not in _CONVOLUTIONS or node.kwargs:
        return None
    weight: Any = node.args[1]
    while "quantize_per_" in operation(weight) and len(weight.users) == 1:
        weight = weight.args[0]
    return weight if weight.op == "get_attr" else None


def _kept(node: fx.Node, kernel: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]] | None:
    """Which weights to keep along each axis, from and to, and how to pad then; ``None`` to keep all."""
    image: Any = node.args[0]
    while "quantize_per_" in operation(image):
        image = image.args[0]
    sizes, outputs = shape_of(image)[2:], shape_of(node)[2:]
    if not sizes or not outputs or not all(isinstance(size, int) for size in (*sizes, *outputs)):
        return None  # unknown, or as large as the number of samples
    stride, padding, dilation = (
        node.args[place] if place < len(node.args) else default for place, default in _DEFAULTS.items()
    )
    strides, dilations = _for_each_axis(stride, len(kernel)), _for_each_axis(dilation, len(kernel))
    if isinstance(padding, str):
        total = [(size - 1) * spacing for size, spacing in zip(kernel, dilations, strict=True)]
        if padding != "same" or any(amount % 2 for amount in total):  # "valid", or padded more behind than before
            return None
        padding = [amount // 2 for amount in total]
    paddings = _for_each_axis(padding, len(kernel))
    axes = zip(sizes, outputs, kernel, strides, paddings, dilations, strict=True)
    ends, paddings = map(list, zip(*(_kept_along(*axis) for axis in axes), strict=True))
    return None if ends == [(0, size) for size in kernel] else (ends, paddings)


def _for_each_axis(value: Any, axes: int) -> list[int]:
    """One number for each axis; an operation may be given one for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _kept_along(
    image: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[tuple[int, int], int]:
    """Which weights to keep along an axis, from and to, and how much to pad at both ends then."""
    starts = range(-padding, outputs * stride - padding, stride)
    met = [place for place in range(kernel) if any(0 <= start + place * dilation < image for start in starts)]
    if not met:
        return (0, kernel), padding

    def gives_as_many(start: int, end: int) -> bool:
        reach = image + 2 * (padding - start * dilation) - (end - start - 1) * dilation
        return (reach - 1) // stride + 1 == outputs

    least = min(met[0], padding // dilation)
    choices = itertools.product(range(least + 1), range(met[-1] + 1, kernel + 1))
    start, end = min((ends for ends in choices if gives_as_many(*ends)), key=lambda ends: ends[1] - ends[0])
    return (start, end), padding - start * dilation
