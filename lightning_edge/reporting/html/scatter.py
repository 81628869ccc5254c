"""A scatter plot: points with labels beside them, and the ways between some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_edge.reporting.html import labels
from lightning_edge.reporting.html.axis import Axis, axis_of
from lightning_edge.reporting.html.labels import Box
from lightning_edge.reporting.html.markup import Markup, tag
from lightning_edge.reporting.html.picture import COLORS, FONT_SIZE, WIDTH, line, mark, svg, write
from lightning_edge.reporting.html.words import clipped

_HEIGHT = 300.0
_RIGHT, _TOP, _BOTTOM = 14.0, 30.0, 44.0
_LONGEST_LABEL = 26
_LONGEST_TITLE = 44
# More would not find places, and take seconds to look for them.
_MOST_LABELS = 40


@dataclass(frozen=True)
class Point:
    """One point.

    Attributes:
        x: A finite number.
        y: A finite number.
        label: What is written beside it, if there is room; nothing if empty.
        title: What is said when it is pointed at.
        color: Number of its color and shape.
        full: Whether it is filled.
        pale: Whether it steps back behind the others.
    """

    x: float
    y: float
    label: str
    title: str
    color: int = 0
    full: bool = True
    pale: bool = False


@dataclass(frozen=True)
class Side:
    """What an axis shows.

    Attributes:
        name: Its name.
        write: How a tick is written.
        zero: Whether it shows amounts, which begin at 0.
        even: Whether it is never logarithmic.
        better: Where it is better: ``"max"``, ``"min"``, or ``None`` where that is not known.
    """

    name: str
    write: Callable[[float], str]
    zero: bool = False
    even: bool = False
    better: str | None = None

    @property
    def title(self) -> str:
        """Its name, and where it is better."""
        hint = {"max": " (more is better)", "min": " (less is better)"}.get(self.better or "", "")
        return clipped(self.name, _LONGEST_TITLE) + hint


def scatter(
    points: Sequence[Point], x: Side, y: Side, ways: Sequence[Sequence[int]] = (), alone: bool = False
) -> Markup:
    """Draw points.

    Args:
        points: One or more, those whose labels matter most first.
        x: What lies to the right.
        y: What lies upwards.
        ways: Lines, each through points by their numbers, in the color of the last one.
        alone: Whether the picture is a file of its own.
    """
    across = axis_of([point.x for point in points], x.zero, even=x.even)
    up = axis_of([point.y for point in points], y.zero, even=y.even)
    left = max(labels.width(y.write(tick), FONT_SIZE) for tick in up.ticks) + 12
    area = Box(left, _TOP, WIDTH - _RIGHT, _HEIGHT - _BOTTOM)
    places = [
        (across.place(point.x, area.left, area.right), up.place(point.y, area.bottom, area.top)) for point in points
    ]
    return svg(
        f"{y.title} over {x.title}",
        _HEIGHT,
        *_frame(area, across, up, x, y),
        *(_way(way, points, places) for way in ways),
        *(
            mark(*place, point.color, point.title, point.full, 4.0 if point.pale else 5.0, point.pale)
            for place, point in reversed(list(zip(places, points, strict=True)))
        ),
        *_labels(points, places, area),
        alone=alone,
    )


def _frame(area: Box, across: Axis, up: Axis, x: Side, y: Side) -> list[Markup]:
    drawn = [write(2, 14, y.title, "faint")]
    for tick in up.ticks:
        height = up.place(tick, area.bottom, area.top)
        drawn.append(line((area.left, height), (area.right, height), "rule"))
        drawn.append(write(area.left - 6, height + 4, y.write(tick), "faint", "end"))
    end = area.left - 20
    for tick in across.ticks:
        place = across.place(tick, area.left, area.right)
        wide = labels.width(x.write(tick), FONT_SIZE)
        drawn.append(line((place, area.bottom), (place, area.bottom + 4), "base"))
        # The numbers of a narrow axis would run into each other, and the last one out of the picture.
        if place - wide / 2 > end and place + wide / 2 <= WIDTH:
            drawn.append(write(place, area.bottom + 17, x.write(tick), "faint", "middle"))
            end = place + wide / 2 + 4
    drawn.append(line((area.left, area.bottom), (area.right, area.bottom), "base"))
    drawn.append(write(WIDTH - _RIGHT, _HEIGHT - 6, x.title, "faint", "end"))
    return drawn


def _way(way: Sequence[int], points: Sequence[Point], places: Sequence[tuple[float, float]]) -> Markup:
    # Markup, since of a long front no corner may be cut off.
    corners = Markup(" ".join(f"{x:.1f},{y:.1f}" for x, y in (places[number] for number in way)))
    return tag("polyline", points=corners, class_=f"way c{points[way[-1]].color}")


def _labels(points: Sequence[Point], places: Sequence[tuple[float, float]], area: Box) -> list[Markup]:
    words = [clipped(point.label, _LONGEST_LABEL) for point in points[:_MOST_LABELS]]
    room = Box(area.left + 2, 18, WIDTH, area.bottom - 2)
    drawn = []
    boxes = labels.place(places, words, FONT_SIZE, room)
    for box, place, label, point in zip(boxes, places, words, points, strict=False):
        if box is None:
            continue
        if labels.apart(box, place) > 14 or not labels.is_nearest(box, place, places):
            drawn.append(line(place, box.nearest(*place), "lead"))
        drawn.append(write(box.left, box.bottom - FONT_SIZE * 0.32, label, f"halo t{point.color % COLORS}"))
    return drawn
