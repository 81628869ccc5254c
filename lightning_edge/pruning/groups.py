"""Which channels of a network hang together, by torch-pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900).

torch-pruning traces the network and says which layers' channels must go together; where those lie in which tensors is
ours (`channels`). Several channels that only go at once, such as those of all groups of a grouped convolution, are one
unit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_edge.pruning.channels import Channels, Integers, Side, channels_of
from lightning_edge.pruning.dependency import Watch
from lightning_edge.pruning.ways import Way, fits, of_heads, of_parts

# A reason that groups are left alone for is told with the names of three, and at most so many reasons.
TOLD = 6


@dataclass(frozen=True)
class Slot:
    """A dimension of one tensor that a group shortens.

    Attributes:
        tensor: Name of the parameter or buffer in the network.
        dimension: Which of its dimensions.
        units: For each index along it, the unit it goes with; -1: it stays.
        role: As in `channels.Place`.
        count: How many indices each unit holds.
    """

    tensor: str
    dimension: int
    units: Integers
    role: Literal["kernel", "scale", "rest"]
    count: int


@dataclass
class Group:
    """Channels of several layers that go together.

    Attributes:
        name: The layer that makes the channels; the first one, where several are added.
        makers: Names of all layers that make or pass them on.
        units: How many units there are.
        slots: Where they lie.
        attributes: How many channels of (module, attribute) one unit holds.
        norms: For each norm over channels, the unit of each of its channels: LayerNorm, GroupNorm, RMSNorm, and modules
            of the network's own that hold nothing but parameters with one value a channel.
        reason: Why the group keeps all of its channels; empty: it may lose some.
        way: The `Way` by which its channels go; empty: each alone, as far as layers let them.
        counters: How many of what (module, attribute) of the network's own counts one unit holds.
        others: The same channels by other ways, to be tried where this one does not work.
    """

    name: str
    makers: list[str] = field(default_factory=list)
    units: int = 0
    slots: list[Slot] = field(default_factory=list)
    attributes: dict[tuple[str, str], int] = field(default_factory=dict)
    norms: dict[str, Integers] = field(default_factory=dict)
    reason: str = ""
    way: str = ""
    counters: dict[tuple[str, str], int] = field(default_factory=dict)
    others: list[Group] = field(default_factory=list)

    @property
    def identity(self) -> str:
        """Tells the group from others of the network, before and after cuts: by what it shortens, and how."""
        places = sorted(f"{slot.tensor}:{slot.dimension}" for slot in self.slots)
        counted = sorted(f"{module}.{attribute}" for module, attribute in self.attributes)
        way = [self.way] if self.way else []
        return hashlib.sha256("\n".join([self.name, *places, *counted, *way]).encode()).hexdigest()[:16]

    def working(self, faulty: Mapping[str, str]) -> Group:
        """Give the group by its first way that is not known to fail; where all are, with the reason of this one."""
        ways = [self] if self.reason else [way for way in (self, *self.others) if way.identity not in faulty]
        if ways and ways[0] is not self:
            ways[0].others = [way for way in ways if way is not ways[0]]
        return ways[0] if ways else replace(self, reason=faulty[self.identity])

    def keeps(self, units: Integers) -> NDArray[np.bool_]:
        """Whether each unit is among these; the last entry stands for -1, what belongs to none."""
        kept = np.zeros(self.units + 1, dtype=np.bool_)
        kept[units] = kept[-1] = True
        return kept

    def step(self, round_to: int) -> int:
        """By how many units the group shrinks so that every layer's channels stay multiples of ``round_to``."""
        steps = [round_to // math.gcd(round_to, count) for count in self.attributes.values()]
        return math.lcm(*steps) if steps else round_to


def left_alone(groups: Sequence[Group]) -> str:
    """Say which groups keep their channels, and why."""
    reasons: dict[str, list[str]] = {}
    for group in groups:
        if group.reason:
            reasons.setdefault(group.reason, []).append(group.name)
    told = [
        f"{', '.join(map(repr, names[:3]))}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {reason}"
        for reason, names in list(reasons.items())[:TOLD]
    ]
    more = f"; and {len(reasons) - TOLD} other reasons" if len(reasons) > TOLD else ""
    return f"Left alone are {'; '.join(told)}{more}." if told else "No layer is left alone."


class Reading:
    """Reads torch-pruning's groups of one network.

    Args:
        network: The network.
        graph: torch-pruning's graph of it.
        watch: What was seen while it ran.
        untraced: Names of modules that were taken as a whole, with the reason.
    """

    def __init__(self, network: nn.Module, graph: Any, watch: Watch, untraced: Mapping[str, str]) -> None:
        self.untraced = untraced
        self.network = network
        self.graph = graph
        self.watch = watch
        self.modules: dict[int, str] = {}
        # All names of each tensor: more than one where layers share it.
        self.names: dict[int, list[str]] = {}
        for name, module in network.named_modules(remove_duplicate=False):
            self.modules.setdefault(id(module), name)
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.names.setdefault(id(tensor), []).append(f"{name}.{key}" if name else key)
        self.sharers = {name: names for names in self.names.values() for name in names}

    def ways(self, group: Group, found: Any) -> Iterator[Way]:
        """Give the other ways to cut a group, one of each name."""
        seen: set[str] = set()
        for item in found:
            node = item.dep.target
            indices, roots = (np.array(given, dtype=np.int64) for given in (item.idxs, item.root_idxs))
            ways: Iterable[Way] = ()
            if node.grad_fn in self.watch.shapes:
                ways = of_heads(self.network, group.makers, *self.watch.shapes[node.grad_fn], indices, roots)
            elif type(node.module).__name__ == "_SplitOp" and node.module.split_sizes:
                ways = of_parts(self.network, group.name, node.module.split_sizes, indices, roots)
            for way in ways:
                if way.name not in seen:
                    seen.add(way.name)
                    yield way

    def group(self, found: Any, way: Way | None = None) -> Group:
        """Read one group, as its channels go alone or by another way."""
        root = found[0].dep.target.module
        group = Group(self.modules[id(root)])
        if id(root) in self.graph.endless:
            return self._left(group, "torch-pruning finds no end of the channels that hang together with it")
        if way is not None:
            group.way, group.counters = way.name, dict(way.counters)
        layers: list[tuple[nn.Module, str, Channels, Integers, Integers]] = []
        parameters: list[tuple[Tensor, int, Integers, Integers]] = []
        shared = 0 if way is None else way.shared
        every = list(range(len(found[0].idxs)))
        straight = np.arange(len(every))
        union = _Union(len(every))
        for item in found:
            node, handler = item.dep.target, item.dep.handler
            roots = item.root_idxs
            if None in roots:
                return self._left(group, f"torch-pruning cannot follow its channels to {node.name}")
            # Most layers have the root's channels one to one: then lists, of up to thousands, need not be read.
            indices = straight if item.idxs == every else np.array(item.idxs, dtype=np.int64)
            origin = straight if roots == every else np.array(roots, dtype=np.int64)
            kind = type(node.module).__name__
            if kind == "_OutputOp":
                group.reason = group.reason or "its channels reach the network's output"
            elif kind in ("_SplitOp", "_UnbindOp"):
                offsets = node.module.offsets or []
                sizes = [end - begin for begin, end in pairwise(offsets)]
                if sizes and len(set(sizes)) == 1 and sum(sizes) == len(indices):
                    union.lockstep(indices, origin, len(sizes))
            elif isinstance(node.module, nn.Parameter):
                if node.module.numel() == node.module.shape[node.pruning_dim] == shared < len(indices):
                    continue  # a vector, as a norm's scale is
                union.merge(indices, origin)
                parameters.append((node.module, node.pruning_dim, indices, origin))
            elif id(node.module) in self.modules:
                name = self.modules[id(node.module)]
                out = self.graph.is_out_channel_pruning_fn(handler)
                side: Side = "both" if out and self.graph.is_in_channel_pruning_fn(handler) else "out" if out else "in"
                if side != "in":
                    group.makers.append(name)
                why = self.untraced.get(name)
                described = channels_of(node.module, side) if why is None else f"torch-pruning cannot trace that: {why}"
                if isinstance(described, str):
                    group.reason = group.reason or f"its channels reach {name or 'the network'!r}, and {described}"
                    continue
                if side == "both" and described.count == shared < len(indices):
                    continue
                union.merge(indices, origin)
                if described.blocks > 1:
                    if len(indices) != described.count:
                        group.reason = group.reason or f"only some of its channels reach {name!r}, which is grouped"
                        continue
                    union.lockstep(indices, origin, described.blocks)
                layers.append((node.module, name, described, indices, origin))
        if group.reason:
            return group
        if way is not None:
            union.merge(way.keys, way.roots)
        unit_of = union.units()
        group.units = int(unit_of.max()) + 1
        if way is not None and not fits(way, unit_of):
            return self._left(group, "its channels go together in yet other ways")
        if group.units == 1:
            return self._left(group, "its channels only go all at once")
        for module, name, described, indices, origin in layers:
            units = unit_of if origin is straight else unit_of[origin]
            own = units is unit_of and not union.joined
            self._add_layer(group, module, name, described, None if indices is straight else indices, units, own)
        for parameter, dimension, indices, origin in parameters:
            if int(indices.max(initial=-1)) >= parameter.shape[dimension]:
                return self._left(group, f"its channels do not fit those of {self.names[id(parameter)][0]!r}")
            units = np.full(parameter.shape[dimension], -1, dtype=np.int64)
            units[indices] = unit_of[origin]
            self._add_parameter(group, parameter, dimension % parameter.dim(), units)
        return self._checked(group)

    @staticmethod
    def _left(group: Group, reason: str) -> Group:
        group.reason = group.reason or reason
        return group

    def _add_layer(
        self,
        group: Group,
        module: nn.Module,
        name: str,
        described: Channels,
        indices: Integers | None,
        units: Integers,
        own: bool,
    ) -> None:
        if indices is None and len(units) == described.count:
            unit_of_channel = units
        else:
            reached = np.arange(len(units)) if indices is None else indices
            if int(reached.max(initial=-1)) >= described.count:
                # A layer that shares one number among all channels, as nn.PReLU() does, has nothing to lose.
                if described.places:
                    self._left(group, f"its channels do not fit those of {name!r}")
                return
            unit_of_channel = np.full(described.count, -1, dtype=np.int64)
            unit_of_channel[reached] = units
        # The root's own numbering, which nearly all layers have, needs no counting.
        count = 1 if own and unit_of_channel is units else _evenly(unit_of_channel, group.units)
        if count is None:
            self._left(group, f"{name!r} holds more of some of its channels than of others")
            return
        for place in described.places:
            dimension = place.dimension % getattr(module, place.tensor).dim()
            full = f"{name}.{place.tensor}" if name else place.tensor
            if place.channels is None:
                group.slots.append(Slot(full, dimension, unit_of_channel, place.role, count))
            else:
                self._add_slot(group, Slot(full, dimension, unit_of_channel[place.channels], place.role, 0))
        for attribute in described.attributes:
            group.attributes[name, attribute] = count
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            group.norms[name] = unit_of_channel

    def _add_slot(self, group: Group, slot: Slot) -> None:
        """Add a slot whose indices are not a layer's channels one to one, counting what each unit holds."""
        count = _evenly(slot.units, group.units)
        if count is None:
            self._left(group, f"{slot.tensor!r} holds more of some of its channels than of others")
        else:
            group.slots.append(replace(slot, count=count))

    def _add_parameter(self, group: Group, parameter: Tensor, dimension: int, units: Integers) -> None:
        """Add a parameter of the network's own code; where it is that of a norm over channels, the norm."""
        name = self.names[id(parameter)][0]
        self._add_slot(group, Slot(name, dimension, units, "rest", 0))
        owner = name.rpartition(".")[0]
        norm = self.network.get_submodule(owner)
        if next(norm.children(), None) or any(other.shape != (len(units),) for other in norm.parameters()):
            return
        group.norms[owner] = units
        count = _evenly(units, group.units)
        if count is not None and getattr(norm, "normalized_shape", None) == (len(units),):
            group.attributes[owner, "normalized_shape[0]"] = count

    def _checked(self, group: Group) -> Group:
        """Leave a group alone whose tensors are shared by layers that would keep different channels."""
        slots: dict[tuple[str, int], Slot] = {}
        shared: dict[tuple[str, int], dict[str, Slot]] = {}
        for slot in group.slots:
            sharers = self.sharers[slot.tensor]
            if len(sharers) == 1:
                slots[slot.tensor, slot.dimension] = slot
            else:
                shared.setdefault((sharers[0], slot.dimension), {})[slot.tensor] = slot
        for (first, dimension), holders in shared.items():
            sharers = self.sharers[first]
            units = [holders[name].units for name in sharers if name in holders]
            if len(units) < len(sharers) or not all(np.array_equal(other, units[0]) for other in units):
                return self._left(group, f"{first!r} is shared by {', '.join(map(repr, sharers))}, which differ in it")
            slots[first, dimension] = replace(next(iter(holders.values())), tensor=first)
        group.slots = list(slots.values())
        return group


class _Union:
    """Which channels of the root only go together."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))
        self.joined = False

    def find(self, channel: int) -> int:
        while self.parent[channel] != channel:
            self.parent[channel] = self.parent[self.parent[channel]]
            channel = self.parent[channel]
        return channel

    def merge(self, keys: Integers, roots: Integers) -> None:
        """Join the channels that share a key."""
        if keys is roots or np.array_equal(keys, roots) or len(np.unique(keys)) == len(keys):
            return
        self.joined = True
        first: dict[int, int] = {}
        for key, root in zip(keys.tolist(), roots.tolist(), strict=True):
            self.parent[self.find(root)] = self.find(first.setdefault(key, root))

    def lockstep(self, indices: Integers, roots: Integers, blocks: int) -> None:
        """Join the channels at the same position of each of several blocks of equal length."""
        self.merge(indices % (len(indices) // blocks), roots)

    def units(self) -> Integers:
        """Number the unit of each channel, in the order of their first channels."""
        if not self.joined:
            return np.arange(len(self.parent))
        numbers: dict[int, int] = {}
        return np.array([numbers.setdefault(self.find(channel), len(numbers)) for channel in range(len(self.parent))])


def _evenly(units: Integers, count: int) -> int | None:
    """How many indices belong to each unit, if to each the same number."""
    held = np.bincount(units[units >= 0], minlength=count)
    return int(held[0]) if (held == held[0]).all() else None
