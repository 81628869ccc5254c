"""Sparsify: zeros among the weights as a phase. Knows when and how many; `sparsity.masks` knows which."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.schedule import Batch, Change, Clock, Moment, Phase, check_moment, check_order
from lightning_edge.sparsity.layers import choose, parameter_of, unpack_all
from lightning_edge.sparsity.masks import n_of_m, pack, unstructured
from lightning_edge.succession import Succession
from lightning_edge.wording import counted

Schedule = Literal["linear", "cubic"]
Ranking = Literal["layer", "global"]


class Sparsify(Phase):
    """Set the smallest weights of linear layers and convolutions to zero, and hold them there.

    Shapes stay, and so does the time of inference on the targets: docs/sparsity.md says what zeros do not make faster.

    Moments are epochs (whole numbers from 0) or fractions of training (0.0 to 1.0).

    Args:
        sparsity: Share of the weights that are zero at the end, above 0 and below 1; ``None``: a half, or what
            ``pattern`` fixes.
        pattern: ``"unstructured"``, or ``"n:m"``: of every m consecutive inputs, n stay (``"2:4"``, Mishra et al. 2021,
            arXiv:2104.08378).
        start: When the zeros begin.
        end: When the last come; ``None``: all at ``start``. An epoch where ``start`` is one, else a fraction.
        every: Time between two steps: whole epochs, or a fraction of training; ``None``: each epoch.
        schedule: How the share grows from ``start`` to ``end``, beginning with 0: ``"cubic"`` (fast at first, Zhu &
            Gupta 2017, arXiv:1710.01878) or ``"linear"``.
        ranking: Compare magnitudes within each ``"layer"``, or over all of them (``"global"``, unstructured only).
        ignore: Patterns (`fnmatch`) of names of layers that stay dense.
        rewind_to: With the last zeros, all other parameters go back to their values at this moment, with fresh
            optimizer state (Frankle & Carbin 2019, arXiv:1803.03635; after some training, Frankle et al. 2020,
            arXiv:1912.05671); ``None``: they do not.

    Raises:
        ValueError: If a setting is out of range, or two do not go together.
    """

    name = "sparsify"
    holds_zeros = True

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        start: int | float = 0.3,
        end: int | float | None = None,
        every: int | float | None = None,
        schedule: Schedule = "cubic",
        ranking: Ranking = "layer",
        ignore: Sequence[str] = (),
        rewind_to: int | float | None = None,
    ) -> None:
        self.start = check_moment("start", start)
        for name, moment in (("end", end), ("rewind_to", rewind_to)):
            if moment is not None and type(check_moment(name, moment)) is not type(start):
                raise ValueError(f"{name}={moment!r} and start={start!r}: give both as epochs or both as fractions")
        if end is not None:
            check_order("start", start, "end", end)
        if rewind_to is not None:
            check_order("rewind_to", rewind_to, "start", start)
        _check_every(every, start, end)
        for setting, value, allowed in (
            ("schedule", schedule, get_args(Schedule)),
            ("ranking", ranking, get_args(Ranking)),
        ):
            if value not in allowed:
                raise ValueError(f"{setting}={value!r} is not one of {allowed}")
        _check_pattern(pattern, sparsity, ranking)
        if isinstance(ignore, str) or not all(isinstance(entry, str) for entry in ignore):
            raise ValueError(f"ignore={ignore!r} must be a list of patterns, for example ['head.*']")
        self.sparsity = sparsity
        self.pattern = pattern
        self.end = end
        self.every = every
        self.schedule = schedule
        self.ranking = ranking
        self.ignore = ignore
        self.rewind_to = rewind_to
        # The newest masks' complements, unpacked, and the change they are of.
        self._dropped: tuple[Change, dict[str, Tensor]] | None = None

    def first_moment(self) -> Moment:
        """When the weights to go back to are remembered, else when the zeros begin."""
        return self.start if self.rewind_to is None else self.rewind_to

    def last_moment(self) -> Moment:
        """When the last zeros come."""
        return self.start if self.end is None else self.end

    def plan(self, network: nn.Module, clock: Clock, changes: Sequence[Change], batch: Batch) -> Change | None:
        """Remember weights, tighten the masks step by step, go back to what was remembered.

        Raises:
            CompressionError: If there is no weight to mask, or a layer would lose all of its weights.
        """
        newest = _newest(changes, "mask")
        remembered = _newest(changes, "remember")
        if newest is None and remembered is None and self.rewind_to is not None and clock.reached(self.rewind_to):
            weights = {name: parameter.detach().cpu().clone() for name, parameter in network.named_parameters()}
            return {"kind": "remember", "epoch": clock.epoch, "progress": clock.progress, "weights": weights}
        if newest is not None and newest["final"]:
            if remembered is None or _newest(changes, "rewind") is not None:
                return None
            # The very tensors of both changes, so that a checkpoint holds them once.
            return {
                "kind": "rewind",
                "epoch": remembered["epoch"],
                "weights": remembered["weights"],
                "masks": newest["masks"],
                "shapes": newest["shapes"],
            }
        return self._tighten(network, clock, newest) if self._is_due(clock, newest) else None

    @classmethod
    def perform(cls, network: nn.Module, change: Change) -> Succession:
        """Set masked weights to zero; going back resets the state that optimizers keep of what went back."""
        succession = Succession()
        if change["kind"] == "remember":
            return succession
        if change["kind"] == "rewind":
            succession = _go_back(network, change["weights"])
        _set_zeros(network, {name: ~mask for name, mask in _unpacked(network, change).items()})
        return succession

    @classmethod
    def undo(cls, network: nn.Module, change: Change) -> None:
        """Do nothing: no structure was changed, and weights are loaded afterwards."""

    def finished(self, changes: Sequence[Change]) -> bool:
        """Whether all zeros are there, and weights went back if they were to."""
        newest = _newest(changes, "mask")
        rewound = self.rewind_to is None or _newest(changes, "rewind") is not None
        return newest is not None and bool(newest["final"]) and rewound

    def after_step(self, network: nn.Module, changes: Sequence[Change]) -> None:
        """Set masked weights back to zero, whatever gradients, momentum or weight decay made of them."""
        newest = _newest(changes, "mask")
        if newest is None:
            return
        if self._dropped is None or self._dropped[0] is not newest:
            self._dropped = newest, {name: ~mask for name, mask in _unpacked(network, newest).items()}
        _set_zeros(network, self._dropped[1])

    def describe(self, change: Change) -> str:
        """Say in one line what a change did."""
        if change["kind"] == "remember":
            return "weights remembered, to go back to with the last zeros"
        if change["kind"] == "rewind":
            return f"kept weights are back at those of epoch {change['epoch']}, with fresh optimizer state"
        share = change["zeros"] / change["weights"]
        layers = counted(len(change["masks"]), "layer")
        text = f"{share:.1%} of {change['weights']:,} weights in {layers} are zero ({self.pattern})"
        if change["left_alone"]:
            text += "; left dense: " + "; ".join(f"{name}: {why}" for name, why in change["left_alone"].items())
        return text

    def figures(self, network: nn.Module, change: Change) -> dict[str, float]:
        """Give the share of weights that are zero."""
        found = super().figures(network, change)
        return {**found, "zeros": change["zeros"] / change["weights"]} if change["kind"] == "mask" else found

    def _is_due(self, clock: Clock, newest: Change | None) -> bool:
        if newest is None:
            return clock.reached(self.start)
        # A run that was resumed for longer is less far along than it was: zeros that are there stay.
        if self._share(clock) <= newest["share"]:
            return False
        if self.end is not None and clock.reached(self.end):
            return True
        if isinstance(self.every, float):
            return _steps(clock.progress, self.start, self.every) > _steps(newest["progress"], self.start, self.every)
        return bool(clock.epoch >= newest["epoch"] + (self.every or 1))

    def _tighten(self, network: nn.Module, clock: Clock, newest: Change | None) -> Change:
        n, m = _n_and_m(self.pattern) or (1, 1)
        weights, left_alone = choose(network, self.ignore, m)
        if not weights:
            raise CompressionError(
                f"{type(network).__name__} has no weight to sparsify with pattern={self.pattern!r} and "
                f"ignore={list(self.ignore)!r}: {left_alone or 'no linear layer or convolution'}."
            )
        if newest is not None:
            earlier = _unpacked(network, newest)
            weights = {
                name: replace(weight, mask=earlier[name].cpu()) if name in earlier else weight
                for name, weight in weights.items()
            }
        share = self._share(clock)
        if m > 1:
            masks = n_of_m(weights, n, m, share)
        else:
            sparsity = 0.5 if self.sparsity is None else self.sparsity
            masks = unstructured(weights, share * sparsity, over_all=self.ranking == "global")
        for name, mask in masks.items():
            if not mask.any():
                raise CompressionError(
                    f"every weight of {name} would be zero with sparsity={self.sparsity!r} and "
                    f"ranking={self.ranking!r}. Rank by layer (ranking='layer'), ask for fewer zeros, or leave it "
                    f"dense with ignore=[{name.rpartition('.')[0]!r}]."
                )
        return {
            "kind": "mask",
            "replaces": True,
            "epoch": clock.epoch,
            "progress": clock.progress,
            "share": share,
            "final": self.end is None or clock.reached(self.end),
            "masks": {name: pack(mask) for name, mask in masks.items()},
            "shapes": {name: list(mask.shape) for name, mask in masks.items()},
            "zeros": sum(int((~mask).sum()) for mask in masks.values()),
            "weights": sum(mask.numel() for mask in masks.values()),
            "left_alone": left_alone,
        }

    def _share(self, clock: Clock) -> float:
        """Give how much of the zeros there should be now, 0.0 to 1.0."""
        if self.end is None or clock.reached(self.end):
            return 1.0
        now = clock.epoch if isinstance(self.start, int) else clock.progress
        assert now is not None  # a fraction was reached
        done = max(0.0, (now - self.start) / (self.end - self.start))
        return done if self.schedule == "linear" else 1 - (1 - done) ** 3


def _check_every(every: Moment | None, start: Moment, end: Moment | None) -> None:
    if every is None:
        return
    whole = isinstance(every, int) and not isinstance(every, bool) and every >= 1
    if not whole and not (isinstance(every, float) and 0 < every < 1):
        raise ValueError(
            f"every={every!r} is neither whole epochs (1 or more) nor a fraction of training (above 0.0, below 1.0)"
        )
    if end is None:
        raise ValueError(
            f"every={every!r} without end: all zeros come at start={start!r}. Give end, or leave every out"
        )
    if isinstance(every, float) and isinstance(start, int):
        raise ValueError(
            f"every={every!r} is a fraction of training, and start={start!r} and end={end!r} are epochs: give every in "
            "epochs, or all three as fractions"
        )


def _check_pattern(pattern: str, sparsity: float | None, ranking: str) -> None:
    grouped = _n_and_m(pattern)
    if pattern != "unstructured" and (grouped is None or not 0 < grouped[0] < grouped[1]):
        raise ValueError(f"pattern={pattern!r} is neither 'unstructured' nor 'n:m' with 0 < n < m, for example '2:4'")
    if grouped is not None and sparsity is not None:
        raise ValueError(
            f"sparsity={sparsity!r} with pattern={pattern!r}: the pattern fixes it at {1 - grouped[0] / grouped[1]:g}. "
            "Leave sparsity out"
        )
    if grouped is not None and ranking == "global":
        raise ValueError(f"ranking='global' with pattern={pattern!r}: the pattern fixes every layer. Leave ranking out")
    if sparsity is not None and not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r} must be above 0 and below 1")


def _n_and_m(pattern: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return None if match is None else (int(match[1]), int(match[2]))


def _steps(progress: float | None, start: Moment, every: float) -> int:
    # Progress is a quotient of counts; what lies within rounding of a step is at it.
    return -1 if progress is None else int((progress - start) / every + 1e-9)


def _newest(changes: Sequence[Change], kind: str) -> Change | None:
    return next((change for change in reversed(changes) if change["kind"] == kind), None)


def _unpacked(network: nn.Module, change: Mapping[str, Any]) -> dict[str, Tensor]:
    return unpack_all(network, change["masks"], change["shapes"])


def _set_zeros(network: nn.Module, dropped: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, zeros in dropped.items():
            weight = parameter_of(network, name)
            weight.masked_fill_(zeros.to(weight.device), 0.0)


def _go_back(network: nn.Module, weights: Mapping[str, Tensor]) -> Succession:
    """Set parameters to remembered values; taking their own place, they begin without optimizer state."""
    parameters = {name: parameter_of(network, name) for name in weights}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise CompressionError(
                    f"{name} was remembered with shape {tuple(weights[name].shape)}, and its shape is "
                    f"{tuple(parameter.shape)} now. Factorize and prune before rewind_to."
                )
            parameter.copy_(weights[name])
            parameter.grad = None
    return Succession(replaced={parameter: (parameter,) for parameter in parameters.values()})
