"""A page: its head, sections, pictures, tables, lists and tiles. One file that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_edge.reporting.html.markup import Markup, tag, text
from lightning_edge.reporting.html.style import SHEET

# Nothing is loaded and no script runs, even if a name found its way around the escaping.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_LONGEST_LIST = 40
# Longer texts than this are broken into lines.
_WIDE = 30
_ICONS = {
    "good": '<circle cx="6" cy="6" r="5" fill="currentColor"/>',
    "near": '<circle cx="6" cy="6" r="4.5" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    '<path d="M6 1.5a4.5 4.5 0 0 0 0 9z" fill="currentColor"/>',
    "warn": '<path d="M6 .5 12 11H0z" fill="currentColor"/>',
    "bad": '<path d="m1.5 1.5 9 9m0-9-9 9" stroke="currentColor" stroke-width="2.6"/>',
    "unknown": '<circle cx="6" cy="6" r="4.5" fill="none" stroke="currentColor" stroke-width="1.5"/>',
}


def page(title: str, *content: object) -> str:
    """Make the whole page.

    Args:
        title: Its title.
        content: What is on it.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(SHEET)),
    )
    body = tag("body", tag("main", *content))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def section(title: str, *content: object) -> Markup:
    """Make a section; none where there is nothing in it."""
    inside = [part for part in content if part]
    return tag("section", tag("h2", title), *inside) if inside else Markup()


def pictures(*shown: tuple[str, Markup] | None) -> Markup:
    """Put pictures side by side where there is room, each with its caption."""
    figures = [tag("figure", tag("figcaption", words), drawn) for words, drawn in filter(None, shown)]
    return tag("div", *figures, class_="pictures") if figures else Markup()


def table(
    headers: Sequence[object],
    rows: Sequence[Sequence[object]],
    caption: str,
    wordy: Sequence[str] = (),
    chosen: Sequence[int] = (),
) -> Markup:
    """Make a table that scrolls in its own box where it is too wide; none without rows.

    Args:
        headers: Names of the columns; the first has the names of the rows.
        rows: The cells.
        caption: What the table is.
        wordy: Headers of columns of text and not of numbers.
        chosen: Numbers of rows that stand out.
    """
    if not rows:
        return Markup()
    kinds = [
        None if header not in wordy else "words wide" if _widest(rows, column) > _WIDE else "words"
        for column, header in enumerate(headers)
    ]
    heads = [tag("th", header, scope="col", class_=kind) for header, kind in zip(headers, kinds, strict=True)]
    lines = []
    for number, row in enumerate(rows):
        cells = [tag("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)]
        lines.append(tag("tr", tag("th", row[0], scope="row"), *cells, class_="chosen" if number in chosen else None))
    drawn = tag("table", tag("caption", caption), tag("thead", tag("tr", *heads)), tag("tbody", *lines))
    return tag("div", drawn, class_="scroll", tabindex="0", role="region", aria_label=caption)


def without(headers: list[object], rows: list[list[object]], name: str) -> tuple[list[object], list[list[object]]]:
    """Leave a column out of what is to be a table."""
    place = headers.index(name)
    return headers[:place] + headers[place + 1 :], [row[:place] + row[place + 1 :] for row in rows]


def _widest(rows: Sequence[Sequence[object]], column: int) -> int:
    return max(0 if isinstance(row[column], Markup) else len(str(row[column])) for row in rows)


def tiles(entries: Sequence[tuple[str, object, object]]) -> Markup:
    """Show a few values large: the name, the value, and what it is to be compared with."""
    return tag(
        "div",
        *(
            tag("dl", tag("dt", name), tag("dd", value, class_="value"), tag("dd", than), class_="tile")
            for name, value, than in entries
        ),
        class_="tiles",
    )


def points(entries: Sequence[object]) -> Markup:
    """List sentences; of very many the first, with the number of the others."""
    if not entries:
        return Markup()
    shown = [tag("li", text(entry)) for entry in entries[:_LONGEST_LIST]]
    if len(entries) > _LONGEST_LIST:
        shown.append(tag("li", f"and {len(entries) - _LONGEST_LIST:,} more"))
    return tag("ul", *shown)


def state(kind: str, words: str, title: str | None = None) -> Markup:
    """Say a state in a word, a color and a shape.

    Args:
        kind: ``"good"``, ``"near"``, ``"warn"``, ``"bad"`` or ``"unknown"``.
        words: The word.
        title: What is said when it is pointed at.
    """
    icon = tag("svg", Markup(_ICONS[kind]), viewBox="0 0 12 12", aria_hidden="true")
    color = "good" if kind == "near" else kind
    return tag("span", icon, tag("span", words), class_=f"state {color}", title=title)


def quiet(words: object) -> Markup:
    """A remark below what it is about."""
    return tag("p", words, class_="quiet")
