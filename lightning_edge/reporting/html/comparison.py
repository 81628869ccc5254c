"""The page of several reports side by side: what each would ship, and where their files differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_edge.reporting.html.choice import (
    choose_file,
    files_of,
    is_compressed,
    metric_of,
    names_of,
    state_of,
    timed,
    verdict_of,
)
from lightning_edge.reporting.html.markup import Markup, join, tag
from lightning_edge.reporting.html.page import page, pictures, points, quiet, section, table, without
from lightning_edge.reporting.html.parts import milliseconds, plain_axis, state_cell, verdict_cell
from lightning_edge.reporting.html.scatter import Point, Side, scatter
from lightning_edge.reporting.html.words import ABSENT, clipped, fixed, known, number, share, signed, size

if TYPE_CHECKING:
    from lightning_edge.reporting.monitor import Mode
    from lightning_edge.reporting.report import Report, Row

# As many as there are colors and shapes.
MOST = 6
_LONGEST_NAME = 40
# With more points than this, only those of compressed files are named in a picture.
_CROWDED = 14
# What has to be the same for two latencies to be compared.
_MACHINE = ("platform", "cpus")


def comparison_page(reports: Mapping[str, Report]) -> str:
    """Make the page of several reports; differences are against the first.

    Args:
        reports: Two to six reports, by name.

    Raises:
        ValueError: If there are fewer or more.
    """
    if not 2 <= len(reports) <= MOST:
        raise ValueError(f"{len(reports)} reports cannot be put side by side; give 2 to {MOST}")
    named = {clipped(name, _LONGEST_NAME): report for name, report in reports.items()}
    if len(named) < len(reports):
        named = {
            f"{number}: {clipped(name, _LONGEST_NAME)}": report
            for number, (name, report) in enumerate(reports.items(), 1)
        }
    title = f"{len(named)} reports side by side"
    metric, mode = _shared_metric(list(named.values()))
    return page(
        title,
        tag("h1", title),
        tag(
            "p",
            join(*_between(", ", [tag("strong", name) for name in named])),
            f". Differences are against {next(iter(named))}.",
            class_="lead",
        ),
        section("Look at this first", points(_unfair(named, metric))),
        _chosen(named, metric),
        _pictures(named, metric, mode),
        _files(named, metric),
        _settings(named),
    )


def _shared_metric(reports: Sequence[Report]) -> tuple[str | None, Mode | None]:
    """The deciding metric of the first report that all have."""
    for report in reports:
        metric, mode = metric_of(report)
        if metric is not None and all(metric in other.metric_names() for other in reports):
            return metric, mode
    return None, None


def _unfair(reports: Mapping[str, Report], metric: str | None) -> list[object]:
    """What makes a comparison less than fair."""
    told: list[object] = []
    different = [name for name in _MACHINE if len({report.versions.get(name) for report in reports.values()}) > 1]
    if different:
        told.append(f"Latencies are not comparable: {' and '.join(different)} of the machines differ.")
    elif len({(report.threads, report.warmup, report.repeats) for report in reports.values()}) > 1:
        told.append("Latencies were measured with different threads, warm-up calls or repeats.")
    if len({report.split for report in reports.values()}) > 1:
        told.append("Metrics are not comparable: they are of different splits.")
    samples = {max((row.samples or 0 for row in report.rows), default=0) for report in reports.values()}
    if len(samples - {0}) > 1:
        told.append("Metrics are of different numbers of samples.")
    if metric is None and any(report.metric_names() for report in reports.values()):
        told.append("There is no deciding metric that all reports have.")
    told += [f"{name}: {row.label} failed: {row.error}" for name, report in reports.items() for row in report.failures]
    return told


def _chosen(reports: Mapping[str, Report], metric: str | None) -> Markup:
    headers: list[object] = [
        "Report",
        "File",
        metric or "Metric",
        "Change",
        "Bytes",
        "Change",
        "p50 ms",
        "Change",
        "Agreement",
    ]
    first: Row | None = None
    cells: list[list[object]] = []
    for name, report in reports.items():
        choice = choose_file(report)
        if choice is None:
            cells.append([name, "no file can ship", *[ABSENT] * (len(headers) - 2)])
            continue
        first = first or choice.row
        cells.append([name, choice.row.label, *_figures(choice.row, first, metric), verdict_cell(choice.row)])
    if not _judged(reports):
        headers, cells = without(headers, cells, "Agreement")
    return section(
        "What each report would ship",
        table(headers, cells, "The smallest file that can ship and is about as good as the best", ("File",)),
    )


def _judged(reports: Mapping[str, Report]) -> bool:
    """Whether any file was judged on how true it is to its network."""
    return any(verdict_of(row)[0] for report in reports.values() for row in report.rows)


def _figures(row: Row, first: Row, metric: str | None) -> list[object]:
    """Metric, bytes and median latency of a file, each with its difference to another's."""
    value = row.metrics.get(metric) if metric is not None else None
    before = first.metrics.get(metric) if metric is not None else None
    changed = signed(value - before) if row is not first and known(value) and known(before) else ABSENT
    fast = row.p50_ms if timed(row) else None
    return [
        fixed(value, 4),
        changed,
        number(row.size_bytes),
        _change(row, first, lambda one: one.size_bytes),
        fixed(fast, 3),
        _change(row, first, lambda one: one.p50_ms if timed(one) else None),
    ]


