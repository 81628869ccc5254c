"""Which samples a file puts into another class than the float network, and whether that is for better or worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lightning_edge.reporting.html import bars
from lightning_edge.reporting.html.bars import Entry
from lightning_edge.reporting.html.choice import names_of
from lightning_edge.reporting.html.markup import Markup
from lightning_edge.reporting.html.page import pictures, quiet, section, table, without
from lightning_edge.reporting.html.picture import WIDTH, cell, svg, write
from lightning_edge.reporting.html.words import ABSENT, clipped, number, share, signed
from lightning_edge.wording import counted

if TYPE_CHECKING:
    from lightning_edge.reporting.classes import ClassChanges
    from lightning_edge.reporting.report import Report, Row

_MOST_DRAWN = 10
_MOST_NAMED = 24
# Numbers in the cells of a larger table would not be readable on a phone.
_LARGEST_DRAWN = 12
_MOST_CLASSES = 16
_LONGEST_NAME = 24
# Room for the names of rows and columns.
_HEAD = 28.0


def classes(report: Report, chosen: Row | None) -> Markup:
    """Show for every file how many samples changed their class, and for the file to ship which and to what."""
    rows = [row for row in report.rows if row.classes is not None]
    if not rows:
        return Markup()
    headers: list[object] = ["File", "Samples", "Another class", "Share", "Became right", "Became wrong"]
    cells: list[list[object]] = []
    for name, row in zip(names_of(rows), rows, strict=True):
        found = row.classes
        assert found is not None
        moved = share(found.changed / found.samples) if found.samples else ABSENT
        cells.append(
            [
                name,
                *map(number, (found.samples, found.changed)),
                moved,
                *map(number, (found.became_right, found.became_wrong)),
            ]
        )
    if all(row.classes is None or row.classes.became_right is None for row in rows):
        for header in ("Became right", "Became wrong"):
            headers, cells = without(headers, cells, header)
    shown = chosen if chosen is not None and chosen.classes is not None else rows[-1]
    found = shown.classes
    assert found is not None
    marked = [number for number, row in enumerate(rows) if row is shown]
    return section(
        "Which samples changed their class",
        table(headers, cells, "Samples in another class than in the float network", (), marked),
        *_details(shown, found),
    )


def _details(row: Row, found: ClassChanges) -> list[Markup]:
    name = _namer(row)
    if not found.changed:
        return [
            quiet(f"{row.label} gives every one of {found.samples:,} samples the class that the float network does.")
        ]
    if _is_small_square(found.before) and _is_small_square(found.now):
        drawn = [
            ("Label (row) by class (column): float network", _matrix("Confusion before", found.before, name)),
            (f"Label (row) by class (column): {row.label}", _matrix("Confusion now", found.now, name)),
        ]
    else:
        entries = [
            Entry(f"{name(old)} to {name(new)}", told := counted(count, "sample"), (float(count),), told)
            for old, new, count in found.pairs[:_MOST_DRAWN]
        ]
        drawn = [
            (f"Class before to class now, {row.label}", bars.amounts("Most frequent changes of class", entries, number))
        ]
    named = ", ".join(f"{place:,} ({name(old)} to {name(new)})" for place, old, new in found.first[:_MOST_NAMED])
    more = found.changed - min(len(found.first), _MOST_NAMED)
    return [
        pictures(*drawn),
        _by_class(found, name),
        table(
            ["Class before", "Class now", "Samples"],
            [[name(old), name(new), number(count)] for old, new, count in found.pairs[:_MOST_CLASSES]],
            "Changes of class, the most frequent first",
            ("Class now",),
        ),
        quiet(f"Samples by their number in the split, from 0: {named}{f', and {more:,} more' if more > 0 else ''}."),
    ]


def _is_small_square(counts: Sequence[Sequence[int]]) -> bool:
    """Whether it can be drawn; what comes from a file elsewhere may have any form."""
    return 0 < len(counts) <= _LARGEST_DRAWN and all(len(line) == len(counts) for line in counts)


def _by_class(found: ClassChanges, name: Callable[[int], str]) -> Markup:
    # With very many classes those whose figures moved most.
    moved = sorted(enumerate(found.by_class), key=lambda entry: -abs(entry[1][2] - entry[1][1]))[:_MOST_CLASSES]
    cells = [
        [
            name(label),
            number(samples),
            share(before / samples),
            share(now / samples),
            signed(now - before),
        ]
        for label, (samples, before, now) in sorted(moved)
        if samples
    ]
    count = len(found.by_class)
    caption = "Right by class, of labels"
    if count > _MOST_CLASSES:
        caption = f"{caption}: the {_MOST_CLASSES} of {count} classes that moved most"
    return table(["Class", "Samples", "Right before", "Right now", "Change"], cells, caption)


def _matrix(title: str, counts: Sequence[Sequence[int]], name: Callable[[int], str]) -> Markup:
    """Draw a table of counts in which each cell is as dark as its share of the row: wrong ones in another color."""
    side = (WIDTH - _HEAD) / max(len(counts), 1)
    content: list[Markup] = []
    for row, line in enumerate(counts):
        middle = _HEAD + (row + 0.5) * side
        content.append(write(_HEAD - 6, middle + 4, f"{row}", "faint", "end"))
        content.append(write(middle, _HEAD - 10, f"{row}", "faint", "middle"))
        whole = sum(line)
        for column, count in enumerate(line):
            if count <= 0:
                continue
            left, top = _HEAD + column * side, _HEAD + row * side
            told = (
                f"{name(row)} taken for {name(column)}: {count:,} of {whole:,}"
                if row != column
                else f"{name(row)} right: {count:,} of {whole:,}"
            )
            content.append(cell(left, top, side - 1, int(row != column), count / whole, told))
            content.append(write(left + side / 2, top + side / 2 + 4, _short(count), None, "middle"))
    return svg(title, _HEAD + len(counts) * side, *content)


def _short(count: int) -> str:
    if count < 1000:
        return f"{count}"
    return f"{count / 1000:.1f}k" if count < 9950 else f"{count / 1000:.0f}k"


def _namer(row: Row) -> Callable[[int], str]:
    """What a class is called: by the file's own labels, else by its number."""
    labels = (row.interface.labels if row.interface is not None else None) or ()

    def name(number: int) -> str:
        return clipped(f"{number} {labels[number]}", _LONGEST_NAME) if 0 <= number < len(labels) else f"{number}"

    return name
