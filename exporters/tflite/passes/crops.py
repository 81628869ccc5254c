"""Crop the outputs of transposed convolutions by slices, where LiteRT crops otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from lightning_edge.exporters.passes.transposed_convolutions import TransposedConvolution, move_behind

_ATEN = torch.ops.aten
_TRANSPOSED = _ATEN.conv_transpose2d.input


def crop_transposed(graph: fx.GraphModule) -> bool:
    """Let transposed convolutions crop nothing, and slices crop what they give.

    Given: a transposed convolution with a padding that LiteRT's SAME does not have, such as one with a kernel of 3,
    stride 2, padding 1 and output padding 1.

    Result: the layer without padding, and a slice behind it along each axis.

    Why: a transposed convolution crops its result by its padding before, and by that less the output padding behind.
    LiteRT crops evenly or one more behind, and its converter refuses all else (litert-torch 0.10).
    """
    found = list(_cropped(graph))
    for layer, sizes in found:
        node, whole = layer.node, [0, 0]
        node.args = (layer.x, layer.weight, layer.bias, layer.stride, whole, whole, layer.groups, layer.dilation)
        axes = enumerate(zip(layer.padding, sizes, strict=True), start=2)
        moves = [(_ATEN.slice.Tensor, (axis, first, first + size)) for axis, (first, size) in axes]
        for place in [node] if layer.quantize is None else list(layer.quantize.users):
            move_behind(graph.graph, place, layer.quantize, moves)
    return bool(found)


def has_no_kernel(layer: TransposedConvolution) -> bool:
    """Say whether LiteRT lacks an int8 kernel for a transposed convolution: it has those of images in one group."""
    uncommon = layer.dimensions == 1 or layer.groups > 1 or max(layer.dilation) > 1
    return uncommon or any(more > cut for more, cut in zip(layer.output_padding, layer.padding, strict=True))


def _cropped(module: fx.GraphModule) -> Iterator[tuple[TransposedConvolution, list[int]]]:
    """Find the layers that crop otherwise than LiteRT; with the size that stays of each axis."""
    for node in module.graph.nodes:
        if node.target is not _TRANSPOSED or "val" not in node.meta:
            continue
        layer = TransposedConvolution(node)
        axes = list(zip(layer.kernel(module), layer.stride, layer.padding, layer.output_padding, strict=True))
        if any(back > before for _, _, before, back in axes) or not any(layer.padding):
            continue
        if any((before, before - back) != _same(size, step) for size, step, before, back in axes):
            yield layer, [int(size) for size in node.meta["val"].shape[2:]]


def _same(kernel: int, stride: int) -> tuple[int, int]:
    total = max(kernel - stride, 0)
    return total // 2, total - total // 2
