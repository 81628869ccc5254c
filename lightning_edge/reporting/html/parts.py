"""The sections of a report's page: pictures of the files, each with its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_edge.reporting.html import bars
from lightning_edge.reporting.html.bars import Entry
from lightning_edge.reporting.html.choice import (
    KINDS,
    baseline_of,
    files_of,
    is_compressed,
    metric_of,
    names_of,
    state_of,
    timed,
    verdict_of,
)
from lightning_edge.reporting.html.markup import Markup, join
from lightning_edge.reporting.html.page import pictures, points, quiet, section, state, table, without
from lightning_edge.reporting.html.scatter import Point, Side, scatter
from lightning_edge.reporting.html.words import ABSENT, clipped, fixed, known, number, share, size, times

if TYPE_CHECKING:
    from lightning_edge.contents import Place
    from lightning_edge.reporting.report import Report, Row

# With more points than this, labels of all of them would cover each other.
_CROWDED = 6
_LONGEST_HEADER = 32
# So many quantiles tell the quarters of a distribution.
_QUARTERS = 5
_VERDICTS = {"exact": "good", "close": "near", "differs": "warn", "broken": "bad"}
_PLACES: tuple[Place, ...] = ("delegate", "neural engine", "gpu", "any unit", "cpu or gpu", "cpu")
_UNDECIDED: tuple[Place, ...] = ("any unit", "cpu or gpu")
_PLACE_NAMES: dict[Place, str] = {
    "delegate": "delegate",
    "neural engine": "neural engine",
    "gpu": "GPU",
    "any unit": "any unit, the device decides",
    "cpu or gpu": "CPU or GPU, the device decides",
    "cpu": "the runtime's own CPU kernels",
}


def milliseconds(value: float) -> str:
    """Write a time for an axis."""
    return f"{number(value, 3)} ms"


def plain_axis(value: float) -> str:
    """Write a number for an axis."""
    return number(value, 4)


def colors_of(rows: Sequence[Row]) -> dict[str, int]:
    """Give every target a color, in the order in which they come."""
    return {target: place for place, target in enumerate(dict.fromkeys(row.target for row in rows))}


def verdict_cell(row: Row) -> Markup | str:
    """How true a file is to its network."""
    word, reason = verdict_of(row)
    return ABSENT if word is None else state(_VERDICTS.get(word, "unknown"), word, reason)


def state_cell(report: Report, row: Row) -> Markup:
    """Whether a file can ship."""
    word = state_of(report, row)
    over = str(row.budget) if word == "over budget" else None
    return state(KINDS[word], word, row.error or row.not_run or over)


def files(report: Report, chosen: Row | None) -> Markup:
    """What each file costs and how well it does: accuracy against size and latency, and all of it as a table."""
    rows = files_of(report)
    metrics = report.metric_names()
    headers: list[object] = [
        "File",
        "State",
        *(clipped(metric, _LONGEST_HEADER) for metric in metrics[:4]),
        "Bytes",
        "Of float",
        "p50 ms",
        "Zipped",
        "Agreement",
        "In the folder",
    ]
    names = names_of(report.rows)
    cells: list[list[object]] = []
    for name, row in zip(names, report.rows, strict=True):
        is_file = row.target != "torch"
        cells.append(
            [
                name,
                state_cell(report, row) if is_file else "in torch",
                *(ABSENT if row.not_run else fixed(row.metrics.get(metric), 4) for metric in metrics[:4]),
                number(row.size_bytes),
                _of_float(report, row) if is_file else ABSENT,
                fixed(row.p50_ms, 3) if timed(row) else ABSENT,
                number(row.compressed_bytes),
                verdict_cell(row),
                row.path or ABSENT,
            ]
        )
    if not any(verdict_of(row)[0] for row in rows):
        headers, cells = without(headers, cells, "Agreement")
    marked = [number for number, row in enumerate(report.rows) if row is chosen]
    shown = _scatters(report, rows)
    return section(
        "What each file costs, and how well it does",
        shown,
        quiet("Filled marks are int8 or compressed files, hollow ones float; a line leads from one to the other.")
        if shown
        else None,
        table(headers, cells, "All candidates", ("State", "In the folder"), marked),
        quiet(f"{len(metrics) - 4} more metrics are in report.json.") if len(metrics) > 4 else None,
    )


def _of_float(report: Report, row: Row) -> str:
    before = baseline_of(report, row) if is_compressed(row) else None
    if before is None or before.target == "torch" or not before.size_bytes or row.size_bytes is None:
        return ABSENT
    return f"{row.size_bytes / before.size_bytes:.2f}"


def _scatters(report: Report, rows: Sequence[Row]) -> Markup:
    metric, mode = metric_of(report)
    usable = [row for row in rows if row.error is None and row.size_bytes is not None]
    small = Side("bytes on disk", size, zero=True, better="min")
    fast = Side("p50 latency", milliseconds, zero=True, better="min")
    if metric is None:
        pairs = [(row, float(row.size_bytes or 0), row.p50_ms or 0.0) for row in usable if timed(row)]
        return pictures(_scatter("Latency against size", pairs, rows, small, fast))
    good = Side(metric, plain_axis, better=mode)
    scored = [row for row in usable if known(row.metrics.get(metric)) and row.not_run is None]
    by_size = [(row, float(row.size_bytes or 0), row.metrics[metric]) for row in scored]
    by_time = [(row, row.p50_ms or 0.0, row.metrics[metric]) for row in scored if timed(row)]
    return pictures(
        _scatter(f"{metric} against size", by_size, rows, small, good),
        _scatter(f"{metric} against latency", by_time, rows, fast, good),
    )


def _scatter(
    caption: str, pairs: Sequence[tuple[Row, float, float]], rows: Sequence[Row], x: Side, y: Side
) -> tuple[str, Markup] | None:
    if not pairs:
        return None
    # Compressed files are what is decided on: their labels find their places first.
    pairs = sorted(pairs, key=lambda pair: not is_compressed(pair[0]))
    colors = colors_of(rows)
    shown = [row for row, _, _ in pairs]
    marks = [
        Point(
            across, up, name, f"{row.label}: {x.write(across)}, {y.write(up)}", colors[row.target], is_compressed(row)
        )
        for (row, across, up), name in zip(pairs, names_of(shown), strict=True)
    ]
    if len(marks) > _CROWDED:
        # A float file is named by the line that leads to its compressed one.
        compressed = {row.target for row in shown if is_compressed(row)}
        marks = [
            mark if mark.full or row.target not in compressed else replace(mark, label="")
            for mark, row in zip(marks, shown, strict=True)
        ]
    ways = [
        (before, after)
        for after, row in enumerate(shown)
        for before, other in enumerate(shown)
        if is_compressed(row) and not is_compressed(other) and other.target == row.target
    ]
    return caption, scatter(marks, x, y, ways)


def latency(report: Report) -> Markup:
    """How long a sample takes, from the shortest call to the slowest of a hundred."""
    rows = [row for row in files_of(report) if timed(row)]
    colors = colors_of(files_of(report))
    entries, spread = [], []
    for name, row in zip(names_of(rows), rows, strict=True):
        values = tuple(value for value in (row.p50_ms, row.p95_ms, row.p99_ms) if known(value))
        note = f"{' · '.join(number(value, 3) for value in values)} ms"
        entry = Entry(name, note, values, f"{row.label}: p50, p95, p99: {note}", colors[row.target], is_compressed(row))
        entries.append(entry)
        steps = row.quantiles_ms
        if len(values) == 3 and len(steps) >= _QUARTERS and all(map(known, steps)):
            places = [steps[round(part * (len(steps) - 1))] for part in (0, 0.25, 0.5, 0.75)]
            # In order, even where a file from elsewhere says otherwise.
            spread.append(replace(entry, values=tuple(sorted((*places, *values[1:])))))
    measured = [row for row in report.rows if timed(row)]
    cells = [
        [
            name,
            fixed(row.quantiles_ms[0] if row.quantiles_ms else None, 3),
            *(fixed(value, 3) for value in (row.p50_ms, row.p95_ms, row.p99_ms)),
            fixed(row.quantiles_ms[-1] if row.quantiles_ms else None, 3),
            fixed(row.throughput, 1),
            fixed(row.load_ms, 1),
            row.runtime or ABSENT,
        ]
        for name, row in zip(names_of(measured), measured, strict=True)
    ]
    others = [f"{row.label} ({_untimed(row)})" for row in files_of(report) if not timed(row)]
    headers = ["File", "Shortest ms", "p50 ms", "p95 ms", "p99 ms", "Longest ms", "Samples/s", "Load ms", "Run by"]
    drawn = None
    if spread and len(spread) == len(entries):
        caption = "Latency of one sample: half of the calls (box), median (mark), shortest, p95 and p99 (bars)"
        drawn = pictures((caption, bars.boxes("Latency", spread, milliseconds)))
    elif entries:
        caption = "Latency of one sample: p50 (mark), p95 and p99 (bars)"
        drawn = pictures((caption, bars.ranges("Latency", entries, milliseconds)))
    return section(
        "How fast",
        drawn,
        table(headers, cells, "Latency of one sample, and loading", ("Run by",)),
        quiet(f"Not timed: {'; '.join(others)}.") if others else None,
    )


def _untimed(row: Row) -> str:
    if row.error is not None:
        return "failed"
    if row.not_run is not None:
        return "nothing here can run it"
    return "run by a reference interpreter or kernels, whose speed says nothing" if row.is_reference else "not measured"


def placements(report: Report) -> Markup:
    """Which share of the work the delegate takes, and what is left to the runtime's own kernels."""
    rows = [row for row in files_of(report) if row.placements is not None and row.placements.ops]
    used = [
        place
        for place in _PLACES
        if any(op.place == place for row in rows for op in (row.placements.ops if row.placements else ()))
    ]
    entries, cells = [], []
    for name, row in zip(names_of(rows), rows, strict=True):
        assert row.placements is not None
        ops = sorted(row.placements.ops, key=lambda op: (-op.macs, -op.count))
        measure, amounts = "MACs", {place: float(sum(op.macs for op in ops if op.place == place)) for place in used}
        if not row.placements.macs:
            measure, amounts = (
                "operations",
                {place: float(sum(op.count for op in ops if op.place == place)) for place in used},
            )
        whole = sum(amounts.values())
        if whole:
            entries.append(Entry(name, _placed(amounts, whole, measure), tuple(amounts.values()), name))
        cells += [
            [
                name,
                _PLACE_NAMES[place],
                share(amount / whole) if whole else ABSENT,
                number(sum(op.macs for op in ops if op.place == place)),
                ", ".join(f"{op.count} x {op.op}" for op in ops if op.place == place),
                row.placements.told_by,
            ]
            for place, amount in amounts.items()
            if any(op.place == place for op in ops)
        ]
    headers = ["File", "Runs on", "Share", "MACs", "Operations", "As told by"]
    drawn = bars.shares("What runs where", entries, [_PLACE_NAMES[place] for place in used]) if entries else None
    return section(
        "What runs where",
        pictures(("Share of the multiply-accumulates by place", drawn)) if drawn else None,
        table(headers, cells, "Operations by place", ("Runs on", "Operations", "As told by")),
    )


