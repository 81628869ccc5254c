"""Pick the rows and columns of a nearest resize that a runtime would round otherwise, or has no operation for."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import fx

from lightning_edge.exporters.passes.base import each_node
from lightning_edge.exporters.passes.graph import insert, replaced, shape_of

_ATEN = torch.ops.aten
# By whole factors both kinds take the same rows.
_PLAIN = {
    _ATEN._upsample_nearest_exact2d.vec: _ATEN.upsample_nearest2d.vec,
    _ATEN._upsample_nearest_exact2d.default: _ATEN.upsample_nearest2d.default,
}
_RESIZES = {
    _ATEN.upsample_nearest1d.vec,
    _ATEN.upsample_nearest1d.default,
    _ATEN.upsample_nearest2d.vec,
    _ATEN.upsample_nearest2d.default,
    _ATEN._upsample_nearest_exact1d.vec,
    _ATEN._upsample_nearest_exact1d.default,
    *_PLAIN,
}


@each_node
def pick_nearest(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Write a nearest resize by anything but whole factors as a choice of rows and columns.

    Given: a nearest resize of a sequence or an image, by 1.5 or to fewer rows, for example.

    Result: ``index_select`` along each axis that changes, of positions that torch computed. A resize of an image by
    whole factors is the plain one, not ``nearest-exact``.

    Why: torch takes the row ``floor(i / scale)``, and LiteRT's converter (litert-torch 0.10) writes a resize that takes
    ``floor((i + 1/2) / scale)``; coremltools 9 has none of these. For whole factors both are the same row, and the
    resize has a faster kernel.
    """
    x = node.args[0] if node.target in _RESIZES else None
    if not isinstance(x, fx.Node):
        return False
    before, after = shape_of(x)[2:], shape_of(node)[2:]
    if len(before) == 2 and all(size % small == 0 for size, small in zip(after, before, strict=True)):
        plain = next((known for exact, known in _PLAIN.items() if exact is node.target), None)
        node.target = plain or node.target
        return plain is not None
    for axis, places in enumerate(_places(node, before), start=2):
        if places.tolist() == list(range(shape_of(x)[axis])):
            continue
        name = f"places_{axis}_of_{node.name}"
        graph.register_buffer(name, places)
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(name)
        size = [*shape_of(x)]
        size[axis] = len(places)
        chosen = insert(graph, node, _ATEN.index_select.default, x, axis, constant)
        chosen.meta["val"] = node.meta["val"].new_empty(size)
        x = chosen
    return replaced(graph, node, x)


def _places(node: fx.Node, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Ask torch which row, or column, each of the result's is: by a resize of their numbers."""
    found, resize = [], cast(Callable[..., torch.Tensor], node.target)
    for axis, size in enumerate(sizes):
        numbers = torch.arange(size, dtype=torch.float64).view([-1 if at == axis else 1 for at in range(len(sizes))])
        image = numbers.expand(sizes)[None, None]
        resized = resize(image, *node.args[1:], **node.kwargs)[0, 0]
        found.append(resized.movedim(axis, 0).reshape(resized.shape[axis], -1)[:, 0].long())
    return found
