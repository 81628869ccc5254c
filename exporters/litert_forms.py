"""Write for LiteRT's converter what it cannot take as PyTorch has it, in the same values."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from lightning_edge.exporters.graphs import CLIPS, operation
from lightning_edge.exporters.litert_broadcasts import without_expansions
from lightning_edge.network import Deployable

_ATEN = torch.ops.aten
_TRANSPOSED = _ATEN.conv_transpose2d.input


def for_litert(network: Deployable, samples: int = 1) -> nn.Module:
    """Give the graph of a network in the form that LiteRT's converter takes; as another module if anything changes.

    Transposed convolutions crop what they give: before by their padding, behind by that less the output padding. LiteRT
    crops as its SAME does, evenly or one more behind, and the converter refuses what is cropped otherwise, as by a
    kernel of 3 with stride 2, padding 1 and output padding 1. Such a layer gives all, and slices cut it. Expansions of
    images come out wrong, see `litert_broadcasts`.

    Args:
        network: What is exported.
        samples: For how many samples in a call.
    """
    traced = network.program(fold_weights=False, samples=samples).module()
    assert isinstance(traced, fx.GraphModule)
    if any([_crop_by_slices(traced), without_expansions(traced)]):
        return traced
    return network.unfolded or network.graph


def _cropped(module: fx.GraphModule) -> Iterator[tuple[Any, list[int], list[int]]]:
    """Find the layers that crop otherwise than LiteRT; with the first position and the size that stay of each axis."""
    for node in module.graph.nodes:
        if node.target is not _TRANSPOSED or "val" not in node.meta:
            continue
        (_, weight, _, stride, padding, more, _, dilation) = _arguments(node)
        while weight.op == "call_function":
            weight = weight.args[0]
        sizes = attrgetter(str(weight.target))(module).shape[2:]
        kernel = [(size - 1) * wide + 1 for size, wide in zip(sizes, dilation, strict=True)]
        axes = list(zip(kernel, stride, padding, more, strict=True))
        if any(back > before for _, _, before, back in axes) or not any(padding):
            continue
        if any((before, before - back) != _same(size, step) for size, step, before, back in axes):
            yield node, padding, [int(size) for size in node.meta["val"].shape[2:]]


def _same(kernel: int, stride: int) -> tuple[int, int]:
    total = max(kernel - stride, 0)
    return total // 2, total - total // 2


def _arguments(node: Any) -> tuple[Any, Any, Any, list[int], list[int], list[int], int, list[int]]:
    given = [*node.args, *[None] * (8 - len(node.args))]
    stride, padding, more, dilation = (
        [one, one] if isinstance(one, int) else [*one, *one][:2]
        for one in (given[3] or 1, given[4] or 0, given[5] or 0, given[7] or 1)
    )
    return given[0], given[1], given[2], stride, padding, more, given[6] or 1, dilation


def _crop_by_slices(module: fx.GraphModule) -> bool:
    found = list(_cropped(module))
    for node, start, sizes in found:
        x, weight, bias, stride, _, _, groups, dilation = _arguments(node)
        node.args = (x, weight, bias, stride, [0, 0], [0, 0], groups, dilation)
        behind = _quantization_behind(node)
        places = [node] if behind is None else list(behind.users)
        for place in places:
            _slice_behind(module.graph, place, behind, start, sizes)
    if found:
        module.recompile()
    return bool(found)


def _quantization_behind(node: Any) -> Any | None:
    """The one quantization of what a layer gives, through what only clips; ``None`` where it stays float."""
    while len(node.users) == 1:
        (node,) = node.users
        if operation(node) == "quantize_per_tensor":
            return node
        if operation(node) not in CLIPS:
            return None
    return None


def _slice_behind(graph: fx.Graph, place: Any, quantize: Any | None, start: list[int], sizes: list[int]) -> None:
    """Let all that reads a value read its slice, quantized as the value was."""
    readers = list(place.users)
    with graph.inserting_after(place):
        result = place
        for axis, (first, size) in enumerate(zip(start, sizes, strict=True), start=2):
            result = _behind(graph, result, _ATEN.slice.Tensor, (result, axis, first, first + size))
        if quantize is not None:
            result = _behind(graph, result, quantize.target, (result, *quantize.args[1:]))
            result = _behind(graph, result, place.target, (result, *place.args[1:]))
    for reader in readers:
        reader.replace_input_with(place, result)


def _behind(graph: fx.Graph, node: Any, target: Any, args: tuple[Any, ...]) -> fx.Node:
    with graph.inserting_after(node):
        return graph.call_function(target, args)
