"""How a report looks, as Markdown and in a terminal. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_edge.reporting import devices

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from lightning_edge.reporting.report import Report, Row

_LEFT_OUT = "-"
_NOT_RUN = "not run"
# A terminal is narrow: the other metrics are in report.md.
_METRICS_IN_TERMINAL = 2
_DEVICE_METRICS_IN_TERMINAL = 1
_FIDELITY_IN_TERMINAL = 4
_SPEED_IN_TERMINAL = 6
_SPEED_HEADERS = ("p50 ms", "p95 ms", "p99 ms", "Samples/s", "Load ms", "Peak", "Planned")
_SIZE_HEADERS = ("Size", "Zipped")
_COST_HEADERS = (*_SIZE_HEADERS, *_SPEED_HEADERS)
_PLACE_HEADERS = ("MACs", "Off the delegate", "Operations in it", "Operations off it", "As told by")
_FIDELITY_HEADERS = (
    "Same top class",
    "Max steps",
    "99.9 %",
    "Mean steps",
    "Max relative",
    "int8 weights",
    "Delegated",
    "Not delegated",
)
_REFERENCE_FOOTNOTE = (
    "int8 simulated in torch, or a file run by a reference interpreter: its latency says nothing about the target"
)


def markdown(report: Report) -> str:
    """Write as Markdown: what it costs and how well it does, how true it is to its network, how it was measured."""
    names = report.metric_names()
    lines = [f"# {report.model} on the device", ""]
    lines += _markdown_table(
        ["Candidate", *names, *_COST_HEADERS],
        [[row.label, *_metric_cells(row, names), *_cost_cells(row)] for row in report.rows],
    )
    if any(row.is_reference for row in report.rows):
        lines += ["", f"\\* {_REFERENCE_FOOTNOTE}"]
    files = [row for row in report.rows if row.target != "torch"]
    if files:
        lines += ["", "## Agreement with the network it came from, and contents of the file", ""]
        lines += _markdown_table(
            ["File", *_FIDELITY_HEADERS, "Float operations", "Runs on"],
            [[row.label, *_fidelity_cells(row), _listed(row.float_ops), row.runtime or _LEFT_OUT] for row in files],
        )
    placed = [row for row in files if row.placements is not None]
    if placed:
        lines += ["", "## Where its operations run", ""]
        lines += _markdown_table(["File", *_PLACE_HEADERS], [[row.label, *_place_cells(row)] for row in placed])
    lines += _device_section(report)
    for title, entries in (
        ("Budget", [f"{row.label}: {row.budget}" for row in files if row.budget is not None]),
        ("Not run here", [f"{row.label}: {row.not_run}" for row in files if row.not_run is not None]),
        ("Failed", [f"{row.label}: {row.error}" for row in report.failures]),
        ("Warnings", report.warnings),
        ("Notes", report.notes),
        ("How it was measured", [*report.settings(), *(f"{name} {text}" for name, text in report.versions.items())]),
    ):
        if entries:
            lines += ["", f"## {title}", "", *(f"- {' '.join(entry.split())}" for entry in entries)]
    return "\n".join(lines) + "\n"


def terminal_table(report: Report) -> Group:
    """Draw as tables of the `rich` package that fit a narrow terminal: how well and how large, then how fast."""
    from rich.console import Group
    from rich.text import Text

    names = report.metric_names()[:_METRICS_IN_TERMINAL]
    notes = [f"* {_REFERENCE_FOOTNOTE}"] if any(row.is_reference for row in report.rows) else []
    notes += report.settings()
    waiting = [row for row in report.rows if row.not_run is not None]
    failures = [Text(f"{row.label} NOT RUN here: {row.not_run}", style="yellow") for row in waiting]
    failures += [Text(f"{row.label} FAILED: {row.error}", style="red") for row in report.failures]
    files = [row for row in report.rows if row.target != "torch"]
    budget = ["In budget"] if any(row.budget is not None for row in files) else []
    sizes = [*names, *_SIZE_HEADERS, *budget]
    return Group(
        _terminal_part(
            f"{report.model} on the device",
            sizes,
            [
                (row, [*_metric_cells(row, names), *_size_cells(row), _in_budget(row)][: len(sizes)])
                for row in report.rows
            ],
        ),
        _terminal_part(
            "Speed and peak memory",
            _SPEED_HEADERS[:_SPEED_IN_TERMINAL],
            [(row, _speed_cells(row)[:_SPEED_IN_TERMINAL]) for row in report.rows],
        ),
        _terminal_part(
            "Agreement with the network it came from",
            [*_FIDELITY_HEADERS[:_FIDELITY_IN_TERMINAL], "int8 weights", "Off the delegate"],
            [
                (row, [*_fidelity_cells(row)[:_FIDELITY_IN_TERMINAL], _percent(row.int8_weight_share), _fallback(row)])
                for row in files
            ],
        ),
        *_device_part(report),
        *failures,
        Text("\n".join(notes), style="dim"),
    )


def _device_section(report: Report) -> list[str]:
    """What was found on devices, as Markdown."""
    rows = report.devices
    if not rows:
        return []
    names = devices.metric_names(rows)
    return [
        "",
        "## On devices",
        "",
        *_markdown_table(
            ["Device and file", *names, *devices.HEADERS, *devices.FIDELITY_HEADERS],
            [
                [row.label, *devices.metric_cells(row, names), *devices.cells(row), *devices.fidelity_cells(row)]
                for row in rows
            ],
        ),
        "",
        *(f"- {line}" for line in devices.described(rows)),
        *(f"- Failed: {' '.join(line.split())}" for line in devices.failures(rows)),
    ]


def _device_part(report: Report) -> list[RenderableType]:
    """What was found on devices, for a terminal."""
    from rich.text import Text

    rows = report.devices
    if not rows:
        return []
    names = devices.metric_names(rows)[:_DEVICE_METRICS_IN_TERMINAL]
    headers = devices.HEADERS[:_SPEED_IN_TERMINAL]
    table = _table("On devices", ["Samples", *names, *headers])
    for row in rows:
        samples = devices.fidelity_cells(row)[0]
        cells = [samples, *devices.metric_cells(row, names), *devices.cells(row)[: len(headers)]]
        table.add_row(row.label, *cells, style="red" if row.error else None)
    return [
        table,
        *(Text(line, style="dim") for line in devices.described(rows)),
        *(Text(f"FAILED on {line}", style="red") for line in devices.failures(rows)),
    ]


def _terminal_part(title: str, headers: Sequence[str], lines: Sequence[tuple[Row, list[str]]]) -> Table:
    table = _table(title, headers)
    for row, cells in lines:
        table.add_row(_short_label(row), *cells, style="red" if row.error else None)
    return table


def _table(title: str, headers: Sequence[str]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(
        title=title, box=SIMPLE, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", overflow="fold")
    return table


def _short_label(row: Row) -> str:
    """Files have one source for all, so that only the networks in torch are told apart by it."""
    return row.label if row.target == "torch" else f"{row.target} {row.precision}"


def _metric_cells(row: Row, names: Sequence[str]) -> list[str]:
    if row.not_run is not None:
        return [_NOT_RUN] * len(names)
    return [_number(row.metrics.get(name), 4) for name in names]


def _cost_cells(row: Row) -> list[str]:
    return [*_size_cells(row), *_speed_cells(row, reference="-\\*")]


def _size_cells(row: Row) -> list[str]:
    return [_bytes(row.size_bytes), _bytes(row.compressed_bytes)]


def _in_budget(row: Row) -> str:
    return _LEFT_OUT if row.budget is None else {True: "yes", False: "no", None: "?"}[row.within_budget]


def _fallback(row: Row) -> str:
    return _percent(row.fallback_share)


def _place_cells(row: Row) -> list[str]:
    placements = row.placements
    assert placements is not None, row.label
    inside = [f"{entry.count} x {entry.op}" for entry in placements.ops if entry.place not in ("cpu", "cpu or gpu")]
    outside = [
        f"{entry.count} x {entry.op}" + (f" ({entry.macs:,} MACs)" if entry.macs else "")
        for entry in placements.ops
        if entry.place in ("cpu", "cpu or gpu")
    ]
    return [f"{placements.macs:,}", _fallback(row), _listed(inside), _listed(outside), placements.told_by]


def _speed_cells(row: Row, reference: str = "-*") -> list[str]:
    if row.not_run is not None:
        return [*[_NOT_RUN] * (len(_SPEED_HEADERS) - 1), _bytes(row.planned_memory_bytes)]
    return [
        reference if row.is_reference else _number(row.p50_ms, 3),
        _number(row.p95_ms, 3),
        _number(row.p99_ms, 3),
        _number(row.throughput, 1),
        _number(row.load_ms, 1),
        _bytes(row.peak_memory_bytes),
        _bytes(row.planned_memory_bytes),
    ]


def _fidelity_cells(row: Row) -> list[str]:
    agreement = [
        _percent(row.top1),
        _number(row.max_steps, 2),
        _number(row.most_steps, 2),
        _number(row.mean_steps, 4),
        _LEFT_OUT if row.max_relative is None else f"{row.max_relative:.1e}",
    ]
    return [
        *(agreement if row.not_run is None else [_NOT_RUN] * len(agreement)),
        _percent(row.int8_weight_share),
        _LEFT_OUT if row.delegated_ops is None else str(row.delegated_ops),
        _listed(row.undelegated_ops),
    ]


def _number(value: float | None, digits: int) -> str:
    return _LEFT_OUT if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return _LEFT_OUT if value is None else f"{value:.2%}"


def _bytes(value: int | None) -> str:
    return _LEFT_OUT if value is None else f"{value:,}"


def _listed(names: Sequence[str] | None) -> str:
    if names is None:
        return _LEFT_OUT
    return ", ".join(dict.fromkeys(names)) or "none"


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
