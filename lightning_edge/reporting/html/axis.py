"""An axis of a chart: where a value lies on it, and the round numbers that are written beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
# Values further apart than this would crowd in a corner of an even axis.
_LOGARITHMIC_FROM = 25.0
_DIGITS_OF_A_FLOAT = 1e-9


@dataclass(frozen=True)
class Axis:
    """A range of values with its ticks.

    Attributes:
        low: The value at its beginning.
        high: The value at its end, above ``low``.
        ticks: Round numbers between both.
        logarithmic: Whether equal ratios, and not equal differences, are equally long.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """Say where between two coordinates a value lies."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        return start + (self._scaled(value) - low) / (high - low) * (end - start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def axis_of(values: Sequence[float], zero: bool = False, count: int = 5, even: bool = False) -> Axis:
    """Make an axis that holds all values.

    Args:
        values: One or more finite numbers.
        zero: Whether the axis shows amounts, which begin at 0; where all are above 0 and lie far apart it becomes
            logarithmic.
        count: About how many ticks it has.
        even: Whether it is never logarithmic, as for a time.
    """
    low, high = min(values), max(values)
    if zero and not even and low > 0 and high > _LOGARITHMIC_FROM * low:
        return _logarithmic(low, high, count)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            high = 1.0
        low -= 0.06 * (high - low) if low < 0 else 0.0
        high += 0.06 * (high - low)
    else:
        spread = high - low
        if spread <= max(abs(low), abs(high)) * _DIGITS_OF_A_FLOAT:
            spread = abs(high) * 0.1 or 1.0
        low, high = low - 0.12 * spread, high + 0.12 * spread
    return Axis(low, high, _ticks(low, high, count))


def _ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in _STEPS if power * factor >= rough * 0.999)
    first = math.ceil(low / step - _DIGITS_OF_A_FLOAT)
    last = math.floor(high / step + _DIGITS_OF_A_FLOAT)
    # Twelve digits are enough for every tick, and 0.30000000000000004 is none.
    return tuple(float(f"{number * step:.12g}") for number in range(first, last + 1))


def _logarithmic(low: float, high: float, count: int) -> Axis:
    low, high = low / 1.25, high * 1.25
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [tick for tick in _decades(low, high, factors)]
        if len(ticks) <= count + 1:
            return Axis(low, high, tuple(ticks), True)
    every = math.ceil(len(ticks) / count)
    return Axis(low, high, tuple(ticks[::every]), True)


def _decades(low: float, high: float, factors: Sequence[int]) -> Iterator[float]:
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for factor in factors:
            tick = float(f"{factor}e{power}")
            if low <= tick <= high:
                yield tick
