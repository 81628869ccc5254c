"""A network layer by layer: where its bytes are, what was cut, and what each layer costs in int8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_edge.reporting.html import bars
from lightning_edge.reporting.html.bars import Entry
from lightning_edge.reporting.html.markup import Markup
from lightning_edge.reporting.html.page import pictures, quiet, section, table, without
from lightning_edge.reporting.html.words import ABSENT, known, number, share, size

if TYPE_CHECKING:
    from lightning_edge.reporting.layers import LayerRow
    from lightning_edge.reporting.report import Report

# A picture of more layers is longer than anybody looks at; the table has more.
_MOST_DRAWN = 24
_MOST_LISTED = 150


def layers(report: Report) -> Markup:
    """Show the layers with weights in the order of the network, and those that were cut."""
    rows = list(report.layers)
    measured = [row for row in rows if known(row.increase)]
    found = {row.name: row for row in rows}
    names = list(dict.fromkeys([*found, *report.channels]))
    shown = pictures(_bytes(rows), _channels(report, names), _costs(measured))
    headers: list[object] = [
        "Layer",
        "Channels before",
        "Now",
        "Bytes in float",
        "Now in",
        "Bytes now",
        "Left",
        "Cost in int8",
    ]
    cells: list[list[object]] = []
    for name in names:
        row, channels = found.get(name), report.channels.get(name)
        before = None if row is None else row.float_bytes
        cells.append(
            [
                name,
                ABSENT if channels is None else number(channels[0]),
                ABSENT if channels is None else number(channels[1]),
                number(before),
                ABSENT if row is None else row.precision,
                ABSENT if row is None else number(row.bytes),
                share(row.bytes / before) if row is not None and before else ABSENT,
                ABSENT if row is None or not known(row.increase) else number(row.increase, 3),
            ]
        )
    for name, missing in (
        ("Channels before", not report.channels),
        ("Now", not report.channels),
        *((name, not rows) for name in ("Bytes in float", "Now in", "Bytes now", "Left")),
        ("Cost in int8", not measured),
    ):
        if missing:
            headers, cells = without(headers, cells, name)
    left = len(cells) - _MOST_LISTED
    return section(
        "Layer by layer",
        shown,
        table(headers, cells[:_MOST_LISTED], "Layers with weights, in the order of the network", ("Now in",)),
        quiet(f"{left:,} more layers are in report.json.") if left > 0 else None,
        quiet(
            "Bytes are those of weights and biases; the rest of a file is its graph, scales and names. "
            "Biases count four bytes, as in integer kernels."
        )
        if rows
        else None,
        quiet(
            "Cost: mean squared difference of the float network's outputs with this layer alone in int8, over a few "
            "samples of the split. Layers on top gain most from staying float."
        )
        if measured
        else None,
    )


def _bytes(rows: list[LayerRow]) -> tuple[str, Markup] | None:
    # Of many layers the largest, still in the order of the network.
    largest = sorted(rows, key=lambda row: -(row.float_bytes or row.bytes))[:_MOST_DRAWN]
    entries = []
    for row in (row for row in rows if row in largest):
        values = (float(row.bytes), *((float(row.float_bytes),) if row.float_bytes is not None else ()))
        note = " of ".join(f"{value:,.0f}" for value in values)
        entries.append(Entry(row.name, note, values, f"{row.name}: {note} bytes, in {row.precision} now"))
    caption = "Bytes of weights, and in float before (narrow bar)"
    if len(rows) > _MOST_DRAWN:
        caption = f"{caption}: the {_MOST_DRAWN} largest of {len(rows)} layers"
    return _picture(caption, "Bytes by layer", entries[:_MOST_DRAWN], size)


def _channels(report: Report, names: list[str]) -> tuple[str, Markup] | None:
    entries = []
    for layer in (name for name in names if name in report.channels):
        before, after = report.channels[layer]
        note = f"{after:,} of {before:,}"
        entries.append(Entry(layer, note, (float(after), float(before)), f"{layer}: {note} channels", color=2))
    return _picture("What was cut: channels left, and before (narrow bar)", "Channels by layer", entries, number)


def _costs(rows: list[LayerRow]) -> tuple[str, Markup] | None:
    ordered = sorted(rows, key=lambda row: -(row.increase or 0.0))
    entries = []
    for row in ordered:
        # Rounding may come out in a layer's favor; no bar then.
        cost = max(row.increase or 0.0, 0.0)
        note = number(row.increase, 3)
        entries.append(Entry(row.name, note, (cost,), f"{row.name}: {note} with it alone in int8", color=1))
    return _picture("What each layer costs in int8, the most sensitive first", "Sensitivity by layer", entries, number)


def _picture(caption: str, title: str, entries: list[Entry], unit: bars.Unit) -> tuple[str, Markup] | None:
    if not entries:
        return None
    if len(entries) > _MOST_DRAWN:
        caption = f"{caption}: the first {_MOST_DRAWN} of {len(entries)} layers"
    return caption, bars.amounts(title, entries[:_MOST_DRAWN], unit)
