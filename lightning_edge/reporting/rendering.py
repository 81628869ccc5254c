"""How a report looks as Markdown, and the cells of its tables. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_edge.reporting import devices

if TYPE_CHECKING:
    from lightning_edge.reporting.report import Report, Row

LEFT_OUT = "-"
_NOT_RUN = "not run"
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
REFERENCE_FOOTNOTE = (
    "int8 simulated in torch, or a file run by a reference interpreter or reference kernels: its latency says nothing "
    "about the target"
)


def markdown(report: Report) -> str:
    """Write as Markdown: what it costs and how well it does, how true it is to its network, how it was measured."""
    names = report.metric_names()
    lines = [f"# {report.model}", ""]
    lines += _markdown_table(
        ["Candidate", "Verdict", *names, *_COST_HEADERS],
        [[row.label, verdict_cell(row), *_metric_cells(row, names), *_cost_cells(row)] for row in report.rows],
    )
    if any(row.is_reference for row in report.rows):
        lines += ["", f"\\* {REFERENCE_FOOTNOTE}"]
    if networks := report.float_networks():
        lines += ["", " ".join(networks)]
    files = [row for row in report.rows if row.target != "torch"]
    if files:
        lines += ["", "## Agreement with the network it came from, and contents of the file", ""]
        lines += _markdown_table(
            ["File", *_FIDELITY_HEADERS, "Float operations", "Runs on"],
            [[row.label, *_fidelity_cells(row), _listed(row.float_ops), row.runtime or LEFT_OUT] for row in files],
        )
    placed = [row for row in files if row.placements is not None]
    if placed:
        lines += ["", "## Where its operations run", ""]
        lines += _markdown_table(["File", *_PLACE_HEADERS], [[row.label, *_place_cells(row)] for row in placed])
    lines += _device_section(report)
    for title, entries in (
        ("Verdicts", [f"{row.label} {row.judgement}" for row in files if row.judgement is not None]),
        ("Budget", [f"{row.label}: {row.budget}" for row in files if row.budget is not None]),
        ("Not run here", [f"{row.label}: {row.not_run}" for row in files if row.not_run is not None]),
        ("Failed", [f"{row.label}: {row.error}" for row in report.failures]),
        ("Warnings", report.warnings),
        ("Notes", report.notes),
        ("Phases", phases_in_words(report.phases)),
        ("How it was measured", [*report.settings(), *(f"{name} {text}" for name, text in report.versions.items())]),
    ):
        if entries:
            lines += ["", f"## {title}", "", *(f"- {' '.join(entry.split())}" for entry in entries)]
    return "\n".join(lines) + "\n"


def _device_section(report: Report) -> list[str]:
    """What was found on devices, as Markdown."""
    rows = report.devices
    if not rows:
        return []
    names = devices.metric_names(rows)
    headers = ["Device and file", *devices.APART_HEADERS, *devices.FIDELITY_HEADERS, *devices.change_headers(names)]
    return [
        "",
        "## On devices",
        "",
        *_markdown_table(
            ["Device and file", *names, *devices.HEADERS],
            [[row.label, *devices.metric_cells(row, names), *devices.cells(row)] for row in rows],
        ),
        "",
        *_markdown_table(
            headers,
            [
                [
                    row.label,
                    *devices.apart_cells(row),
                    *devices.fidelity_cells(row),
                    *devices.change_cells(row, names),
                ]
                for row in rows
            ],
        ),
        "",
        *(f"- {line}" for line in devices.described(rows)),
        *(f"- Failed: {' '.join(line.split())}" for line in devices.failures(rows)),
    ]


def phases_in_words(phases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say what was asked of a training, a line for each phase; settings that were left out are not in it."""
    return [
        f"{name}: {', '.join(f'{key}={value!r}' for key, value in settings.items() if value is not None)}"
        for name, settings in phases.items()
    ]


def verdict_cell(row: Row) -> str:
    """The verdict in a word: what a file is worth, or that there is none."""
    if row.error is not None:
        return "no file"
    return _NOT_RUN if row.not_run is not None else row.verdict or LEFT_OUT


def _metric_cells(row: Row, names: Sequence[str]) -> list[str]:
    if row.not_run is not None:
        return [_NOT_RUN] * len(names)
    return [number_cell(row.metrics.get(name), 4) for name in names]


def _cost_cells(row: Row) -> list[str]:
    return [*_size_cells(row), *_speed_cells(row, reference="-\\*")]


def _size_cells(row: Row) -> list[str]:
    return [byte_cell(row.size_bytes), byte_cell(row.compressed_bytes)]


def _place_cells(row: Row) -> list[str]:
    placements = row.placements
    assert placements is not None, row.label
    inside = [f"{entry.count} x {entry.op}" for entry in placements.ops if entry.place not in ("cpu", "cpu or gpu")]
    outside = [
        f"{entry.count} x {entry.op}" + (f" ({entry.macs:,} MACs)" if entry.macs else "")
        for entry in placements.ops
        if entry.place in ("cpu", "cpu or gpu")
    ]
    return [
        f"{placements.macs:,}",
        percent_cell(row.fallback_share),
        _listed(inside),
        _listed(outside),
        placements.told_by,
    ]


def _speed_cells(row: Row, reference: str = "-*") -> list[str]:
    if row.not_run is not None:
        return [*[_NOT_RUN] * (len(_SPEED_HEADERS) - 1), byte_cell(row.planned_memory_bytes)]
    return [
        reference if row.is_reference else number_cell(row.p50_ms, 3),
        number_cell(row.p95_ms, 3),
        number_cell(row.p99_ms, 3),
        number_cell(row.throughput, 1),
        number_cell(row.load_ms, 1),
        byte_cell(row.peak_memory_bytes),
        byte_cell(row.planned_memory_bytes),
    ]


def _fidelity_cells(row: Row) -> list[str]:
    agreement = [
        percent_cell(row.top1),
        number_cell(row.max_steps, 2),
        number_cell(row.most_steps, 2),
        number_cell(row.mean_steps, 4),
        LEFT_OUT if row.max_relative is None else f"{row.max_relative:.1e}",
    ]
    return [
        *(agreement if row.not_run is None else [_NOT_RUN] * len(agreement)),
        percent_cell(row.int8_weight_share),
        LEFT_OUT if row.delegated_ops is None else str(row.delegated_ops),
        _listed(row.undelegated_ops),
    ]


def metric_cell(name: str) -> Callable[[Row], str]:
    """Give what shows one metric of a row."""
    return lambda row: _metric_cells(row, [name])[0]


def speed_cell(row: Row, value: float | None, digits: int) -> str:
    """Show a time or a rate; of a reference interpreter that it is none."""
    if row.not_run is not None:
        return _NOT_RUN
    return f"{LEFT_OUT}*" if row.is_reference and value is None else number_cell(value, digits)


def number_cell(value: float | None, digits: int) -> str:
    """Show a number, or that there is none."""
    return LEFT_OUT if value is None else f"{value:.{digits}f}"


def percent_cell(value: float | None) -> str:
    """Show a share as a percentage, or that there is none."""
    return LEFT_OUT if value is None else f"{value:.2%}"


def byte_cell(value: int | None) -> str:
    """Show a number of bytes, or that there is none."""
    return LEFT_OUT if value is None else f"{value:,}"


def _listed(names: Sequence[str] | None) -> str:
    if names is None:
        return LEFT_OUT
    return ", ".join(dict.fromkeys(names)) or "none"


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
