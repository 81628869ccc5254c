"""Counts which samples change their class between the float network and what is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from lightning_edge.comparison import class_scores
from lightning_edge.reporting.classes import ClassChanges

_MOST_TOLD = 40
_MOST_CLASSES = 100
# Larger tables of labels by classes are not looked at.
_MOST_CONFUSED = 12
_UNKNOWN = -1


@final
class Labels:
    """The labels of the batch that a validation loop is at, where batches are ``(inputs, labels, ...)``."""

    def __init__(self) -> None:
        self._batch: Any = None

    def note(self, batch: Any) -> None:
        """Take the batch that the loop comes to."""
        self._batch = batch

    def of(self, samples: int) -> Tensor | None:
        """Give a class for each of so many samples, (samples,); ``None`` where the batch does not hold that."""
        if not isinstance(self._batch, list | tuple) or len(self._batch) < 2:
            return None
        labels = self._batch[1]
        if not isinstance(labels, Tensor) or labels.shape != (samples,) or labels.is_floating_point():
            return None
        return labels.detach().cpu().long()


@final
class ClassCounter:
    """Collects the classes that two networks give the same samples, batch by batch.

    Args:
        labels: The labels of the batch at hand.
    """

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._seen: list[Tensor] = []
        self._classes = 0

    def update(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        """Add a batch of flattened outputs, the float network's first; without class scores it does not count."""
        scores = class_scores(before, now)
        if scores is None:
            return
        old, new = (tensor.detach().cpu().double() for tensor in scores)
        chosen = new.argmax(1)
        # Where the largest score is shared, any of its classes is the same one.
        shared = old.gather(1, chosen[:, None]).squeeze(1) == old.amax(1)
        labels = self._labels.of(len(old))
        known = torch.full_like(chosen, _UNKNOWN) if labels is None else labels
        self._seen.append(torch.stack((torch.where(shared, chosen, old.argmax(1)), chosen, known)).int())
        self._classes = max(self._classes, old.shape[1])

    def result(self) -> ClassChanges | None:
        """Sum up all batches so far; ``None`` where none had class scores."""
        if not self._seen:
            return None
        before, now, labels = torch.cat(self._seen, 1).long()
        different = before != now
        pairs, counts = torch.stack((before, now), 1)[different].unique(dim=0, return_counts=True)
        order = counts.argsort(descending=True, stable=True)[:_MOST_TOLD]
        where = different.nonzero().flatten()[:_MOST_TOLD]
        changes = ClassChanges(
            samples=len(before),
            changed=int(different.sum()),
            pairs=_triples(pairs[order, 0], pairs[order, 1], counts[order]) if len(pairs) else (),
            first=_triples(where, before[where], now[where]),
        )
        labelled = (labels >= 0) & (labels < self._classes)
        if not labelled.any():
            return changes
        return self._with_labels(changes, *(part[labelled] for part in (before, now, labels)))

    def _with_labels(self, changes: ClassChanges, before: Tensor, now: Tensor, labels: Tensor) -> ClassChanges:
        right, right_now, count = before == labels, now == labels, self._classes
        changes = replace(
            changes,
            became_right=int((right_now & ~right).sum()),
            became_wrong=int((right & ~right_now).sum()),
        )
        if count <= _MOST_CLASSES:
            by_class = (part.bincount(minlength=count) for part in (labels, labels[right], labels[right_now]))
            changes = replace(changes, by_class=_triples(*by_class))
        if count <= _MOST_CONFUSED:
            changes = replace(changes, before=_confusion(labels, before, count), now=_confusion(labels, now, count))
        return changes


def _confusion(labels: Tensor, found: Tensor, classes: int) -> list[list[int]]:
    counts: list[list[int]] = (labels * classes + found).bincount(minlength=classes**2).view(classes, -1).tolist()
    return counts


def _triples(*columns: Tensor) -> tuple[tuple[int, int, int], ...]:
    first, second, third = (column.tolist() for column in columns)
    return tuple(zip(first, second, third, strict=True))
