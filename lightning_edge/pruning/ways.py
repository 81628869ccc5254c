"""Other ways to cut channels that the network's own code counts: by whole heads, by equal parts, with its counters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from lightning_edge.pruning.channels import Integers

Shape = tuple[int, ...]

# How a module names what it counts of its heads: num_heads, head_dim, all_head_size, attn_dim, inner_dim.
_OF_HEADS = ("head", "attn", "inner")


@dataclass(frozen=True)
class Way:
    """How a group's channels are cut, where any of them alone cannot go.

    Attributes:
        name: Tells it from others of the group.
        units: How many units there are then.
        keys: Which channels only go together: those with one key.
        roots: The root's channel of each key.
        counters: How many of what (module, attribute) counts one unit holds; the network's own, such as ``num_heads``.
        shared: How many channels a head has, where heads go whole: what holds as many, as a norm of the queries does,
            holds them for all heads and loses none. 0: nothing is for all.
    """

    name: str
    units: int
    keys: Integers
    roots: Integers
    counters: Mapping[tuple[str, str], int] = field(default_factory=dict)
    shared: int = 0


def of_heads(
    network: nn.Module, makers: Sequence[str], before: Shape, after: Shape, indices: Integers, roots: Integers
) -> Iterator[Way]:
    """Give the ways to cut channels that a view splits into heads, or into query, key and value and those into heads.

    Args:
        network: The network, whose modules may count heads.
        makers: Names of the layers that make the channels.
        before: Shape in front of the view.
        after: Shape behind it.
        indices: The channels that reach it.
        roots: The root's channel of each.
    """
    split = _split(before, after, len(indices))
    if split is None:
        return
    heads, width = split
    owner = _common_parent(makers)
    counts = {
        name: value
        for name, value in vars(network.get_submodule(owner)).items()
        if type(value) is int and any(word in name for word in _OF_HEADS)
    }
    widths = {name for name in counts if "dim" in name or "size" in name}
    whole = {name: 1 for name, value in counts.items() if value == heads and name not in widths}
    every = {name: 1 for name, value in counts.items() if value == width and name in widths}
    both = {name for name, value in counts.items() if value == heads * width and name in widths}
    for label, keys, units, own, held, shared in (
        ("whole heads", indices // width % heads, heads, whole, width, width),
        ("equal heads", indices % width, width, every, heads, 0),
    ):
        yield Way(label, units, keys, roots, shared=shared)
        counters = {(owner, name): count for name, count in (own | dict.fromkeys(both, held)).items()}
        if counters:
            yield Way(f"{label}, counted", units, keys, roots, counters, shared)


def of_parts(network: nn.Module, maker: str, sizes: Sequence[int], indices: Integers, roots: Integers) -> Iterator[Way]:
    """Give the way to cut channels that are split into equal parts of a size that a module around the layer keeps."""
    if len(set(sizes)) != 1 or sum(sizes) != len(indices):
        return
    parents = maker.split(".")[:-1]
    for end in range(len(parents), -1, -1):
        owner = ".".join(parents[:end])
        names = [
            name
            for name, value in vars(network.get_submodule(owner)).items()
            if type(value) is int and value == sizes[0]
        ]
        if names:
            counters = {(owner, name): 1 for name in names}
            yield Way("counted parts", sizes[0], indices % sizes[0], roots, counters)
            return


def _split(before: Shape, after: Shape, channels: int) -> tuple[int, int] | None:
    """How many heads of which width a view makes of the last dimension, or of the second; of each of three, if so."""
    for axis in (len(before) - 1, 1):
        # A parameter of one dimension has no batch in front of its channels.
        if not 0 < axis < len(before) or before[axis] != channels or before[:axis] != after[:axis]:
            continue
        for parts in (after[axis : axis + 2], after[axis : axis + 3]):
            if math.prod(parts) == channels and len(parts) > 1 and min(parts[-2:]) > 1:
                return parts[-2], parts[-1]
    return None


def _common_parent(names: Sequence[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def fits(way: Way, units: Integers) -> bool:
    """Whether units are those of a way, so that what it counts goes with them."""
    return len(np.unique(units)) == way.units
