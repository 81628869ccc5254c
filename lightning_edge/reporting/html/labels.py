"""Labels beside the points of a chart, placed so that none covers another, a point, or the edge."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

# Beside a point first, right before left, above and below it last.
_ANGLES = tuple(
    sorted((math.pi * eighth / 8 for eighth in range(16)), key=lambda angle: round(abs(math.sin(angle)), 6))
)
_DISTANCES = (9.0, 15.0, 23.0, 33.0, 45.0, 60.0, 78.0, 100.0)
# Widths of letters as shares of the size of the font, in the widest sans-serif that systems come with.
_LETTER, _CAPITAL, _NARROW, _WIDE = 0.63, 0.76, 0.4, 1.0
_NARROW_LETTERS = frozenset("ijlt.,:;'|!()[] ")


@dataclass(frozen=True)
class Box:
    """A rectangle, in the units of a picture; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether both share an area."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def holds(self, other: Box) -> bool:
        """Whether another lies within this one."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The place in it that is nearest to a point."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


def width(words: str, font_size: float) -> float:
    """Estimate how wide a text is drawn; on the wide side, since the font is the reader's."""
    return font_size * sum(_share(letter) for letter in words)


def _share(letter: str) -> float:
    if letter in _NARROW_LETTERS:
        return _NARROW
    if unicodedata.east_asian_width(letter) in "WF" or letter in "mwMW%@\N{HORIZONTAL ELLIPSIS}":
        return _WIDE
    return _CAPITAL if letter.isupper() else _LETTER


def place(
    points: Sequence[tuple[float, float]],
    words: Sequence[str],
    font_size: float,
    within: Box,
    clear: float = 6.0,
) -> list[Box | None]:
    """Choose a place for every label: the nearest to its point that is free, and nearer to no other point if it can be.

    Args:
        points: Where the points are; the labels belong to the first of them.
        words: The labels, the most important first; an empty one gets no place.
        font_size: Size of their font.
        within: Where labels may be.
        clear: How far around a point no label may be.

    Returns:
        The box of each label; ``None`` where there is no room for it.
    """
    taken = [Box(x - clear, y - clear, x + clear, y + clear) for x, y in points]
    boxes: list[Box | None] = []
    for (x, y), label in zip(points, words, strict=False):
        box = _free((x, y), points, label, font_size, within, taken) if label else None
        if box is not None:
            taken.append(box)
        boxes.append(box)
    return boxes


def apart(box: Box, point: tuple[float, float]) -> float:
    """How far a point lies from a box."""
    return math.dist(box.nearest(*point), point)


def _free(
    point: tuple[float, float],
    points: Sequence[tuple[float, float]],
    label: str,
    font_size: float,
    within: Box,
    taken: Sequence[Box],
) -> Box | None:
    wide, high = width(label, font_size), font_size * 1.15
    found = None
    for distance in _DISTANCES:
        for angle in _ANGLES:
            place = point[0] + distance * math.cos(angle), point[1] + distance * math.sin(angle)
            box = _beside(*place, math.cos(angle), wide, high)
            if not within.holds(box) or any(box.overlaps(other) for other in taken):
                continue
            if is_nearest(box, point, points):
                return box
            found = found or box
    return found


def is_nearest(box: Box, point: tuple[float, float], points: Sequence[tuple[float, float]]) -> bool:
    """Whether no other point lies clearly nearer to a label than its own."""
    own = apart(box, point)
    return all(apart(box, other) >= own - 0.5 for other in points)


def _beside(x: float, y: float, aside: float, wide: float, high: float) -> Box:
    """A box whose edge, or middle where it is above or below, is at a place."""
    left = x if aside > 0.3 else x - wide if aside < -0.3 else x - wide / 2
    return Box(left, y - high / 2, left + wide, y + high / 2)
