"""When things happen in training, and the contract of what happens. No torch here.

A moment is an epoch (a whole number, counted from 0) or a fraction of training (0.0 to 1.0).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol

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


# Phases that change the network follow each other in this order; others may lie anywhere.
ORDER = ("factorize", "prune", "sparsify", "quantize")


def share(moment: Moment, max_epochs: int | None) -> float | None:
    """Give a moment as a fraction of training; ``None`` where that is not known."""
    if isinstance(moment, float):
        return moment
    return None if max_epochs in (None, -1, 0) else moment / max_epochs


def comes(moment: Moment, max_epochs: int | None) -> bool:
    """Whether a moment lies within a training; where its length is not known, every epoch does.

    The last batch begins before a fraction of 1.0 is trained, and epochs are counted from 0.
    """
    if isinstance(moment, float):
        return moment < 1.0
    return max_epochs is None or max_epochs == -1 or moment < max_epochs


class Batch(Protocol):
    """The training batch at hand, as a phase may look at it: nothing of the looking leaves a trace in training."""

    def inputs(self) -> Any:
        """Give the `Inputs` that training_step feeds the network."""

    def gradients(self, *, per_sample: bool = False) -> Iterator[dict[str, Any]]:
        """Give the gradient of the training loss for each of the network's parameters that has one, by name.

        The module runs in eval mode and its buffers are put back, so that no statistics move and nothing is dropped.
        What a training_step counts in plain Python objects, it counts once more.

        Args:
            per_sample: One dict for each sample of this process's batch, instead of one for the whole batch, averaged
                over all processes.
        """


class Phase(ABC):
    """Something that changes a network on a schedule: settings only, what happened is in the record.

    A change is planned from the settings, the clock and the batch at hand, and performed from the plan alone. So the
    same change can be performed again: on the other processes, on an averaged copy, on a fresh network before a
    checkpoint's weights load.

    Attributes:
        name: Name in records and checkpoints.
        waits_for: Names of phases that have to be finished before this one plans anything, where they take part.
        cuts_parameters: Whether its changes replace or shorten parameters, which optimizers have to follow.
        holds_zeros: Whether it keeps weights at zero by masks, which fit the weights as they are.
    """

    name: str
    waits_for: ClassVar[tuple[str, ...]] = ()
    cuts_parameters: ClassVar[bool] = False
    holds_zeros: ClassVar[bool] = False

    @abstractmethod
    def first_moment(self) -> Moment:
        """When this phase begins."""

    def last_moment(self) -> Moment:
        """When this phase makes its last change; the first moment where it makes only one."""
        return self.first_moment()

    def began(self, changes: Sequence[Change]) -> bool:
        """Whether these changes did something to the network."""
        return bool(changes)

    def finished(self, changes: Sequence[Change]) -> bool:
        """Whether nothing is left to do after these changes, so that a training that ends now ends as was asked."""
        return bool(changes)

    @abstractmethod
    def plan(self, network: Any, clock: Clock, changes: Sequence[Change], batch: Batch) -> Change | None:
        """Plan the change that is due, leaving the network as it is.

        Args:
            network: The module to change.
            clock: Where training stands.
            changes: What this phase has done so far, oldest first.
            batch: The batch at hand.

        Returns:
            The next change, with its ``kind``; ``None`` if the network is where it should be. Asked again after each
            change.
        """

    @classmethod
    @abstractmethod
    def perform(cls, network: Any, change: Change) -> Any:
        """Make a planned or recorded change, in place.

        Returns:
            The `Succession` of its parameters: what was cut and what was replaced.
        """

    @classmethod
    @abstractmethod
    def undo(cls, network: Any, change: Change) -> None:
        """Give the network the structure it had before a change, in place; weights that are gone come back as zeros.

        Asked in reverse order, before the weights of an earlier checkpoint load.
        """

    def ends_float_training(self, network: Any) -> bool:
        """Say whether the next change is the last sight of the float network, whose weights are then kept."""
        return False

    def prime(self, network: Any, change: Change, batch: Batch) -> None:
        """Set what a change added from the batch at hand; asked once, not when the change is repeated."""
        return

    def before_step(self, network: Any, clock: Clock, changes: Sequence[Change], batch: Batch) -> None:
        """Add to the gradients, right before an optimizer steps."""
        return

    def after_step(self, network: Any, changes: Sequence[Change]) -> None:
        """Project the parameters, right after an optimizer has stepped."""
        return

    @abstractmethod
    def describe(self, change: Change) -> str:
        """Say in one line what a change did."""

    def figures(self, network: Any, change: Change) -> dict[str, float]:
        """Say in figures what a change did, for loggers; nothing where it did nothing.

        Args:
            network: The network after it.
            change: The change.
        """
        return {change["kind"]: 1.0}

    def settings(self) -> dict[str, Any]:
        """Give the settings as plain values, to be compared with those of a checkpoint; objects by their class."""
        return {name: _plain(value) for name, value in vars(self).items() if not name.startswith("_")}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"


def check_phases(phases: Sequence[Phase], max_epochs: int | None = None) -> None:
    """Refuse phases that cannot go together.

    Args:
        phases: All of one training.
        max_epochs: Its length where it is known, so that epochs and fractions can be compared.

    Raises:
        TypeError: If it is no list of phases.
        ValueError: If there is none, two are of a kind, or one that must come first ends after the next has begun.
    """
    if isinstance(phases, Phase | type) or any(not isinstance(phase, Phase) for phase in phases):
        raise TypeError(f"phases={phases!r} is no list of phases; give for example [Quantize(start=0.7)]")
    if not phases:
        raise ValueError("phases is empty; give at least one, for example [Quantize(start=0.7)]")
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names):
        raise ValueError(f"phases={names} names a kind twice; give each kind of phase once")
    for earlier, later in pairwise(ranked(phases)):
        end, begin = earlier.last_moment(), later.first_moment()
        if type(end) is not type(begin):
            ends, begins = share(end, max_epochs), share(begin, max_epochs)
        else:
            ends, begins = float(end), float(begin)
        if ends is not None and begins is not None and ends > begins:
            raise ValueError(
                f"{type(earlier).__name__} makes its last change at {end!r} and {type(later).__name__} begins at "
                f"{begin!r}, which must come after: the order is {', '.join(ORDER)}. Let "
                f"{type(earlier).__name__} end earlier or {type(later).__name__} begin later."
            )


def ranked(phases: Sequence[Phase]) -> list[Phase]:
    """Give the phases that change the network, in the order in which they follow each other."""
    return sorted((phase for phase in phases if phase.name in ORDER), key=lambda phase: ORDER.index(phase.name))
