"""A condition on a figure, as text: ``tflite.size_bytes < 60000``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CONDITION = re.compile(rf"\s*(?P<name>[^\s<>=]+)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>{_NUMBER})\s*")
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """What a figure must be.

    Attributes:
        name: The figure.
        sign: ``<``, ``<=``, ``>`` or ``>=``.
        limit: What it is compared with.
    """

    name: str
    sign: str
    limit: float

    def __str__(self) -> str:
        """Give it as it was written."""
        return f"{self.name} {self.sign} {self.limit:g}"

    def holds(self, value: float) -> bool:
        """Whether a value keeps it."""
        return _COMPARISONS[self.sign](value, self.limit)


def read_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        ValueError: If it is not a name, one of ``< <= > >=`` and a number.
    """
    match = _CONDITION.fullmatch(text)
    if match is None or not math.isfinite(float(match["limit"])):
        raise ValueError(
            f"given {text!r}; allowed: a name, one of < <= > >=, a number, such as 'tflite.size_bytes < 60000'"
        )
    return Condition(match["name"], match["sign"], float(match["limit"]))
