"""A bar chart as SVG text: one bar a row, both axes labelled. No plotting library."""

from __future__ import annotations

from collections.abc import Mapping
from xml.sax.saxutils import escape

_ROW, _BAR, _TOP, _BOTTOM, _WIDTH, _VALUE = 22, 14, 40, 46, 420, 90
_LETTER = 7.2


def bar_chart(values: Mapping[str, float], *, title: str, axis: str, rows: str) -> str:
    """Draw one horizontal bar for each value, in the order given.

    Args:
        values: Label of the row -> length of its bar; a negative value has a bar of no length.
        title: Above the chart.
        axis: What the lengths are, with their unit.
        rows: What the rows are.

    Returns:
        A whole SVG document.

    Raises:
        ValueError: If there is no value.
    """
    if not values:
        raise ValueError("values is empty; a chart needs at least one bar")
    left = int(30 + _LETTER * max(len(label) for label in values))
    height = _TOP + _ROW * len(values) + _BOTTOM
    width = left + _WIDTH + _VALUE
    bottom = _TOP + _ROW * len(values)
    largest = max(0.0, *values.values()) or 1.0
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="monospace" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="14" y="{(_TOP + bottom) // 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(_TOP + bottom) // 2})">{escape(rows)}</text>',
    ]
    for quarter in range(5):
        x = left + _WIDTH * quarter / 4
        lines.append(f'<line x1="{x:g}" y1="{_TOP}" x2="{x:g}" y2="{bottom}" stroke="#ccc"/>')
        lines.append(f'<text x="{x:g}" y="{bottom + 16}" text-anchor="middle">{largest * quarter / 4:.3g}</text>')
    lines.append(f'<text x="{left + _WIDTH // 2}" y="{bottom + 36}" text-anchor="middle">{escape(axis)}</text>')
    for row, (label, value) in enumerate(values.items()):
        y = _TOP + _ROW * row + (_ROW - _BAR) // 2
        length = _WIDTH * max(0.0, value) / largest
        lines.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{escape(label)}</text>')
        lines.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{_BAR}" fill="#4477aa"/>')
        lines.append(f'<text x="{left + length + 6:.1f}" y="{y + 11}">{value:.3g}</text>')
    lines.append("</svg>")
    return "\n".join(lines) + "\n"
