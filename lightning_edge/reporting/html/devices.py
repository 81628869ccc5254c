"""What was found of the files on devices: how fast they are there, and whether they compute the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_edge.reporting.devices import (
    FIDELITY_HEADERS,
    HEADERS,
    cells,
    described,
    failures,
    fidelity_cells,
    metric_cells,
    metric_names,
)
from lightning_edge.reporting.html import bars
from lightning_edge.reporting.html.bars import Entry
from lightning_edge.reporting.html.markup import Markup
from lightning_edge.reporting.html.page import pictures, points, quiet, section, state, table
from lightning_edge.reporting.html.words import clipped, known, number

if TYPE_CHECKING:
    from lightning_edge.reporting.report import Report

_LONGEST_NAME = 32


def devices(report: Report) -> Markup:
    """Show every file on every device that it was run on."""
    rows = list(report.devices)
    if not rows:
        return Markup()
    colors = {device: place for place, device in enumerate(dict.fromkeys(row.device for row in rows))}
    entries = []
    for row in rows:
        values = tuple(value for value in (row.p50_ms, row.p95_ms, row.p99_ms) if known(value))
        if values and row.error is None:
            note = f"{' · '.join(number(value, 3) for value in values)} ms"
            entries.append(
                Entry(row.label, note, values, f"{row.label}: {note}", colors[row.device], row.precision == "int8")
            )
    whole = [entry for entry in entries if len(entry.values) == 3]
    metrics = metric_names(rows)
    headers = ["File", "State", *(clipped(name, _LONGEST_NAME) for name in metrics), *HEADERS, *FIDELITY_HEADERS]
    lines = [
        [
            row.label,
            state("bad", "failed", row.error) if row.error is not None else state("good", "measured"),
            *metric_cells(row, metrics),
            *cells(row),
            *fidelity_cells(row),
        ]
        for row in rows
    ]
    return section(
        "On devices",
        points(failures(rows)),
        pictures(
            ("Latency there: p50 (mark), p95 and p99 (bars)", bars.ranges("Latency on devices", whole, _milliseconds))
        )
        if whole
        else None,
        table(headers, lines, "Files on devices", ("State", "Verdict")),
        points(described(rows)),
        quiet("Latency is measured on the device itself; °C and MHz are before and after."),
    )


def _milliseconds(value: float) -> str:
    return f"{number(value, 3)} ms"
