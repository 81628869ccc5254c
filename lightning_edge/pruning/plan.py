"""Plan a cut from a network, a goal and a batch, and leave the network as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.pruning.channels import Integers
from lightning_edge.pruning.copies import aside, bare_copy, sample_of
from lightning_edge.pruning.cost import MEASURES, Cost, Measure, coefficients
from lightning_edge.pruning.cutting import cuts_of, undo_cut
from lightning_edge.pruning.group_record import record_of
from lightning_edge.pruning.groups import TOLD, Group, left_alone
from lightning_edge.pruning.importance import Criterion, Floats, score, sensitivities
from lightning_edge.pruning.patterns import ignore, matching
from lightning_edge.pruning.selection import TOLERANCE, Choices, Scope, allowed_counts, choose
from lightning_edge.pruning.traced import Structure, trace
from lightning_edge.pruning.verification import find_fault
from lightning_edge.schedule import Batch, Change
from lightning_edge.user_warnings import warn


@dataclass(frozen=True)
class Goal:
    """What the next cut is to reach.

    Attributes:
        measure: What is counted.
        amount: The kept fraction (float) or absolute number (int) at the end of all cuts.
        layers: Instead: kept fraction of channels by pattern of layer names.
        removed: Share of the whole cut that this one completes, 0.0 to 1.0.
        criterion: What importance is.
        scope: What it is compared with.
        round_to: Multiples of which layers keep their channels.
        ignore: Patterns of names and types of layers that keep their channels.
        seed: For random importance, of this cut.
    """

    measure: Measure
    amount: int | float
    layers: Mapping[str, float] | None
    removed: float
    criterion: Criterion
    scope: Scope
    round_to: int
    ignore: Sequence[str]
    seed: int


@dataclass
class _Draft:
    """What is known while a cut is planned.

    Attributes:
        network: A copy, traced; the trial cuts it.
        parameters: Its parameters by name.
        tensors: Those, and its buffers.
        structure: All of its groups.
        groups: Those that may be cut.
        importances: Of the units of each.
        stood: Identities of the groups that have stood a trial.
        faulty: Of those that have not, with the reason.
    """

    network: nn.Module
    parameters: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    structure: Structure
    groups: list[Group]
    importances: list[Floats]
    stood: set[str]
    faulty: dict[str, str]


class _OnlyAloneError(CompressionError):
    """Groups that can be cut alone cannot be cut together."""


class _OtherWayError(Exception):
    """A group failed that can be cut in another way."""


def find_groups(
    network: nn.Module, inputs: Inputs, patterns: Sequence[str], changes: Sequence[Change]
) -> tuple[nn.Module, Structure]:
    """Find the groups of a network and mark those that patterns name, and those that have not stood a trial.

    Returns:
        The copy that was traced, and its groups.

    Raises:
        CompressionError: If the network cannot be copied or traced, or a pattern names nothing.
    """
    with aside(network):
        twin = bare_copy(network)
        structure = trace(twin, sample_of(inputs, twin))
    ignore(network, structure.groups, patterns)
    faulty = _faulty(changes)
    structure.groups[:] = [group.working(faulty) for group in structure.groups]
    return twin, structure


def _faulty(changes: Sequence[Change]) -> dict[str, str]:
    return {identity: reason for change in changes for identity, reason in change.get("faulty", {}).items()}


def plan_cut(network: nn.Module, goal: Goal, changes: Sequence[Change], batch: Batch) -> Change:
    """Plan the next cut of a network.

    Args:
        network: The network; nothing of it changes.
        goal: What is to be reached.
        changes: Trial and cuts made so far, oldest first.
        batch: The batch at hand.

    Returns:
        The record: ``kept`` indices of tensors, ``attributes`` of layers, and the costs of each measure in the base
        network, before and after. Without ``kept`` where rounding leaves nothing to cut this time, or nothing stood
        its trial.

    Raises:
        CompressionError: If the network cannot be traced, nothing may be cut, or the goal would empty layers.
    """
    cuts = cuts_of(changes)
    draft, change = _settled(network, goal, changes, batch)
    if goal.removed >= 1.0:
        _warn_if_missed(draft, goal, change, cuts)
    return {**change, "stood": sorted(draft.stood), "faulty": draft.faulty}


def plan_trial(network: nn.Module, goal: Goal, batch: Batch) -> Change:
    """Try what may be cut before any cut is due, so that a training that cannot reach its goal ends at its beginning.

    A cut changes weights, not which channels hang together, so that the same groups need no trial then.

    Args:
        network: The network; nothing of it changes.
        goal: What is to be reached in the end; the same share of all groups goes, so that each is tried.
        batch: The batch at hand.

    Returns:
        The record: which groups stood, which did not and why, and in words what is left alone.

    Raises:
        CompressionError: As `plan_cut` does.
    """
    goal = replace(goal, removed=1.0, criterion="l2", scope="local")
    draft, _ = _settled(network, goal, [], batch, trial=True)
    if not draft.groups:
        warn(
            f"Prune will cut nothing of {type(network).__name__}, which trains on as it is. "
            f"{left_alone(draft.structure.groups)}"
        )
    record = {"kind": "trial", "kept": {}, "attributes": {}, "left_alone": left_alone(draft.structure.groups)}
    return {**record, "stood": sorted(draft.stood), "faulty": draft.faulty}


def _settled(
    network: nn.Module, goal: Goal, changes: Sequence[Change], batch: Batch, *, trial: bool = False
) -> tuple[_Draft, Change]:
    """Draft and settle, again for each group that fails one way and has another."""
    known = list(changes)
    while True:
        draft = _drafted(network, goal, known, batch)
        try:
            with aside(network):
                return draft, _settle(draft, goal, cuts_of(changes))
        except _OtherWayError:
            known.append({"stood": sorted(draft.stood), "faulty": draft.faulty})
        except _OnlyAloneError:
            if not trial:
                raise
            return draft, {}  # other cuts than this one may stand: each is tried when it comes


def _drafted(network: nn.Module, goal: Goal, changes: Sequence[Change], batch: Batch) -> _Draft:
    """Find the groups and their importance."""
    inputs = batch.inputs()
    sensitivity = sensitivities(goal.criterion, batch)
    twin, structure = find_groups(network, inputs, goal.ignore, changes)
    parameters = dict(twin.named_parameters())
    tensors = {**parameters, **dict(twin.named_buffers())}
    free = [group for group in structure.groups if not group.reason]
    groups, importances = [], []
    for group, importance in zip(free, score(free, goal.criterion, tensors, sensitivity, goal.seed), strict=True):
        if importance is None:
            group.reason = f"it holds nothing that criterion={goal.criterion!r} looks at"
        elif not np.isfinite(importance).all():
            raise CompressionError(
                f"The importance of {group.name!r} by criterion={goal.criterion!r} is not finite. Look for NaN or "
                "infinite weights or gradients, and prune before training diverges."
            )
        else:
            groups.append(group)
            importances.append(importance)
    stood = {identity for change in changes for identity in change.get("stood", ())}
    return _Draft(twin, parameters, tensors, structure, groups, importances, stood, _faulty(changes))


def _base(
    measure: Measure,
    price: Mapping[Measure, Mapping[str, float]],
    parameters: Mapping[str, Tensor],
    changes: Sequence[Change],
) -> float:
    if changes:
        return float(changes[0][measure][0])
    return sum(price[measure][name] * tensor.numel() for name, tensor in parameters.items())


def _settle(draft: _Draft, goal: Goal, cuts: Sequence[Change]) -> Change:
    """Choose, try, and leave alone what does not stand the trial, until the rest does."""
    price = coefficients(draft.parameters, draft.structure.positions)
    base = {measure: _base(measure, price, draft.parameters, cuts) for measure in MEASURES}
    # One sample is enough to compare, but not every network takes a batch of one.
    calls = [draft.structure.inputs.sample(), draft.structure.inputs]
    while True:
        if not draft.groups and not draft.faulty:
            raise CompressionError(
                f"No channels of {type(draft.network).__name__} can be cut. {left_alone(draft.structure.groups)}"
            )
        if not draft.groups:
            # The network's own code has fixed sizes: it stays whole, and what else is to be done with it goes on.
            unchanged: dict[str, list[int]] = {measure: [round(base[measure])] * 3 for measure in MEASURES}
            return {"kind": "cut", "kept": {}, "attributes": {}, **unchanged}
        units = np.array([group.units for group in draft.groups], dtype=np.int64)
        costs = _price(draft, price, units)
        if goal.layers is None:
            kept = _by_target(draft, goal, base[goal.measure], costs[goal.measure])
        else:
            kept = _by_layer(draft, goal, goal.layers, cuts)
        chosen = [
            np.sort(np.argsort(-importance, kind="stable")[:count])
            for importance, count in zip(draft.importances, kept, strict=True)
        ]
        cut = [place for place, count in enumerate(kept) if count < units[place]]
        cutting, keeping = [draft.groups[place] for place in cut], [chosen[place] for place in cut]
        change = record_of(draft.network, draft.tensors, cutting, keeping)
        change |= {measure: _costs(base[measure], costs[measure], units, kept) for measure in MEASURES}
        untried = {group.identity for group in cutting} - draft.stood
        if not untried:
            return change
        fault = find_fault(draft.network, calls, change, cutting, keeping)
        if not fault:
            draft.stood |= untried
            return change
        undo_cut(draft.network, change)
        _leave_faulty(draft, calls, cutting, keeping, fault)


def _costs(base: float, cost: Cost, units: Integers, kept: Integers) -> list[int]:
    return [round(base), round(float(cost(units[None])[0])), round(float(cost(kept[None])[0]))]


def _price(draft: _Draft, prices: Mapping[Measure, Mapping[str, float]], units: Integers) -> dict[Measure, Cost]:
    removals: dict[tuple[str, int], dict[int, int]] = {}
    for place, group in enumerate(draft.groups):
        for slot in group.slots:
            if slot.tensor in draft.parameters:
                removals.setdefault((slot.tensor, slot.dimension), {})[place] = slot.count
    shapes = {name: tensor.shape for name, tensor in draft.parameters.items()}
    return {measure: Cost(shapes, prices[measure], removals, units) for measure in MEASURES}


def _choices(draft: _Draft, round_to: int) -> Choices:
    return Choices(draft.importances, [allowed_counts(group.units, group.step(round_to)) for group in draft.groups])


def _by_target(draft: _Draft, goal: Goal, base: float, cost: Cost) -> Integers:
    final = float(goal.amount) if isinstance(goal.amount, int) else goal.amount * base
    least = float(cost(np.ones((1, len(draft.groups)), dtype=np.int64))[0])
    if final < least * (1 - TOLERANCE):
        raise CompressionError(
            f"{goal.measure}={goal.amount!r} asks for {final:,.0f} of {base:,.0f}, but with a single channel left in "
            f"every layer that may be cut {least:,.0f} remain: layers would be empty. Ask for more, or let more be "
            f"cut. {left_alone(draft.structure.groups)}"
        )
    target = base - (base - min(final, base)) * goal.removed
    return choose(_choices(draft, goal.round_to), cost, target, goal.scope)


def _by_layer(draft: _Draft, goal: Goal, layers: Mapping[str, float], changes: Sequence[Change]) -> Integers:
    choices = _choices(draft, goal.round_to)
    patterns = [matching(group, layers) for group in draft.groups]
    everywhere = {matching(group, {pattern: 1.0}) for group in draft.structure.groups for pattern in layers}
    for pattern in layers:
        if pattern not in everywhere:
            names = sorted({maker for group in draft.structure.groups for maker in group.makers})
            raise CompressionError(f"layers: {pattern!r} names no layer with channels. These have some: {names}")
        if pattern not in {matching(group, {pattern: 1.0}) for group in draft.groups}:
            named = [group for group in draft.structure.groups if matching(group, {pattern: 1.0})]
            reasons = {group.reason for group in named if group.reason}
            raise CompressionError(
                f"layers: {pattern!r} names only layers that keep their channels, because {'; '.join(sorted(reasons))}"
            )
    wanted = []
    for group, named_by in zip(draft.groups, patterns, strict=True):
        ratio = 1.0 if named_by is None else layers[named_by]
        before = group.units * _shrunk(group, draft, changes)
        wanted.append(before * (1 - (1 - ratio) * goal.removed))
    kept = choices.nearest(np.array(wanted))
    free = np.array([pattern is None for pattern in patterns])
    return np.where(free, choices.units, np.minimum(kept, choices.units))


def _shrunk(group: Group, draft: _Draft, changes: Sequence[Change]) -> float:
    """By which factor a group was larger before the first cut."""
    slot = next(slot for slot in group.slots if slot.tensor in draft.parameters)
    size = draft.parameters[slot.tensor].shape[slot.dimension]
    for change in changes:
        for dimension, _, before in change["kept"].get(slot.tensor, ()):
            if dimension == slot.dimension:
                return float(before / size)
    return 1.0


def _leave_faulty(
    draft: _Draft, calls: Sequence[Inputs], groups: Sequence[Group], kept: Sequence[Integers], fault: str
) -> None:
    """Find the groups that cannot be cut, by cutting each alone, and leave them out of the draft."""
    found = other_ways = False
    for group, units in zip(groups, kept, strict=True):
        alone = _fault_alone(draft, calls, group, units)
        if not alone:
            continue
        found = True
        group.reason = f"cutting it was tried and does not work: {alone}"
        draft.faulty[group.identity] = group.reason
        for way in group.others:
            alone = _fault_alone(draft, calls, way, np.arange(way.units // 2))
            if not alone:
                draft.stood.add(way.identity)
                other_ways = True
                break
            draft.faulty[way.identity] = f"cutting it was tried and does not work: {alone}"
    if other_ways:
        raise _OtherWayError
    if not found:
        raise _OnlyAloneError(
            f"{type(draft.network).__name__} cannot be cut as asked: {fault}, though each group of layers can be cut "
            f"alone. Leave layers out with ignore=[...]; these were to be cut: {[group.name for group in groups]}."
        )
    stays = [place for place, group in enumerate(draft.groups) if not group.reason]
    draft.groups = [draft.groups[place] for place in stays]
    draft.importances = [draft.importances[place] for place in stays]


def _fault_alone(draft: _Draft, calls: Sequence[Inputs], group: Group, units: Integers) -> str:
    change = record_of(draft.network, draft.tensors, [group], [units])
    fault = find_fault(draft.network, calls, change, [group], [units])
    undo_cut(draft.network, change)
    return fault


def _warn_if_missed(draft: _Draft, goal: Goal, change: Change, changes: Sequence[Change]) -> None:
    if goal.layers is not None:
        if not any(cut["kept"] for cut in (*changes, change)):
            warn(
                f"Prune(layers={dict(goal.layers)!r}) cuts nothing: rounded to multiples of round_to={goal.round_to}, "
                "these layers keep all of their channels. Keep less of them, or give a smaller round_to."
            )
        return
    base, _, after = change[goal.measure]
    target = float(goal.amount) if isinstance(goal.amount, int) else goal.amount * base
    if target >= base:
        warn(f"Prune cuts nothing: {goal.measure}={goal.amount!r} allows more than the {base:,} that the network has.")
        return
    if abs(after - target) <= TOLERANCE * target:
        return
    small = [group.name for group in draft.groups if len(allowed_counts(group.units, group.step(goal.round_to))) == 1]
    rounding = (
        f" Layers keep multiples of round_to={goal.round_to} channels"
        + (f", so that {', '.join(map(repr, small[:TOLD]))} cannot be cut" if small else "")
        + "; a smaller round_to comes closer."
        if goal.round_to > 1
        else ""
    )
    warn(
        f"Prune asked for {goal.measure}={goal.amount!r}, {target:,.0f} of {base:,}, and reached {after:,} "
        f"({after / target - 1:+.1%}).{rounding} {left_alone(draft.structure.groups)}"
    )
