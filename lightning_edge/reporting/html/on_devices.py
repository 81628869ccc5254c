"""The part of a report's page on devices: what was measured there, and latency and warmth of long runs over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_edge.reporting import devices
from lightning_edge.reporting.devices import DeviceRow
from lightning_edge.reporting.devices import Point as Stretch
from lightning_edge.reporting.html.markup import Markup, join, tag
from lightning_edge.reporting.html.page import pictures, points, section, table
from lightning_edge.reporting.html.parts import milliseconds, plain_axis
from lightning_edge.reporting.html.scatter import Point, Side, scatter
from lightning_edge.reporting.html.words import clipped, known

if TYPE_CHECKING:
    from lightning_edge.reporting.report import Report

_LONGEST_NAME = 80


def on_devices(report: Report) -> Markup:
    """What the files did on each device."""
    rows = report.devices
    names = devices.metric_names(rows)
    short = [clipped(name, _LONGEST_NAME) for name in names]
    shown = [row for row in rows if row.error is None or row.p50_ms is not None or row.metrics]
    apart = [row for row in shown if {*devices.apart_cells(row)} != {devices.LEFT_OUT}]
    return section(
        "On devices",
        points([join(tag("strong", "Failed: "), line) for line in devices.failures(rows)]),
        table(
            ["File", *short, *devices.HEADERS],
            [[row.label, *devices.metric_cells(row, names), *devices.cells(row)] for row in shown],
            "Calls, load and memory on the device",
            ("Verdict",),
        ),
        table(
            ["File", *devices.APART_HEADERS],
            [[row.label, *devices.apart_cells(row)] for row in apart],
            "What a sample takes beside the runtime's own time: on this machine before it, on the way, and after it",
        ),
        table(
            ["File", *devices.FIDELITY_HEADERS, *devices.change_headers(short)],
            [
                [row.label, *devices.fidelity_cells(row), *devices.change_cells(row, names)]
                for row in shown
                if row.samples is not None
            ],
            "Its values and those of its network; its metrics less those of the file here and of the float network",
        ),
        _long_runs(rows),
        points(devices.described(rows)),
    )


def _long_runs(rows: Sequence[DeviceRow]) -> Markup:
    """Latency, temperature and frequency over the time of the long runs."""
    runs = [(row.label, row.sustained.points) for row in rows if row.sustained is not None]
    return pictures(
        _over_time(runs, "Median latency of a sample, one call after another", "ms", lambda point: point.p50_ms),
        _over_time(runs, "The hottest temperature", "°C", lambda point: point.state.temperature_c),
        _over_time(runs, "The fastest core", "MHz", lambda point: point.state.frequency_mhz),
    )


def _over_time(
    runs: Sequence[tuple[str, Sequence[Stretch]]], caption: str, unit: str, value: Callable[[Stretch], float | None]
) -> tuple[str, Markup] | None:
    """Draw one figure of each long run over its time; nothing where no run has it."""
    lines = []
    for color, (label, stretches) in enumerate(runs):
        found = [(stretch.at_s, y) for stretch in stretches if known(y := value(stretch))]
        titles = [f"{label}, {at_s:.0f} s: {y:.4g} {unit}" for at_s, y in found]
        line = [Point(*place, "", title, color, pale=True) for place, title in zip(found, titles, strict=True)]
        if line:  # the last one has the name
            lines.append([*line[:-1], replace(line[-1], label=label, pale=False)])
    if not lines:
        return None
    # Points with a name come first: they need the room.
    marks = [line[-1] for line in lines]
    ways = []
    for number, line in enumerate(lines):
        ways.append([*range(len(marks), len(marks) + len(line) - 1), number])
        marks += line[:-1]
    write, amounts = (milliseconds, True) if unit == "ms" else (plain_axis, False)
    seconds = Side("seconds", plain_axis, zero=True, even=True)
    return caption, scatter(marks, seconds, Side(unit, write, zero=amounts, even=True), ways)
