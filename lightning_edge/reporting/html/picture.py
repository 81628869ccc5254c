"""Pictures in SVG: their frame, the shapes of their marks, and the colors, for light and for dark."""

from __future__ import annotations

import math

from lightning_edge.reporting.html.markup import Markup, join, tag

FONT_SIZE = 12.0
# Drawn at this width, a picture is as readable on a phone as on a desk.
WIDTH = 400.0

COLORS = 6
_LIGHT = ("#0b62a8", "#b4470a", "#0a7a55", "#8a3ea8", "#7a6200", "#b3245b")
_DARK = ("#79b8ff", "#ffa657", "#56d4a0", "#d2a8ff", "#e3c04a", "#ff8fb8")
_SHAPES = ("circle", "square", "triangle", "diamond", "down", "hexagon")
_CORNERS = {
    "square": (4, math.pi / 4),
    "triangle": (3, -math.pi / 2),
    "diamond": (4, 0.0),
    "down": (3, math.pi / 2),
    "hexagon": (6, 0.0),
}


def _variables(colors: tuple[str, ...], ink: str, faint: str, rule: str, paper: str) -> str:
    named = "".join(f"--c{number}:{color};" for number, color in enumerate(colors))
    return f"{named}--ink:{ink};--faint:{faint};--rule:{rule};--paper:{paper};"


LIGHT = _variables(_LIGHT, "#1c2024", "#5b636b", "#d5dae0", "#ffffff")
DARK = _variables(_DARK, "#e8eaed", "#a4adb6", "#3a424b", "#16191d")
MARKS = (
    "svg{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif;font-size:12px}"
    "svg text{fill:var(--ink)}svg .faint{fill:var(--faint)}svg .rule{stroke:var(--rule);stroke-width:1}"
    "svg .base{stroke:var(--faint);stroke-width:1}svg .lead{stroke:var(--faint);stroke-width:.7}"
    "svg .halo{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}"
    "svg .track{fill:var(--rule)}svg .way{fill:none;stroke-width:1.4;stroke-opacity:.55}"
    "svg .mark{stroke-width:1.8}svg .hollow{fill:var(--paper)}svg .pale{opacity:.5}"
    + "".join(
        f"svg .t{number}{{fill:var(--c{number})}}svg .c{number}{{stroke:var(--c{number})}}"
        f"svg .c{number}.full,svg .c{number}.bar{{fill:var(--c{number})}}"
        for number in range(COLORS)
    )
    + "svg .bar{stroke:none}svg .second{fill-opacity:.45}"
)


def svg(title: str, height: float, *content: object, alone: bool = False) -> Markup:
    """Make a picture of `WIDTH` by ``height``.

    Args:
        title: What it shows, for those who do not see it.
        height: Its height, in its own units.
        content: What is drawn.
        alone: Whether it is a file of its own and not a part of a page, so that it needs its own colors.
    """
    style = None
    if alone:
        colors = f"svg{{{LIGHT}background:var(--paper)}}@media(prefers-color-scheme:dark){{svg{{{DARK}}}}}"
        style = tag("style", Markup(colors + MARKS))
    return tag(
        "svg",
        tag("title", title),
        style,
        *content,
        xmlns="http://www.w3.org/2000/svg" if alone else None,
        viewBox=f"0 0 {WIDTH:.0f} {height:.0f}",
        role="img",
    )


def mark(
    x: float, y: float, color: int, title: str, full: bool = True, radius: float = 5.0, pale: bool = False
) -> Markup:
    """Draw a mark, its shape and its color by number, so that neither has to be told apart alone.

    Args:
        x: Where its middle is.
        y: Where its middle is.
        color: Number of the color and the shape.
        title: What it stands for.
        full: Whether it is filled.
        radius: Its size.
        pale: Whether it steps back behind others.
    """
    shape = _SHAPES[color % len(_SHAPES)]
    classes = f"mark c{color % COLORS} {'full' if full else 'hollow'}{' pale' if pale else ''}"
    if shape == "circle":
        return tag("circle", tag("title", title), cx=x, cy=y, r=radius, class_=classes)
    corners, turn = _CORNERS[shape]
    reach = radius * (1.25 if corners == 3 else 1.15)
    places = (turn + 2 * math.pi * corner / corners for corner in range(corners))
    points = " ".join(f"{x + reach * math.cos(angle):.1f},{y + reach * math.sin(angle):.1f}" for angle in places)
    return tag("polygon", tag("title", title), points=points, class_=classes)


def cell(x: float, y: float, side: float, color: int, share: float, title: str) -> Markup:
    """Draw a square of a table of counts, as strong as its share from 0 to 1 of its row, and never hiding a number."""
    strength = 0.14 + 0.22 * share
    return tag(
        "rect", tag("title", title), x=x, y=y, width=side, height=side, fill_opacity=strength, class_=f"bar c{color}"
    )


def line(start: tuple[float, float], end: tuple[float, float], classes: str) -> Markup:
    """Draw a straight line."""
    return tag("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], class_=classes)


def write(x: float, y: float, words: str, classes: str | None = None, anchor: str | None = None) -> Markup:
    """Write a line of text whose base line is at ``y``; ``anchor`` is ``"middle"`` or ``"end"``."""
    return tag("text", words, x=x, y=y, class_=classes, text_anchor=anchor)


def group(*content: object) -> Markup:
    """Put several together."""
    return tag("g", join(*content))
