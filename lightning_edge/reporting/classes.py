"""Which samples a file puts into another class than the float network: a part of its row. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ClassChanges:
    """Classes of a file against those of the float network, over the whole split. Classes are numbers from 0.

    Attributes:
        samples: Samples that both put into a class.
        changed: Those that are in another class than before.
        pairs: Class before, class now and number of samples, the most frequent changes first.
        first: Number of the sample in the order of the split, class before and class now, of the first changes.
        became_right: Samples that only the file gives their label's class; ``None`` where labels are not known.
        became_wrong: Samples that only the float network does.
        by_class: Samples of each class by their labels, how many of them the float network gets right, and how many the
            file; empty where labels are not known or there are many classes.
        before: Samples by label (row) and class (column) of the float network, of few classes.
        now: The same of the file.
    """

    samples: int
    changed: int
    pairs: Sequence[tuple[int, int, int]] = ()
    first: Sequence[tuple[int, int, int]] = ()
    became_right: int | None = None
    became_wrong: int | None = None
    by_class: Sequence[tuple[int, int, int]] = ()
    before: Sequence[Sequence[int]] = ()
    now: Sequence[Sequence[int]] = ()
