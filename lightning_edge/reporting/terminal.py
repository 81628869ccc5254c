"""How a report looks in a terminal: one table where it is wide enough, else as many as it takes. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from lightning_edge.reporting.rendering import (
    LEFT_OUT,
    REFERENCE_FOOTNOTE,
    byte_cell,
    metric_cell,
    number_cell,
    percent_cell,
    speed_cell,
    verdict_cell,
)

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from lightning_edge.reporting.report import Report, Row

# Blanks between two columns.
_GAP = 1
_STYLES = {"differs": "yellow", "broken": "red"}


@dataclass(frozen=True)
class _Column:
    """A column: its header, the unit below it, and what it holds of a row."""

    header: str
    unit: str
    cell: Callable[[Row], str]

    def width(self, rows: Sequence[Row]) -> int:
        return max(len(self.header), len(self.unit), *(len(self.cell(row)) for row in rows))


@final
class ReportTable:
    """A report for the `rich` package: tables as wide as the terminal, then what failed and how it was measured.

    Args:
        report: The report.
    """

    def __init__(self, report: Report) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Draw it in the width there is."""
        from rich.text import Text

        report = self._report
        columns = [column for column in _columns(report) if any(column.cell(row) != LEFT_OUT for row in report.rows)]
        for index, part in enumerate(_packed(columns, report.rows, options.max_width)):
            yield self._part(part, report.model if index == 0 else None)
            yield Text()
        for row in report.rows:
            if row.error is not None:
                yield Text(f"{row.label} FAILED: {row.error}", style="red")
            elif row.not_run is not None:
                yield Text(f"{row.label} NOT RUN here: {row.not_run}", style="yellow")
            elif row.verdict in _STYLES:
                yield Text(f"{row.label} {row.judgement}", style=_STYLES[row.verdict])
        notes = [f"* {REFERENCE_FOOTNOTE}"] if any(row.is_reference for row in report.rows) else []
        yield Text("\n".join([*notes, *report.settings()]), style="dim")

    def _part(self, columns: Sequence[_Column], title: str | None) -> RenderableType:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=None if title is None else Text(title),
            box=SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
            pad_edge=False,
            padding=(0, _GAP, 0, 0),
            show_edge=False,
        )
        table.add_column("", no_wrap=True)
        for column in columns:
            header = Text(f"{column.header}\n{column.unit}" if column.unit else column.header)
            table.add_column(header, justify="right", no_wrap=True)
        for row in self._report.rows:
            style = "red" if row.error else _STYLES.get(row.verdict or "")
            table.add_row(Text(_short_label(row)), *(Text(column.cell(row)) for column in columns), style=style)
        return table


def _packed(columns: Sequence[_Column], rows: Sequence[Row], width: int) -> list[list[_Column]]:
    """Share the columns out over as few tables as fit the width, in their order."""
    label = max((len(_short_label(row)) for row in rows), default=0) + _GAP
    parts: list[list[_Column]] = []
    left = 0
    for column in columns:
        needed = column.width(rows) + 2 * _GAP
        if not parts or needed > left:
            parts.append([])
            left = width - label
        parts[-1].append(column)
        left -= needed
    return parts


def _columns(report: Report) -> list[_Column]:
    """What a user decides by comes first; what is left out is in report.md."""
    return [
        _Column("Verdict", "", verdict_cell),
        *(_Column(name, "", metric_cell(name)) for name in report.metric_names()),
        _Column("Size", "bytes", lambda row: byte_cell(row.size_bytes)),
        _Column("p50", "ms", lambda row: speed_cell(row, row.p50_ms, 3)),
        _Column("In", "budget", budget_cell),
        _Column("Zipped", "bytes", lambda row: byte_cell(row.compressed_bytes)),
        _Column("p95", "ms", lambda row: speed_cell(row, row.p95_ms, 3)),
        _Column("p99", "ms", lambda row: speed_cell(row, row.p99_ms, 3)),
        _Column("Samples", "per s", lambda row: speed_cell(row, row.throughput, 0)),
        _Column("Load", "ms", lambda row: speed_cell(row, row.load_ms, 1)),
        _Column("Peak", "bytes", lambda row: byte_cell(row.peak_memory_bytes)),
        _Column("Same", "class", lambda row: percent_cell(row.top1)),
        _Column("Mean", "steps", lambda row: number_cell(row.mean_steps, 3)),
        _Column("Off the", "delegate", lambda row: percent_cell(row.fallback_share)),
    ]


def budget_cell(row: Row) -> str:
    """Whether a row keeps its budget, in a word."""
    return LEFT_OUT if row.budget is None else {True: "yes", False: "no", None: "?"}[row.within_budget]


def _short_label(row: Row) -> str:
    """Files have one source for all, so that only the networks in torch are told apart by it."""
    if row.target != "torch":
        return f"{row.target} {row.precision}"
    return {"float": "torch fp32", "post-training": "torch int8 (PTQ)", "trained": "torch int8 (QAT)"}[row.source]
