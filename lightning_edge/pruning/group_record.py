"""The record of a cut: which units of groups stay, as indices of tensors and counts of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_edge.pruning.channels import Integers
from lightning_edge.pruning.cutting import read_attribute
from lightning_edge.pruning.groups import Group
from lightning_edge.schedule import Change


def record_of(
    network: nn.Module, tensors: Mapping[str, Tensor], groups: Sequence[Group], kept: Sequence[Integers]
) -> Change:
    """Write down a cut.

    Args:
        network: The network, or a copy of it.
        tensors: Its parameters and buffers by name.
        groups: The groups that lose units.
        kept: The units that each of them keeps.

    Returns:
        The record: ``kept`` indices of tensors, and ``attributes`` of layers before and after.
    """
    stays: dict[str, dict[int, NDArray[np.bool_]]] = {}
    lost: dict[str, dict[str, int]] = {}
    for group, units in zip(groups, kept, strict=True):
        keeps = group.keeps(units)
        for slot in group.slots:
            size = tensors[slot.tensor].shape[slot.dimension]
            mask = stays.setdefault(slot.tensor, {}).setdefault(slot.dimension, np.ones(size, dtype=np.bool_))
            mask &= keeps[slot.units]
        for (module, attribute), count in (group.attributes | group.counters).items():
            held = lost.setdefault(module, {})
            held[attribute] = held.get(attribute, 0) + count * (group.units - len(units))
    attributes: dict[str, dict[str, list[int]]] = {}
    modules = dict(network.named_modules(remove_duplicate=False))
    for module, counts in lost.items():
        layer = modules[module]
        before = {attribute: int(read_attribute(layer, attribute)) for attribute in counts}
        attributes[module] = {name: [before[name], before[name] - count] for name, count in counts.items()}
    # Most tensors keep what others keep, too: one tensor of indices for all of them.
    indices: dict[bytes, Tensor] = {}

    def index(mask: NDArray[np.bool_]) -> Tensor:
        key = mask.tobytes()
        if key not in indices:
            indices[key] = torch.from_numpy(np.flatnonzero(mask))
        return indices[key]

    return {
        "kind": "cut",
        "kept": {
            name: [[dimension, index(mask), len(mask)] for dimension, mask in sorted(dimensions.items())]
            for name, dimensions in stays.items()
        },
        "attributes": attributes,
    }
