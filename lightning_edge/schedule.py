"""When things happen in training, and the contract of what happens. No torch here.

A moment is an epoch (a whole number, counted from 0) or a fraction of training (0.0 to 1.0).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Moment = int | float

# One recorded change of a network: plain values and tensors only, so that weights_only=True reads it.
Change = dict[str, Any]


@dataclass(frozen=True)
class Clock:
    """How far training has come, at the start of a batch.

    Attributes:
        epoch: Epochs finished.
        progress: Share of training done, 0.0 to 1.0; ``None`` where its length is not known.
    """

    epoch: int
    progress: float | None

    def reached(self, moment: Moment) -> bool:
        """Whether ``moment`` has come; a fraction never comes while the length of training is not known."""
        if isinstance(moment, int):
            return self.epoch >= moment
        # Progress is a quotient of counts; what lies within rounding of the moment is at it.
        return self.progress is not None and self.progress >= moment - 1e-9


def check_moment(name: str, moment: Moment) -> Moment:
    """Return ``moment`` if it is one.

    Raises:
        ValueError: If it is neither an epoch from 0 on nor a fraction from 0.0 to 1.0.
    """
    whole = isinstance(moment, int) and not isinstance(moment, bool) and moment >= 0
    fraction = isinstance(moment, float) and 0.0 <= moment <= 1.0
    if not (whole or fraction):
        raise ValueError(
            f"{name}={moment!r} is not a moment of training: give an epoch as a whole number from 0 on, "
            "or a fraction of training from 0.0 to 1.0"
        )
    return moment


def check_order(earlier_name: str, earlier: Moment, later_name: str, later: Moment) -> None:
    """Refuse two moments in the wrong order, as far as they can be compared.

    Raises:
        ValueError: If both are epochs or both are fractions, and ``later`` comes first.
    """
    if type(earlier) is type(later) and later < earlier:
        raise ValueError(
            f"{later_name}={later!r} comes before {earlier_name}={earlier!r}; give the same moment or later"
        )


class Phase(ABC):
    """Something that changes a network on a schedule: settings only, what happened is in the record."""

    name: str

    @abstractmethod
    def apply(self, network: Any, clock: Clock, changes: Sequence[Change], sample: Callable[[], Any]) -> Change | None:
        """Bring the network one step closer to where it should be now.

        Args:
            network: The module to change, in place.
            clock: Where training stands.
            changes: What this phase has done so far, oldest first.
            sample: Gives the `Inputs` of the batch at hand.

        Returns:
            The change that was made, or ``None`` if the network is where it should be.
        """

    @classmethod
    @abstractmethod
    def restore(cls, network: Any, change: Change) -> None:
        """Repeat a recorded change on a network of the original structure, so that a checkpoint's weights fit."""

    @abstractmethod
    def first_moment(self) -> Moment:
        """When this phase begins."""

    @abstractmethod
    def describe(self, change: Change) -> str:
        """Say in one line what a change did."""
