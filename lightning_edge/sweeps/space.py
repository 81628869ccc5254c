"""The space of a sweep: for each setting the values it may take, as a list or as a range."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from lightning_edge.errors import SweepError

_RANGE_KEYS = ("low", "high", "log", "step")
# More combinations than anybody trains; a grid of them is a mistake.
_MOST_COMBINATIONS = 100_000


@dataclass(frozen=True)
class Choices:
    """A setting that takes one of a few values.

    Attributes:
        values: What it may be: any values that a configuration may have.
    """

    values: tuple[Any, ...]

    def labels(self) -> dict[str | int | float | bool | None, Any]:
        """Give each value under a name that a study can store: itself, or its JSON where it is a list or a mapping."""
        return {value if _is_scalar(value) else json.dumps(value, sort_keys=True): value for value in self.values}

    def examples(self) -> list[Any]:
        """Give the values to try before anything is trained."""
        return list(self.values)

    def plain(self) -> dict[str, Any]:
        """Give it as the sweep file has it."""
        return {"choices": list(self.values)}


@dataclass(frozen=True)
class Range:
    """A setting that takes any number between two.

    Attributes:
        low: The smallest.
        high: The largest.
        log: Whether it is sampled by its logarithm.
        step: Distance of the values, if not all are allowed.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are allowed."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    def examples(self) -> list[Any]:
        """Give the values to try before anything is trained."""
        return [self.low, self.high]

    def plain(self) -> dict[str, Any]:
        """Give it as the sweep file has it."""
        return {"low": self.low, "high": self.high, "log": self.log, "step": self.step}


Dimension = Choices | Range


def read_space(given: Any) -> dict[str, Dimension]:
    """Read the ``space`` of a sweep file.

    Raises:
        SweepError: Naming the setting, what was given and what is allowed.
    """
    if not isinstance(given, Mapping):
        raise SweepError(f"space: given {given!r}; allowed: settings by name, each with a list of values or a range")
    if not given:
        raise SweepError("space: it is empty, so there is nothing to try; give at least one setting")
    for key in given:
        if not isinstance(key, str) or not key or not all(key.split(".")):
            raise SweepError(f"space: given the key {key!r}; allowed: the name of a setting, such as prune.macs")
    return {key: _dimension(key, value) for key, value in given.items()}


def is_grid(space: Mapping[str, Dimension]) -> bool:
    """Whether every setting is a list of values."""
    return all(isinstance(dimension, Choices) for dimension in space.values())


def count(space: Mapping[str, Dimension]) -> int | None:
    """Count the combinations; ``None`` where a range has no end of them."""
    if not is_grid(space):
        return None
    return math.prod(len(dimension.values) for dimension in space.values() if isinstance(dimension, Choices))


def combinations(space: Mapping[str, Dimension]) -> Iterator[dict[str, Any]]:
    """Give all combinations of the values, the last setting changing fastest.

    Raises:
        SweepError: If a setting is a range, or there are too many.
    """
    total = count(space)
    if total is None:
        ranges = [key for key, dimension in space.items() if isinstance(dimension, Range)]
        raise SweepError(f"a grid needs lists of values; {', '.join(ranges)}: a range. List its values, or take tpe")
    if total > _MOST_COMBINATIONS:
        raise SweepError(f"space: a grid of {total:,} combinations; shorten the lists, or take the sampler tpe")
    lists = [dimension.values for dimension in space.values() if isinstance(dimension, Choices)]
    for values in product(*lists):
        yield dict(zip(space, values, strict=True))


def _dimension(key: str, given: Any) -> Dimension:
    if isinstance(given, list):
        return _choices(key, given)
    if not isinstance(given, Mapping):
        raise SweepError(f"space: {key}: given {given!r}; allowed: a list of values, or {{low: ..., high: ...}}")
    if "choices" in given:
        _check_keys(key, given, ("choices",))
        if not isinstance(given["choices"], list):
            raise SweepError(f"space: {key}.choices: given {given['choices']!r}; allowed: a list of values")
        return _choices(key, given["choices"])
    _check_keys(key, given, _RANGE_KEYS)
    return _range(key, given)


def _check_keys(key: str, given: Mapping[Any, Any], allowed: tuple[str, ...]) -> None:
    for name in given:
        if name not in allowed:
            whole = "choices; or low, high, log, step" if allowed == _RANGE_KEYS else ", ".join(allowed)
            raise SweepError(f"space: {key}.{name}: there is no such key here; allowed: {whole}")


def _choices(key: str, values: list[Any]) -> Choices:
    if not values:
        raise SweepError(f"space: {key}: the list is empty; give at least one value")
    found: list[Any] = []
    for value in values:
        _check_plain(key, value)
        # 1 and 1.0 are one choice to a study, and so are 1 and true.
        if value in found:
            raise SweepError(f"space: {key}: {value!r} is there twice; give each value once")
        found.append(value)
    return Choices(tuple(found))


def _check_plain(key: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SweepError(
            f"space: {key}: given {value!r}; allowed: numbers, text, true, false, null, lists of them"
        ) from error


def _range(key: str, given: Mapping[str, Any]) -> Range:
    for name in ("low", "high"):
        if name not in given:
            raise SweepError(f"space: {key}: {name} is missing; a range is {{low: ..., high: ...}}")
    for name in ("low", "high", "step"):
        value = given.get(name)
        if value is None and name == "step":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SweepError(f"space: {key}.{name}: given {value!r}; allowed: a number")
    low, high, log, step = given["low"], given["high"], given.get("log", False), given.get("step")
    if not isinstance(log, bool):
        raise SweepError(f"space: {key}.log: given {log!r}; allowed: true or false")
    if low >= high:
        raise SweepError(f"space: {key}: low={low!r} is not below high={high!r}; give them in order")
    if log and low <= 0:
        raise SweepError(f"space: {key}: low={low!r} has no logarithm; give a low above 0, or leave log out")
    if step is not None and (step <= 0 or log):
        raise SweepError(f"space: {key}.step: given {step!r}; allowed: a number above 0, and not together with log")
    return Range(low, high, log, step)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