def _change(row: Row, first: Row, of: Callable[[Row], float | None]) -> str:
    now, before = of(row), of(first)
    if row is first or not known(now) or not known(before) or before <= 0:
        return ABSENT
    return f"{now / before - 1:+.1%}"


def _pictures(reports: Mapping[str, Report], metric: str | None, mode: Mode | None) -> Markup:
    small = Side("bytes on disk", size, zero=True, better="min")
    fast = Side("p50 latency", milliseconds, zero=True, better="min")
    if metric is None:
        shown = [("Latency against size", _scatter(reports, _bytes, _fast, small, fast))]
    else:
        good = Side(metric, plain_axis, better=mode)

        def score(row: Row) -> float | None:
            return None if row.not_run else row.metrics.get(metric)

        shown = [
            (f"{metric} against size", _scatter(reports, _bytes, score, small, good)),
            (f"{metric} against latency", _scatter(reports, _fast, score, fast, good)),
        ]
    drawn = [(words, picture) for words, picture in shown if picture]
    return section(
        "All files",
        pictures(*drawn),
        quiet("Each report has its own color and shape. Filled marks are int8 or compressed files, hollow ones float.")
        if drawn
        else None,
    )


def _bytes(row: Row) -> float | None:
    return row.size_bytes


def _fast(row: Row) -> float | None:
    return row.p50_ms if timed(row) else None


def _scatter(
    reports: Mapping[str, Report],
    across: Callable[[Row], float | None],
    up: Callable[[Row], float | None],
    x: Side,
    y: Side,
) -> Markup:
    marks = []
    for color, (name, report) in enumerate(reports.items()):
        rows = [row for row in files_of(report) if row.error is None]
        for row, file in zip(rows, names_of(rows), strict=True):
            right, height = across(row), up(row)
            if known(right) and known(height):
                words = f"{name}, {row.label}: {x.write(right)}, {y.write(height)}"
                marks.append(Point(right, height, f"{clipped(name, 12)} {file}", words, color, is_compressed(row)))
    marks.sort(key=lambda point: not point.full)
    if len(marks) > _CROWDED:
        marks = [
            point if point.full else Point(point.x, point.y, "", point.title, point.color, False) for point in marks
        ]
    return scatter(marks, x, y) if marks else Markup()


def _files(reports: Mapping[str, Report], metric: str | None) -> Markup:
    """Every file that one of the reports has, with that of the other reports below it."""
    found: dict[tuple[str, str], list[tuple[str, Row]]] = {}
    for name, report in reports.items():
        for row in report.rows:
            found.setdefault((row.label, row.scheme or ""), []).append((name, row))
    cells: list[list[object]] = []
    for (label, scheme), entries in found.items():
        first = next((row for _, row in entries if row.error is None), entries[0][1])
        for name, row in entries:
            state = state_cell(reports[name], row) if row.target != "torch" else "in torch"
            cells.append(
                [
                    f"{label} {scheme}".strip(),
                    name,
                    state,
                    *_figures(row, first, metric),
                    share(row.top1),
                    verdict_cell(row),
                ]
            )
    headers: list[object] = [
        "File",
        "Report",
        "State",
        metric or "Metric",
        "Change",
        "Bytes",
        "Change",
        "p50 ms",
        "Change",
    ]
    headers += ["Same top class", "Agreement"]
    if not _judged(reports):
        headers, cells = without(headers, cells, "Agreement")
    return section("File by file", table(headers, cells, "Every candidate", ("Report", "State")))


def _settings(reports: Mapping[str, Report]) -> Markup:
    """Whatever differs in how the reports were made."""
    settings: list[dict[str, object]] = []
    for report in reports.values():
        best = metric_of(report)[0]
        settings.append(
            {
                "network": report.model,
                "parameters of the float network": report.parameters,
                "split": report.split,
                "deciding metric": best,
                "warm-up calls": report.warmup,
                "timed calls": report.repeats,
                "threads": report.threads,
                "calibration batches": report.calibration_batches,
                "seed": report.seed,
                "files that can ship": sum(state_of(report, row) == "ready" for row in files_of(report)),
                **{f"{name} (version)": version for name, version in report.versions.items()},
            }
        )
    names = list(dict.fromkeys(name for given in settings for name in given))
    cells = [
        [name, *(ABSENT if given.get(name) is None else str(given[name]) for given in settings)]
        for name in names
        if len({str(given.get(name)) for given in settings}) > 1
    ]
    if not cells:
        return section("How they were made", quiet("Settings and versions are the same."))
    return section(
        "What differs in how they were made",
        table(["", *reports], cells, "Settings and versions that differ", tuple(reports)),
    )


def _between(words: str, parts: Sequence[Markup]) -> list[str]:
    return [entry for part in parts for entry in (words, part)][1:]
