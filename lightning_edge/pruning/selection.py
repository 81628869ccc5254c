"""How many units of channels each group keeps, so that the network meets its target. Knows numbers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Scope = Literal["global", "local"]

# Beyond this share of the target a cut has missed it.
TOLERANCE = 0.02
# As close as trimming tries to come.
_CLOSE = 0.005


@dataclass(frozen=True)
class Choices:
    """What each group may keep.

    Attributes:
        importances: For each group, the importance of its units.
        allowed: For each group, the counts of units it may keep, ascending; the last one is all of them.
    """

    importances: Sequence[Floats]
    allowed: Sequence[Integers]

    @property
    def units(self) -> Integers:
        """All units of each group."""
        return np.array([allowed[-1] for allowed in self.allowed], dtype=np.int64)

    def nearest(self, wanted: Floats) -> Integers:
        """Round wanted counts of units (..., groups) to allowed ones; halfway, the larger."""
        rounded = np.empty(wanted.shape, dtype=np.int64)
        for group, allowed in enumerate(self.allowed):
            # A count up to the middle between two allowed ones, but not the middle itself, belongs to the lower.
            middles = (allowed[:-1] + allowed[1:]) / 2
            rounded[..., group] = allowed[np.searchsorted(middles, wanted[..., group], side="right")]
        return rounded


def allowed_counts(units: int, step: int) -> Integers:
    """Give the counts a group of ``units`` may keep: multiples of ``step``, at least one of them, or all."""
    return np.array(sorted({*range(step, units + 1, step), units}), dtype=np.int64)


def choose(choices: Choices, cost: Callable[[Integers], Floats], target: float, scope: Scope) -> Integers:
    """Choose how many units each group keeps so that the cost comes closest to the target.

    ``global``: one threshold over the importances of all groups. ``local``: the same share of every group. Then single
    groups move by one allowed step, or two of them at once, where that brings the cost closer.

    Args:
        choices: What may be kept.
        cost: Cost of counts (choices, groups).
        target: Wanted cost.
        scope: What is compared with what.

    Returns:
        Kept units of each group.
    """
    if not choices.allowed or cost(choices.units[None])[0] <= target:
        return choices.units
    at = _by_threshold(choices) if scope == "global" else _by_share(choices)
    steps = at.steps
    low, high = 0, steps  # at `low` the cost is above the target, at `high` it is not, or it is the least there is
    while high - low > 1:
        middle = (low + high) // 2
        if cost(at(middle)[None])[0] <= target:
            high = middle
        else:
            low = middle
    candidates = np.stack([at(low), at(high)])
    return _trim(choices, cost, target, candidates[int(np.abs(cost(candidates) - target).argmin())])


@dataclass(frozen=True)
class _Path:
    """A way from keeping everything, at 0, to keeping the least, at ``steps``."""

    steps: int
    counts: Callable[[int], Integers]

    def __call__(self, step: int) -> Integers:
        return self.counts(step)


def _by_threshold(choices: Choices) -> _Path:
    ascending = [np.sort(importance) for importance in choices.importances]
    thresholds = np.unique(np.concatenate(ascending))
    kept = [len(values) - np.searchsorted(values, thresholds, side="right") for values in ascending]
    counts = choices.nearest(np.stack(kept, axis=1).astype(np.float64))
    return _Path(len(thresholds), lambda step: counts[step - 1] if step else choices.units)


def _by_share(choices: Choices) -> _Path:
    steps = 4096
    units = choices.units.astype(np.float64)
    return _Path(steps, lambda step: choices.nearest(units * (1 - step / steps)))


def _trim(choices: Choices, cost: Callable[[Integers], Floats], target: float, kept: Integers) -> Integers:
    while True:
        error = abs(cost(kept[None])[0] - target)
        if error <= _CLOSE * target:
            return kept
        singles = _neighbours(choices, kept)
        best, best_error = _closest(singles, cost, target)
        if best_error >= error and error > TOLERANCE / 2 * target:
            for single in singles:
                pair, pair_error = _closest(_neighbours(choices, single), cost, target)
                if pair_error < best_error:
                    best, best_error = pair, pair_error
        if best is None or best_error >= error:
            return kept
        kept = best


def _closest(candidates: Integers, cost: Callable[[Integers], Floats], target: float) -> tuple[Integers | None, float]:
    if not len(candidates):
        return None, float("inf")
    errors = np.abs(cost(candidates) - target)
    return candidates[int(errors.argmin())], float(errors.min())


def _neighbours(choices: Choices, kept: Integers) -> Integers:
    groups, counts = [], []
    for group, (allowed, count) in enumerate(zip(choices.allowed, kept.tolist(), strict=True)):
        position = int(allowed.searchsorted(count))
        for other in (position - 1, position + 1):
            if 0 <= other < len(allowed):
                groups.append(group)
                counts.append(allowed[other])
    found = np.repeat(kept[None], len(groups), axis=0)
    found[np.arange(len(groups)), groups] = counts
    return found
