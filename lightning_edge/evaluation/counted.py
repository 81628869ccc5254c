"""The user's loop, with a count of the samples that are in another class than in the float network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from lightning_edge.evaluation.class_changes import ClassCounter, Labels
from lightning_edge.evaluation.reference import Reference, compared_with
from lightning_edge.evaluation.validation import Validation
from lightning_edge.reporting.classes import ClassChanges


@final
@dataclass(frozen=True)
class CountedValidation:
    """A loop whose every pass is held against the float network's kept outputs.

    Attributes:
        loop: The loop.
        floats: The float network; before its own first pass, and where it has no class scores, nothing is counted.
    """

    loop: Validation
    floats: Reference

    def run(self, answer: Callable[..., Any]) -> tuple[dict[str, float], ClassChanges | None]:
        """Run the loop once: what it logged, and which samples changed their class.

        Args:
            answer: As for `Validation.run`.

        Raises:
            EdgeError: If the loop did not call the network.
        """
        if not self.floats.classifies:
            return self.loop.run(answer), None
        labels = Labels()
        counter = ClassCounter(labels)
        metrics = self.loop.run(compared_with(self.floats.answers(), answer, counter), labels)
        return metrics, counter.result()