def _placed(amounts: Mapping[Place, float], whole: float, measure: str) -> str:
    """Say how much is delegated, or that the device itself decides."""
    undecided = sum(amounts.get(place, 0.0) for place in _UNDECIDED)
    if undecided:
        return f"{undecided / whole:.1%} decided on the device"
    return f"{1 - amounts.get('cpu', 0.0) / whole:.1%} of the {measure} delegated"


def agreement(report: Report) -> Markup:
    """How far each file lies from the network it came from."""
    rows = [row for row in files_of(report) if row.error is None and row.not_run is None and row.samples]
    colors = colors_of(files_of(report))
    entries: list[Entry] = []
    cells: list[list[object]] = []
    for name, row in zip(names_of(rows), rows, strict=True):
        steps = tuple(value for value in (row.mean_steps, row.most_steps, row.max_steps) if known(value))
        if len(steps) == 3:
            note = f"{' · '.join(number(value, 3) for value in steps)} steps"
            entries.append(Entry(name, note, steps, f"{row.label}: mean, 99.9 %, largest: {note}", colors[row.target]))
        cells.append(
            [
                name,
                verdict_cell(row),
                share(row.top1),
                number(row.mean_steps, 3),
                number(row.most_steps, 3),
                number(row.max_steps, 3),
                ABSENT if row.max_relative is None else f"{row.max_relative:.1e}",
                number(row.samples),
                share(row.int8_weight_share),
                ", ".join(dict.fromkeys(row.float_ops))
                if row.float_ops
                else "none"
                if row.float_ops is not None
                else ABSENT,
            ]
        )
    headers: list[object] = [
        "File",
        "Verdict",
        "Same top class",
        "Mean steps",
        "99.9 %",
        "Largest",
        "Relative",
        "Samples",
    ]
    headers += ["int8 weights", "Computed in float"]
    if not any(verdict_of(row)[0] for row in rows):
        headers, cells = without(headers, cells, "Verdict")
    reasons = [
        join(verdict_cell(row), f" {name}: {verdict_of(row)[1]}")
        for name, row in zip(names_of(rows), rows, strict=True)
        if verdict_of(row)[1]
    ]
    return section(
        "How true each file is to its network",
        pictures(
            (
                "Difference in steps of the output: mean (mark), 99.9 % and largest (bars)",
                bars.ranges("Difference in steps", entries, plain_axis),
            )
        )
        if any(max(entry.values) > 0 for entry in entries)
        else quiet("Every int8 file gives the outputs of its network, without a step of difference.")
        if entries
        else None,
        # Where a file differs, its reason names the first layer that does.
        points(reasons),
        table(headers, cells, "Agreement with the network each file came from", ("Computed in float",)),
    )


