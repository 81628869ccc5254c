"""Leave out weights that only ever meet padding, of convolutions whose kernel is wider than the image it is moved over.

Networks made for large images, fed with small ones, end in images of one or two pixels: of a 3x3 kernel padded by one
pixel, over an image of one pixel, only the weight in the middle ever meets a value. A file has one size of image, so
that the others need not be in it: they multiply zeros. No value changes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_edge.exporters.passes.graph import graphs_in, operation, shape_of
from lightning_edge.network import Deployable
from lightning_edge.surgery import copy_of

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OPERATIONS = {name: getattr(torch.ops.aten, name).default for name in ("conv1d", "conv2d", "conv3d")}
_QUANTIZATIONS = tuple(f"{kind}quantize_per_{each}" for kind in ("", "de") for each in ("channel", "tensor"))
# An operation's arguments: what it reads, weight, bias, and these; what is not given is not there.
_DEFAULTS = {3: 1, 4: 0, 5: 1}  # stride, padding, dilation
_PADDING = 4


@dataclass(frozen=True)
class _Kept:
    """What of a kernel is kept, along each axis.

    Attributes:
        weights: Which of them, from and to.
        padding: What the image is padded with, before and behind.
    """

    weights: tuple[tuple[int, int], ...]
    padding: tuple[int, ...]

    def of(self, weight: Tensor) -> Tensor:
        """The weights that are kept of a convolution's, (filters, channels, *kernel)."""
        for axis, (start, end) in enumerate(self.weights, 2):
            weight = weight.narrow(axis, start, end - start)
        return weight.detach().contiguous()


def trim_kernels(network: Deployable) -> Deployable:
    """Give a network without the weights that meet nothing but padding in images of the size of its sample.

    Float convolutions are looked for among its modules, those of a converted graph in the graph. Weights that something
    else reads as well stay as they are.
    """
    if network.precision == "int8":
        graph = _narrowed(network.graph)
        return network if graph is network.graph else network.with_graph(graph)
    found = _in_modules(network)
    if not found:
        return network
    graph = copy_of(network.graph)
    for name, kept in found.items():
        layer: Any = graph.get_submodule(name)
        layer.weight = nn.Parameter(kept.of(layer.weight), layer.weight.requires_grad)
        layer.kernel_size, layer.padding = tuple(layer.weight.shape[2:]), kept.padding
    return network.with_graph(graph)


def _in_modules(network: Deployable) -> dict[str, _Kept]:
    """What to keep of which modules, by their names: of those that leave anything out at every call."""
    modules = dict(network.graph.named_modules())
    readers = Counter(id(value) for module in modules.values() for value in module._parameters.values())
    calls: dict[str, set[_Kept | None]] = {}

    def note(name: str, layer: Any, args: tuple[Any, ...], result: Any) -> None:
        settings = (layer.stride, layer.padding, layer.dilation)
        kept = _kept(args[0].shape, result.shape, layer.weight.shape, *settings) if args else None
        calls.setdefault(name, set()).add(kept)

    padded = {
        name: module
        for name, module in modules.items()
        if type(module) in _LAYERS
        and module.padding_mode == "zeros"
        and module.padding not in ("valid", (0,) * len(module.kernel_size))
        and readers[id(module._parameters.get("weight"))] == 1
    }
    if padded:
        with ExitStack() as hooks, torch.no_grad():
            for name, module in padded.items():
                hooks.callback(module.register_forward_hook(partial(note, name)).remove)
            try:
                network(*network.inputs.args, **network.inputs.kwargs)
            except Exception:  # a network that does not run is refused where it is written, in the target's name
                return {}
    return {name: kept for name, (kept, *others) in calls.items() if kept is not None and not others}


def _narrowed(network: nn.Module) -> nn.Module:
    """Leave them out of the graphs in a module, on a copy if there are any."""
    if not any(True for graph in graphs_in(network) for _ in _in_graph(graph)):
        return network
    network = copy_of(network)
    for graph in graphs_in(network):
        for node, stored, kept in list(_in_graph(graph)):
            holder, _, name = str(stored.target).rpartition(".")
            owner, weight = graph.get_submodule(holder), attrgetter(str(stored.target))(graph)
            less = kept.of(weight)
            setattr(owner, name, nn.Parameter(less, weight.requires_grad) if isinstance(weight, nn.Parameter) else less)
            stored.meta.pop("val", None)
            node.target = _OPERATIONS[operation(node)]
            node.update_arg(_PADDING, list(kept.padding))
        graph.recompile()
    return network


def _in_graph(graph: fx.GraphModule) -> Iterator[tuple[Any, Any, _Kept]]:
    """Convolutions of a converted graph, where the weights of each are stored, and what to keep of them."""
    stored = Counter(node.target for node in graph.graph.nodes if node.op == "get_attr")
    for node in graph.graph.nodes:
        if operation(node) not in _OPERATIONS or node.kwargs:
            continue
        image, weight = node.args[0], node.args[1]
        while operation(image) in _QUANTIZATIONS:
            image = image.args[0]
        while operation(weight) in _QUANTIZATIONS and len(weight.users) == 1:
            weight = weight.args[0]
        shapes = shape_of(image), shape_of(node)
        if weight.op != "get_attr" or len(weight.users) > 1 or stored[weight.target] > 1:
            continue
        if not all(shapes) or not all(isinstance(size, int) for shape in shapes for size in shape[1:]):
            continue  # what is not known, or depends on the number of samples
        settings = (node.args[place] if place < len(node.args) else default for place, default in _DEFAULTS.items())
        kept = _kept(*shapes, attrgetter(str(weight.target))(graph).shape, *settings)
        if kept is not None:
            yield node, weight, kept


def _kept(
    image: Sequence[int],
    result: Sequence[int],
    weight: Sequence[int],
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
) -> _Kept | None:
    """What to keep of a kernel over images of this shape; ``None`` for all of it."""
    kernel = weight[2:]
    strides, dilations = _each(stride, len(kernel)), _each(dilation, len(kernel))
    if isinstance(padding, str):
        wide = [(size - 1) * apart for size, apart in zip(kernel, dilations, strict=True)]
        if padding == "same" and any(amount % 2 for amount in wide):  # padded more behind than before
            return None
        padding = [amount // 2 if padding == "same" else 0 for amount in wide]
    axes = zip(
        *(sizes[-len(kernel) :] for sizes in (image, result)),
        kernel,
        strides,
        _each(padding, len(kernel)),
        dilations,
        strict=True,
    )
    ends, paddings = zip(*(_along_one(*axis) for axis in axes), strict=True)
    if ends == tuple((0, size) for size in kernel):
        return None
    return _Kept(ends, paddings)


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    """One number for each axis: torch takes one for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _along_one(
    image: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[tuple[int, int], int]:
    """Which weights to keep along an axis, from and to, and what to pad the image with then, at both ends alike."""
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
