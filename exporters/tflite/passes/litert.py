"""Write for LiteRT's converter what it cannot take as PyTorch has it, in the same values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from lightning_edge.exporters.passes.fold_constants import compute_before
from lightning_edge.exporters.passes.transposed_convolutions import TransposedConvolution, as_convolutions, move_behind
from lightning_edge.exporters.tflite.passes.broadcasts import without_expansions
from lightning_edge.exporters.tflite.passes.reshapes import reshape_results
from lightning_edge.network import Deployable

_ATEN = torch.ops.aten
_TRANSPOSED = _ATEN.conv_transpose2d.input


def for_litert(network: Deployable, samples: int = 1) -> nn.Module:
    """Give the graph of a network in the form that LiteRT's converter takes; as another module if anything changes.

    Of transposed convolutions in int8 LiteRT has those of images in one group, see `tflite_layers`, for as many samples
    as the file says. The others, and what its converter refuses, are written as convolutions.

    Transposed convolutions crop what they give: before by their padding, behind by that less the output padding. LiteRT
    crops as its SAME does, evenly or one more behind, and the converter refuses what is cropped otherwise, as by a
    kernel of 3 with stride 2, padding 1 and output padding 1. Such a layer gives all, and slices cut it. Expansions of
    images come out wrong, see `litert_broadcasts`, and sums of two parts of one value, see `litert_reshapes`.

    Args:
        network: What is exported.
        samples: For how many samples in a call.
    """
    several = network.interface.max_batch > 1
    graph = as_convolutions(network.unfolded or network.graph, lambda layer: several or _is_none_of_litert(layer))
    network = network.with_graph(graph)
    traced = network.program(fold_weights=False, samples=samples).module()
    assert isinstance(traced, fx.GraphModule)
    steps = (compute_before, _crop_by_slices, without_expansions, reshape_results)
    if any([step(traced) for step in steps]):
        return traced
    return network.graph


def _is_none_of_litert(layer: TransposedConvolution) -> bool:
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


def _crop_by_slices(module: fx.GraphModule) -> bool:
    found = list(_cropped(module))
    for layer, sizes in found:
        node, whole = layer.node, [0, 0]
        node.args = (layer.x, layer.weight, layer.bias, layer.stride, whole, whole, layer.groups, layer.dilation)
        axes = enumerate(zip(layer.padding, sizes, strict=True), start=2)
        moves = [(_ATEN.slice.Tensor, (axis, first, first + size)) for axis, (first, size) in axes]
        for place in [node] if layer.quantize is None else list(layer.quantize.users):
            move_behind(module.graph, place, layer.quantize, moves)
    if found:
        module.recompile()
    return bool(found)
