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

    @property
    def fewest(self) -> Integers:
        """The least each group may keep."""
        return np.array([allowed[0] for allowed in self.allowed], dtype=np.int64)

    def nearest(self, wanted: Floats) -> Integers:
        """Round wanted counts of units to allowed ones; halfway, the larger."""
        rounded = [
            allowed[len(allowed) - 1 - int(np.abs(allowed - count)[::-1].argmin())]
            for allowed, count in zip(self.allowed, wanted, strict=True)
        ]
        return np.array(rounded, dtype=np.int64)


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

    def counts(step: int) -> Integers:
        if step == 0:
            return choices.units
        threshold = thresholds[step - 1]
        kept = [len(values) - np.searchsorted(values, threshold, side="right") for values in ascending]
        return choices.nearest(np.array(kept, dtype=np.float64))

    return _Path(len(thresholds), counts)


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
    found = []
    for group, allowed in enumerate(choices.allowed):
        position = int(np.searchsorted(allowed, kept[group]))
        for other in (position - 1, position + 1):
            if 0 <= other < len(allowed):
                changed = kept.copy()
                changed[group] = allowed[other]
                found.append(changed)
    return np.array(found, dtype=np.int64).reshape(-1, len(kept))