def memory(report: Report) -> Markup:
    """Where bytes go: on the disk, and while the file runs."""
    rows = [row for row in files_of(report) if row.error is None and row.size_bytes is not None]
    colors = colors_of(files_of(report))
    disk, peak, cells = [], [], []
    for name, row in zip(names_of(rows), rows, strict=True):
        color = colors[row.target]
        stored = tuple(float(value) for value in (row.size_bytes, row.compressed_bytes) if value is not None)
        note = " · ".join(f"{value:,.0f}" for value in stored)
        disk.append(Entry(name, note, stored, f"{row.label}: bytes on disk, and zipped: {note}", color))
        if row.peak_memory_bytes is not None and row.peak_memory_bytes >= 0:
            note = f"{row.peak_memory_bytes:,}"
            peak.append(
                Entry(name, note, (float(row.peak_memory_bytes),), f"{row.label}: {note} bytes at its peak", color)
            )
        before = baseline_of(report, row) if is_compressed(row) else None
        against = ABSENT
        if before is not None and before.target != "torch" and before.size_bytes and row.size_bytes:
            against = times(before.size_bytes, row.size_bytes, "smaller", "larger", "as large")
        cells.append(
            [
                name,
                number(row.size_bytes),
                number(row.compressed_bytes),
                against,
                number(row.peak_memory_bytes),
                number(row.planned_memory_bytes),
            ]
        )
    headers = ["File", "On disk", "Zipped", "Against float", "Peak while it runs", "Planned for activations"]
    return section(
        "Where memory goes",
        pictures(
            ("Bytes on disk, and zipped (narrow bar)", bars.amounts("Bytes on disk", disk, size)) if disk else None,
            ("Bytes that its process grew by, at its peak", bars.amounts("Peak memory", peak, size)) if peak else None,
        ),
        table(headers, cells, "Bytes"),
    )
