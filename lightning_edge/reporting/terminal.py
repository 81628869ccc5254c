"""How a report looks in a terminal: one table where it is wide enough, else as many as it takes. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from lightning_edge.reporting import devices
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
_BUDGET_STYLES = {"within": "green", "exceeded": "red", "not measurable": "yellow"}


@dataclass(frozen=True)
class _Line:
    """One line of a table: what it is of, its cells, and how it is drawn."""

    label: str
    cells: Sequence[str]
    style: str | None


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

        report, width = self._report, options.max_width
        columns = _columns(report)
        lines = [_Line(_short_label(row), [cell(row) for _, cell in columns], _style(row)) for row in report.rows]
        yield from _tables(report.model, [header for header, _ in columns], lines, width)
        if report.devices:
            yield from _device_tables(report, width)
            yield Text("\n".join(devices.described(report.devices)), style="dim")
        for row in report.rows:
            if row.error is not None:
                yield Text(f"{row.label} FAILED: {row.error}", style="red")
            elif row.not_run is not None:
                yield Text(f"{row.label} NOT RUN here: {row.not_run}", style="yellow")
            elif row.verdict in _STYLES:
                yield Text(f"{row.label} {row.judgement}", style=_STYLES[row.verdict])
        for row in report.rows:
            if row.budget is not None:
                yield Text(f"{row.label}, budget: {row.budget}", style=_BUDGET_STYLES[row.budget.status])
        for line in devices.failures(report.devices):
            yield Text(f"FAILED on {line}", style="red")
        notes = [f"* {REFERENCE_FOOTNOTE}"] if any(row.is_reference for row in report.rows) else []
        yield Text("\n".join([*notes, *report.float_networks(), *report.settings()]), style="dim")


def _device_tables(report: Report, width: int) -> Iterator[RenderableType]:
    """What was found on devices; changes of the first metric only, the others are in report.md."""
    names = devices.metric_names(report.devices)
    first = [name for name in report.metric_names() if name in names][:1]
    changes = [header.replace(" to ", "\nto ") for header in devices.change_headers(first)]
    headers = [*devices.HEADERS, *devices.APART_HEADERS, *devices.FIDELITY_HEADERS[:1]]
    lines = [
        _Line(
            row.label,
            [
                *devices.metric_cells(row, names),
                *devices.change_cells(row, first),
                *devices.cells(row),
                *devices.apart_cells(row),
                *devices.fidelity_cells(row)[:1],
            ],
            row.error and "red",
        )
        for row in report.devices
    ]
    broken = ["\n".join(header.rsplit(" ", 1)) for header in headers]
    yield from _tables("On devices", [*names, *changes, *broken], lines, width)


def _tables(title: str, headers: Sequence[str], lines: Sequence[_Line], width: int) -> Iterator[RenderableType]:
    """Draw lines in as few tables as fit the width, without the columns that say nothing."""
    from rich.text import Text

    kept = [place for place in range(len(headers)) if any(line.cells[place] != LEFT_OUT for line in lines)]
    for part in _packed(kept, headers, lines, width):
        yield _table(title if part[:1] == kept[:1] else None, part, headers, lines)
        yield Text()


def _packed(places: Sequence[int], headers: Sequence[str], lines: Sequence[_Line], width: int) -> list[list[int]]:
    """Share columns out over as few tables as fit the width, in their order."""
    label = max((len(part) for line in lines for part in line.label.splitlines()), default=0) + _GAP
    parts: list[list[int]] = []
    left = 0
    for place in places:
        words = [*headers[place].splitlines(), *(line.cells[place] for line in lines)]
        needed = max(map(len, words)) + 2 * _GAP
        if not parts or needed > left:
            parts.append([])
            left = width - label
        parts[-1].append(place)
        left -= needed
    return parts


def _table(title: str | None, places: Sequence[int], headers: Sequence[str], lines: Sequence[_Line]) -> RenderableType:
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
    for place in places:
        table.add_column(Text(headers[place]), justify="right", no_wrap=True)
    for line in lines:
        table.add_row(Text(line.label), *(Text(line.cells[place]) for place in places), style=line.style)
    return table


def _columns(report: Report) -> list[tuple[str, Callable[[Row], str]]]:
    """What a user decides by comes first; what is left out is in report.md."""
    return [
        ("Verdict", verdict_cell),
        *((name, metric_cell(name)) for name in report.metric_names()),
        ("Size\nbytes", lambda row: byte_cell(row.size_bytes)),
        ("p50\nms", lambda row: speed_cell(row, row.p50_ms, 3)),
        ("In\nbudget", budget_cell),
        ("Zipped\nbytes", lambda row: byte_cell(row.compressed_bytes)),
        ("p95\nms", lambda row: speed_cell(row, row.p95_ms, 3)),
        ("p99\nms", lambda row: speed_cell(row, row.p99_ms, 3)),
        ("Samples\nper s", lambda row: speed_cell(row, row.throughput, 0)),
        ("Load\nms", lambda row: speed_cell(row, row.load_ms, 1)),
        ("Peak\nbytes", lambda row: byte_cell(row.peak_memory_bytes)),
        ("Same\nclass", lambda row: percent_cell(row.top1)),
        ("Mean\nsteps", lambda row: number_cell(row.mean_steps, 3)),
        ("Off the\ndelegate", lambda row: percent_cell(row.fallback_share)),
    ]


def budget_cell(row: Row) -> str:
    """Whether a row keeps its budget, in a word."""
    return LEFT_OUT if row.budget is None else {True: "yes", False: "no", None: "?"}[row.within_budget]


def _style(row: Row) -> str | None:
    return "red" if row.error else _STYLES.get(row.verdict or "")


def _short_label(row: Row) -> str:
    """Files have one source for all, so that only the networks in torch are told apart by it."""
    if row.target != "torch":
        return f"{row.target} {row.precision}"
    # Two lines, so that 80 columns hold more numbers.
    return "torch fp32" if row.source == "float" else f"torch int8,\n{row.when_quantized}"
