"""What pruning left of each layer: channels before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_edge.reporting.html import bars
from lightning_edge.reporting.html.bars import Entry
from lightning_edge.reporting.html.markup import Markup
from lightning_edge.reporting.html.page import pictures, quiet, section, table
from lightning_edge.reporting.html.words import number, share

if TYPE_CHECKING:
    from lightning_edge.reporting.report import Report

# A picture of more layers is longer than anybody looks at; the table has more.
_MOST_DRAWN = 24
_MOST_LISTED = 150


def channels(report: Report) -> Markup:
    """Show the channels of the layers that were cut, in the order of the network."""
    entries, cells = [], []
    for layer, (before, after) in report.channels.items():
        note = f"{after:,} of {before:,}"
        entries.append(Entry(layer, note, (float(after), float(before)), f"{layer}: {note} channels"))
        cells.append([layer, number(before), number(after), share(after / before if before else 0.0)])
    if not entries:
        return Markup()
    caption = "Channels that are left, and before (narrow bar)"
    if len(entries) > _MOST_DRAWN:
        caption = f"{caption}: the first {_MOST_DRAWN} of {len(entries)} layers"
    left = len(cells) - _MOST_LISTED
    return section(
        "What was cut",
        pictures((caption, bars.amounts("Channels by layer", entries[:_MOST_DRAWN], number))),
        table(["Layer", "Before", "Now", "Left"], cells[:_MOST_LISTED], "Channels that each cut layer makes"),
        quiet(f"{left:,} more layers are in report.json.") if left > 0 else None,
    )
