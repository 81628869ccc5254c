"""Prune: structured pruning as a phase. Knows when and how much; `pruning.plan` knows how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_edge.pruning.cost import Measure
from lightning_edge.pruning.cutting import cuts_of, make_cut, undo_cut
from lightning_edge.pruning.importance import CRITERIA, Criterion
from lightning_edge.pruning.plan import Goal, find_groups, plan_cut, plan_trial
from lightning_edge.pruning.ramp import Ramp, Schedule
from lightning_edge.pruning.selection import Scope
from lightning_edge.pruning.sparsity import GroupRegularizer
from lightning_edge.schedule import Batch, Change, Clock, Moment, Phase, check_moment, check_order
from lightning_edge.succession import Succession
from lightning_edge.wording import counted

_MEASURES: dict[str, Measure] = {"macs": "macs", "params": "params", "size": "size_bytes"}


class Prune(Phase):
    """Take whole channels out of the network, so that it gets smaller and faster everywhere, without special kernels.

    Which layers' channels go together is found by DepGraph (Fang et al. 2023, arXiv:2301.12900, torch-pruning). Give
    one of ``macs``, ``params``, ``size`` and ``layers``. A float between 0 and 1 is the fraction that is kept of the
    network as it was before the first cut, an int an absolute number.

    What may be cut is tried on a copy with the first batch of training, so that a network that cannot be traced is
    refused there. A goal that the layers cannot reach is a warning at the cut.

    Moments are epochs (whole numbers from 0) or fractions of training (0.0 to 1.0).

    Args:
        macs: Multiply-accumulates of all layers with weights, for one sample.
        params: Number of parameters.
        size: Bytes of the weights in an int8 file: 1 for each element of a matrix or kernel, 4 for each of a vector.
        layers: Kept fraction of the channels that a layer makes, above 0 and up to 1, by a pattern of layer names such
            as ``stages.2.*``; all other layers keep theirs.
        start: When to cut, or when to begin to. By default before the first step, which is for weights that are trained
            already: a network with random weights would be cut by these.
        end: When the whole cut has been made; ``None``: at once, at ``start``.
        every: How far apart cuts are between ``start`` and ``end``: in epochs if those are epochs, else as a fraction
            of training; ``None``: an epoch.
        schedule: ``linear`` or ``cubic`` (Zhu & Gupta 2017): how much goes by when.
        criterion: Which channels go first: ``l1``, ``l2``, ``bn_scale``, ``taylor``, ``fpgm``, ``lamp``, ``obd``
            (Hessian) or ``random``; see `lightning_edge.pruning.importance`.
        scope: ``global``: the least important channels of the whole network go. ``local``: the same share of
            each layer.
        round_to: Layers keep multiples of so many channels, and at least that many; runtimes compute in such blocks.
        ignore: Names and types of layers that keep their channels, as patterns; a name stands for what is below it,
            too. Layers whose channels are the network's output always keep them.
        sparse_learning: Strength of the group regularizer that pushes channels towards zero before they are cut, added
            to the gradients (Group-SL, Fang et al. 2023); 0.0: none. Published runs used 5e-4.
        sparse_start: When the regularizer begins; it ends with the last cut.
        seed: For ``random``.

    Raises:
        ValueError: If an argument is out of its range, or arguments contradict each other.
    """

    name = "prune"
    # Nothing is tried of layers that will be others.
    waits_for = ("factorize",)
    cuts_parameters = True

    def __init__(
        self,
        macs: int | float | None = None,
        params: int | float | None = None,
        size: int | float | None = None,
        layers: dict[str, float] | None = None,
        start: int | float = 0.0,
        end: int | float | None = None,
        every: int | float | None = None,
        schedule: Schedule = "linear",
        criterion: Criterion = "l2",
        scope: Scope = "global",
        round_to: int = 8,
        ignore: list[str] | None = None,
        sparse_learning: float = 0.0,
        sparse_start: int | float = 0,
        seed: int = 0,
    ) -> None:
        self.macs, self.params, self.size, self.layers = macs, params, size, layers
        self._ramp = Ramp(start, end, every, schedule)
        self.start, self.end, self.every, self.schedule = start, end, every, schedule
        self.criterion, self.scope, self.round_to = criterion, scope, round_to
        self.ignore = ignore
        self.sparse_learning, self.sparse_start = sparse_learning, check_moment("sparse_start", sparse_start)
        self.seed = seed
        self._check_target()
        self._check_rest()
        # With the structure it was made for; made again after a resume.
        self._regularizer: tuple[object, GroupRegularizer] | None = None

    def _check_target(self) -> None:
        amounts = {name: getattr(self, name) for name in _MEASURES}
        given = {name: amount for name, amount in amounts.items() if amount is not None}
        if len(given) + (self.layers is not None) != 1:
            chosen = [*given, *(["layers"] if self.layers is not None else [])]
            raise ValueError(f"Give one of macs, params, size and layers; given: {', '.join(chosen) or 'none'}")
        for name, amount in given.items():
            fraction = isinstance(amount, float) and 0.0 < amount < 1.0
            number = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1
            if not (fraction or number):
                raise ValueError(
                    f"{name}={amount!r} is no target: give the fraction to keep, between 0.0 and 1.0, or an absolute "
                    "number as an int from 1 on"
                )
        if self.layers is not None:
            if not self.layers:
                raise ValueError("layers={} prunes nothing; give patterns of layer names with the fraction to keep")
            for pattern, ratio in self.layers.items():
                if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 < ratio <= 1.0:
                    raise ValueError(f"layers[{pattern!r}]={ratio!r} must be a fraction to keep, above 0.0 up to 1.0")

    def _check_rest(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion={self.criterion!r} is none of {', '.join(map(repr, CRITERIA))}")
        if self.scope not in ("global", "local"):
            raise ValueError(f"scope={self.scope!r} is neither 'global' nor 'local'")
        for name, least in (("round_to", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number from {least} on")
        if isinstance(self.ignore, str) or not all(isinstance(pattern, str) for pattern in self.ignore or ()):
            raise ValueError(f"ignore={self.ignore!r} must be a list of names and types of layers")
        if not 0.0 <= self.sparse_learning < float("inf"):
            raise ValueError(f"sparse_learning={self.sparse_learning!r} must be 0.0 or above")
        check_order("sparse_start", self.sparse_start, "start", self.start)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is found again."""
        return {**vars(self), "_regularizer": None}

    def first_moment(self) -> Moment:
        """When the first cut may come, or the regularizer begins."""
        return self.sparse_start if self.sparse_learning else self.start

    def last_moment(self) -> Moment:
        """When the whole cut has been made."""
        return self._ramp.end

    def began(self, changes: Sequence[Change]) -> bool:
        """Whether anything has been cut; the trial cuts nothing."""
        return bool(cuts_of(changes))

    def finished(self, changes: Sequence[Change]) -> bool:
        """Whether the whole cut has been made."""
        return bool(changes) and bool(changes[-1]["along"] >= 1.0)

    def plan(self, network: nn.Module, clock: Clock, changes: Sequence[Change], batch: Batch) -> Change | None:
        """Plan the cut that is due, or the trial at the beginning of training.

        A cut for which rounding leaves nothing to take is recorded, too, so that a resumed run does not try again.

        Raises:
            CompressionError: If the network cannot be traced or copied, no channels can be cut, a pattern names no
                layer, or the target would empty layers.
        """
        cuts = cuts_of(changes)
        last, epoch = (cuts[-1]["along"], cuts[-1]["epoch"]) if cuts else (0.0, None)
        along = self._ramp.due(clock, last, epoch)
        if along is not None:
            change = plan_cut(network, self._goal(along, len(cuts)), changes, batch)
            return {**change, "cut": len(cuts), "along": along, "epoch": clock.epoch}
        if not changes:
            return {**plan_trial(network, self._goal(1.0, 0), batch), "along": 0.0, "epoch": clock.epoch}
        return None

    @classmethod
    def perform(cls, network: nn.Module, change: Change) -> Succession:
        """Take the recorded channels out, in place; parameters stay the same objects.

        Raises:
            CompressionError: If the network does not have the structure that the record begins with.
        """
        return make_cut(network, change)

    @classmethod
    def undo(cls, network: nn.Module, change: Change) -> None:
        """Grow the network back to what it was before a cut; the elements of all tensors that were cut are zeros.

        Raises:
            CompressionError: If the network does not have the structure that the record ends with.
        """
        undo_cut(network, change)

    def before_step(self, network: nn.Module, clock: Clock, changes: Sequence[Change], batch: Batch) -> None:
        """Add the group regularizer to the gradients, from ``sparse_start`` to the last cut."""
        over = bool(changes) and changes[-1]["along"] >= 1.0
        if not self.sparse_learning or over or not clock.reached(self.sparse_start):
            return
        parameters = dict(network.named_parameters())
        key = (id(network), [(name, parameter.shape) for name, parameter in parameters.items()])
        if self._regularizer is None or self._regularizer[0] != key:
            structure = find_groups(network, batch.inputs(), self.ignore or (), changes)[1]
            self._regularizer = key, GroupRegularizer(structure.groups, parameters)
        self._regularizer[1].add_gradients(parameters, self.sparse_learning)

    def describe(self, change: Change) -> str:
        """Say in one line what a cut did, or what the trial found."""
        if change["kind"] == "trial":
            groups = counted(len(change["stood"]), "group")
            return f"tried on a copy, {groups} of layers can be cut. {change['left_alone']}"
        macs = _change_of("MACs", change["macs"])
        if not change["kept"]:
            return f"{macs}: nothing cut, the next step is smaller than {self.round_to} channels of any layer"
        cut = [set(counts) & {"out_channels", "out_features"} for counts in change["attributes"].values()]
        layers = sum(map(bool, cut))
        make = "makes" if layers == 1 else "make"
        return f"{macs}, {_change_of('parameters', change['params'])}; {counted(layers, 'layer')} {make} fewer channels"

    def figures(self, network: nn.Module, change: Change) -> dict[str, float]:
        """Give what is left after a cut: MACs, parameters, and channels that layers make; nothing of an empty one."""
        if not change["kept"]:
            return {}
        made = (getattr(layer, "out_channels", getattr(layer, "out_features", None)) for layer in network.modules())
        channels = sum(count for count in made if isinstance(count, int))
        return {"cut": 1.0, "macs": change["macs"][2], "params": change["params"][2], "channels": channels}

    def _goal(self, along: float, cut: int) -> Goal:
        keyword = next((name for name in _MEASURES if getattr(self, name) is not None), "macs")
        return Goal(
            measure=_MEASURES[keyword],
            amount=getattr(self, keyword) or 1,
            layers=self.layers,
            removed=self._ramp.removed(along),
            criterion=self.criterion,
            scope=self.scope,
            round_to=self.round_to,
            ignore=self.ignore or (),
            seed=self.seed * 1_000_003 + cut,
        )


def _change_of(what: str, costs: Sequence[int]) -> str:
    base, before, after = costs
    return f"{before:,} -> {after:,} {what} ({after / base:.1%} of {base:,})"
