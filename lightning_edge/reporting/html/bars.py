"""Pictures with a row for each file: its name and its numbers, and a line below that draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_edge.reporting.html import labels
from lightning_edge.reporting.html.axis import Axis, axis_of
from lightning_edge.reporting.html.markup import Markup, join, tag
from lightning_edge.reporting.html.picture import FONT_SIZE, WIDTH, line, mark, svg, write

# How a tick is written.
Unit = Callable[[float], str]

_ROW = 40.0
_FOOT = 22.0
_EDGE = 8.0


@dataclass(frozen=True)
class Entry:
    """A row of such a picture.

    Attributes:
        name: What it is.
        note: Its numbers in words.
        values: The numbers that are drawn, finite and 0 or more.
        title: What is said when they are pointed at.
        color: Number of its color.
        full: Whether it is filled.
    """

    name: str
    note: str
    values: tuple[float, ...]
    title: str
    color: int = 0
    full: bool = True


def ranges(title: str, entries: Sequence[Entry], unit: Unit) -> Markup:
    """Draw from the first value to the last: a mark at the first, bars at the others.

    Args:
        title: What the picture shows.
        entries: One or more rows, each with the same number of values.
        unit: How a tick is written.
    """
    axis = axis_of([value for entry in entries for value in entry.values], zero=True)

    def drawn(entry: Entry, height: float) -> Markup:
        places = [axis.place(value, _EDGE, WIDTH - _EDGE) for value in entry.values]
        color = f"mark c{entry.color % 6}"
        return join(
            line((places[0], height), (places[-1], height), color),
            *(line((place, height - 5), (place, height + 5), color) for place in places[1:]),
            mark(places[0], height, entry.color, entry.title, entry.full),
        )

    return _rows(title, entries, drawn, axis, unit)


def boxes(title: str, entries: Sequence[Entry], unit: Unit) -> Markup:
    """Draw distributions: a line from the first value to the last, a box from the second to the fourth, a mark between.

    Args:
        title: What the picture shows.
        entries: One or more rows of six values in order: lowest, quarter, middle, three quarters, and two high ones.
        unit: How a tick is written.
    """
    axis = axis_of([value for entry in entries for value in entry.values], zero=True)

    def drawn(entry: Entry, height: float) -> Markup:
        low, quarter, middle, most, *high = (axis.place(value, _EDGE, WIDTH - _EDGE) for value in entry.values)
        color = f"mark c{entry.color % 6}"
        wide = max(most - quarter, 1.0)
        return join(
            line((low, height), (high[-1], height), color),
            *(line((place, height - 5), (place, height + 5), color) for place in (low, *high)),
            _bar(quarter, height - 5, wide, 10.0, entry.color, entry.title, second=True),
            mark(middle, height, entry.color, entry.title, entry.full, 4.0),
        )

    return _rows(title, entries, drawn, axis, unit)


def amounts(title: str, entries: Sequence[Entry], unit: Unit) -> Markup:
    """Draw each value as a bar from 0; the second of a row is narrow and pale.

    Args:
        title: What the picture shows.
        entries: One or more rows of one or two values.
        unit: How a tick is written.
    """
    high = max((value for entry in entries for value in entry.values), default=0.0)
    axis = axis_of([0.0, high or 1.0], zero=True)

    def drawn(entry: Entry, height: float) -> Markup:
        bars = []
        for number, value in enumerate(entry.values):
            top, thick = (height - 6, 7.0) if number == 0 else (height + 2, 4.0)
            wide = max(axis.place(value, _EDGE, WIDTH - _EDGE) - _EDGE, 1.0)
            bars.append(_bar(_EDGE, top, wide, thick, entry.color, entry.title, second=number > 0))
        return join(*bars)

    return _rows(title, entries, drawn, axis, unit)


def shares(title: str, entries: Sequence[Entry], names: Sequence[str]) -> Markup:
    """Draw each row as one bar that is parted by its values.

    Args:
        title: What the picture shows.
        entries: One or more rows, each with a value for each name, not all of them 0.
        names: What the parts are; a part of the n-th has the n-th color.
    """

    def drawn(entry: Entry, height: float) -> Markup:
        bars, start, whole = [], _EDGE, sum(entry.values)
        for number, (value, name) in enumerate(zip(entry.values, names, strict=True)):
            wide = value / whole * (WIDTH - 2 * _EDGE)
            if wide <= 0:
                continue
            bars.append(_bar(start, height - 7, wide, 14.0, number, f"{entry.name}: {name} {value / whole:.1%}"))
            start += wide
        return join(*bars)

    return join(_rows(title, entries, drawn, None, str), _legend(names))


def _rows(
    title: str,
    entries: Sequence[Entry],
    drawn: Callable[[Entry, float], Markup],
    axis: Axis | None,
    unit: Unit,
) -> Markup:
    foot = _FOOT if axis is not None else 4.0
    height = _ROW * len(entries) + foot
    content: list[Markup] = []
    if axis is not None:
        end = 0.0
        for tick in axis.ticks:
            place = axis.place(tick, _EDGE, WIDTH - _EDGE)
            content.append(line((place, 0), (place, height - foot), "rule"))
            left = min(max(place - labels.width(unit(tick), FONT_SIZE) / 2, 0), WIDTH)
            wide = labels.width(unit(tick), FONT_SIZE)
            if left >= end and left + wide <= WIDTH:
                content.append(write(left, height - 6, unit(tick), "faint"))
                end = left + wide + 6
    for number, entry in enumerate(entries):
        top = _ROW * number
        note = labels.width(entry.note, FONT_SIZE)
        content.append(write(0, top + 14, _fitting(entry.name, WIDTH - note - 12), "halo"))
        content.append(write(WIDTH, top + 14, entry.note, "faint halo", "end"))
        content.append(drawn(entry, top + 27))
    return svg(title, height, *content)


def _fitting(words: str, room: float) -> str:
    if labels.width(words, FONT_SIZE) <= room:
        return words
    while words and labels.width(words, FONT_SIZE) > room - FONT_SIZE:
        words = words[:-1]
    return f"{words}\N{HORIZONTAL ELLIPSIS}"


def _bar(x: float, y: float, wide: float, high: float, color: int, title: str, second: bool = False) -> Markup:
    classes = f"bar c{color % 6}{' second' if second else ''}"
    return tag("rect", tag("title", title), x=x, y=y, width=wide, height=high, class_=classes)


def _legend(names: Sequence[str]) -> Markup:
    squares = (
        tag("span", tag("i", class_=f"swatch b{number % 6}"), f" {name}", class_="key")
        for number, name in enumerate(names)
    )
    return tag("p", *squares, class_="legend")
