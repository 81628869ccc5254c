"""The verdict on a file: its grade, the reasons, and what a user allows. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Grade = Literal["exact", "close", "differs", "broken"]
Strict = bool | Literal["exact", "close"]

GRADES: tuple[Grade, ...] = get_args(Grade)

# By what share of the network's own value a metric may be worse: as good as kept, and lost. Losses and errors begin
# near zero, where small differences are large shares.
_KEPT = {True: 0.01, False: 0.1}
_LOST = {True: 0.1, False: 1.0}


@dataclass(frozen=True)
class MetricChange:
    """The user's own metric, of the network and of its file on the same data.

    Attributes:
        name: Name of the metric.
        network: Its value for the network that was exported.
        file: Its value for the file.
        higher_is_better: Where it is better.
    """

    name: str
    network: float
    file: float
    higher_is_better: bool

    @property
    def loss(self) -> float:
        """By what share of the network's value the file is worse; 0 if it is as good or better."""
        if math.isnan(self.network):
            return 0.0
        if math.isnan(self.file):
            return math.inf
        worse = self.network - self.file if self.higher_is_better else self.file - self.network
        if worse <= 0:
            return 0.0
        return worse / abs(self.network) if self.network else math.inf

    @property
    def kept(self) -> bool:
        """Whether the file is as good as the network, within what rounding costs."""
        return self.loss <= _KEPT[self.higher_is_better]

    @property
    def lost(self) -> bool:
        """Whether the file is so much worse that it does another job."""
        return self.loss > _LOST[self.higher_is_better]

    def __str__(self) -> str:
        """Say what it costs."""
        return f"{self.name} is {self.file:.4g}, the network's {self.network:.4g}"


@dataclass(frozen=True)
class Judgement:
    """A grade, and why it is not a better one.

    Attributes:
        grade: ``"exact"``: the same values, but for float32's rounding. ``"close"``: within the tolerance.
            ``"differs"``: outside it. ``"broken"``: outside it, and what comes out is something else: values that are
            not finite, other classes, noise, or the user's metric gone.
        reasons: A line for each; empty for an exact file.
    """

    grade: Grade
    reasons: tuple[str, ...] = ()

    def allowed(self, strict: Strict) -> bool:
        """Whether a file of this grade is no error: ``True`` refuses broken ones, a grade all that are worse."""
        if strict is False:
            return True
        worst: Grade = "differs" if strict is True else strict
        return GRADES.index(self.grade) <= GRADES.index(worst)

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.grade}: {'; '.join(self.reasons)}" if self.reasons else self.grade


def check_strict(strict: Strict) -> None:
    """Refuse what says nothing of grades.

    Raises:
        ValueError: Naming what was given and what is allowed.
    """
    if not isinstance(strict, bool) and strict not in ("exact", "close"):
        raise ValueError(f"strict={strict!r} is not one of True, False, 'exact', 'close'")
