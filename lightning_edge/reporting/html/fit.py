"""The page of a report: what the network was, what it is now, and what a person who ships has to know of the files."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lightning_edge.reporting.html import parts
from lightning_edge.reporting.html.by_layer import layers
from lightning_edge.reporting.html.choice import (
    KINDS,
    Choice,
    choose_file,
    files_of,
    metric_of,
    state_of,
    timed,
    verdict_of,
)
from lightning_edge.reporting.html.classes import classes
from lightning_edge.reporting.html.markup import Markup, join, tag, text
from lightning_edge.reporting.html.on_devices import on_devices
from lightning_edge.reporting.html.page import page, points, quiet, section, state, table, tiles
from lightning_edge.reporting.html.words import clipped, known, number, signed, times
from lightning_edge.reporting.rendering import phases_in_words

if TYPE_CHECKING:
    from lightning_edge.reporting.provenance import Commit
    from lightning_edge.reporting.report import Report, Row

_LONGEST_RECIPE = 40_000
_LONGEST_NAME = 80
# Two medians of the same file lie so far apart.
_SAME_SPEED = 0.05


def report_page(report: Report, recipe: str | None = None, commit: Commit | None = None) -> str:
    """Make the page of a report: one file that loads nothing, for a browser, a phone and a printer.

    Args:
        report: The report.
        recipe: Text of the configuration it was made with, if one is known.
        commit: The commit of the working directory it was made in, if there is one.
    """
    choice = choose_file(report)
    return page(
        f"{report.model} on the device",
        tag("h1", f"{clipped(report.model, _LONGEST_NAME)} on the device"),
        _headline(report, choice),
        _attention(report),
        parts.files(report, None if choice is None else choice.row),
        parts.latency(report),
        on_devices(report),
        parts.agreement(report),
        classes(report, None if choice is None else choice.row),
        layers(report),
        parts.placements(report),
        parts.memory(report),
        section("Notes", points(report.notes)) if report.notes else None,
        _making(report, recipe, commit),
    )


def _headline(report: Report, choice: Choice | None) -> Markup:
    counts = Counter(state_of(report, row) for row in files_of(report))
    states = [state(KINDS[word], f"{counts[word]} {word}") for word in KINDS if counts[word]]
    files = tag("p", *(tag("span", entry, class_="key") for entry in states))
    if choice is None:
        said = "There are no files." if not counts else "No file can ship as it is."
        return join(tag("p", said, class_="lead"), files)
    row, before = choice.row, choice.baseline
    metric, mode = metric_of(report)
    shown: list[tuple[str, object, object]] = []
    told = []
    # The float files of a pruned network are pruned, too: what a file is compared with is said of each figure.
    after_cut = "" if report.original is None else ", after pruning"
    if row.size_bytes is not None:
        than = "no float file to compare with"
        if before is not None and before.size_bytes and row.size_bytes:
            told.append(times(before.size_bytes, row.size_bytes, "smaller", "larger", "as large"))
            than = f"{before.label}: {before.size_bytes:,}, {told[-1]}"
        if report.original is not None and row.size_bytes:
            than = f"float weights before compression: {report.original.size_bytes:,}; {than}"
        shown.append(("Bytes", number(row.size_bytes), than))
    if metric is not None and known(row.metrics.get(metric)):
        now, than = row.metrics[metric], "no float file to compare with"
        if before is not None and known(before.metrics.get(metric)):
            difference = now - before.metrics[metric]
            than = f"{before.label}{after_cut}: {number(before.metrics[metric])}, {signed(difference)}"
            better = mode is not None and difference and (difference > 0) == (mode == "max")
            words = (
                f"{abs(difference):.3g} {'better' if better else 'worse'}"
                if mode and difference
                else signed(difference)
            )
            told.append(f"{clipped(metric, _LONGEST_NAME)} {words if difference else 'the same'}")
        shown.append((clipped(metric, _LONGEST_NAME), number(now), than))
    if timed(row):
        than = "the float file was not timed"
        if before is not None and timed(before) and row.p50_ms and before.p50_ms:
            told.append(times(before.p50_ms, row.p50_ms, "faster", "slower", "as fast", _SAME_SPEED))
            than = f"{before.label}{after_cut}: {number(before.p50_ms, 3)} ms, {told[-1]}"
        shown.append(("Median latency of one sample", f"{number(row.p50_ms, 3)} ms", than))
    word, reason = verdict_of(row)
    if word is not None:
        shown.append(("Agreement with its network", parts.verdict_cell(row), reason or ""))
    elif known(row.top1):
        shown.append(("Same top class as its network", f"{row.top1:.2%}", f"of {number(row.samples)} samples"))
    return join(
        tag(
            "p",
            f"{clipped(report.model, _LONGEST_NAME)} is a network{_size(report)}. To ship: ",
            tag("strong", row.label),
            _against_original(report, row),
            f". Against {before.label}{after_cut}: {', '.join(told)}." if before is not None and told else ".",
            class_="lead",
        ),
        tiles(shown),
        files,
        quiet(f"Chosen as {choice.why}."),
        quiet(" ".join(report.float_networks())) if report.original is not None else None,
    )


def _size(report: Report) -> str:
    """How large the network was built, and how large it is."""
    if report.parameters is None:
        return ""
    if report.original is None:
        return f" of {report.parameters:,} parameters"
    return f" of {report.original.parameters:,} parameters, cut to {report.parameters:,}"


def _against_original(report: Report, row: Row) -> str:
    """How much smaller a file is than the float weights that it was cut from; nothing where nothing was cut."""
    if report.original is None or not row.size_bytes or not report.original.size_bytes:
        return ""
    told = times(report.original.size_bytes, row.size_bytes, "smaller", "larger", "as large")
    return f", {told} than its float weights before compression"


def _attention(report: Report) -> Markup:
    """What stands between the files and shipping them."""
    told: list[object] = [
        join(tag("strong", f"{row.label} failed: "), row.error) for row in report.failures if row.error is not None
    ]
    told += [
        join(tag("strong", f"{row.label} was not run here: "), row.not_run)
        for row in files_of(report)
        if row.not_run is not None
    ]
    over = [f"{row.label} is over its budget: {row.budget}" for row in report.over_budget]
    told += [line for line in over if line not in report.warnings]
    told += report.warnings
    return section("Look at this first", points(told))


def _making(report: Report, recipe: str | None, commit: Commit | None) -> Markup:
    """How the files and the numbers were made, so that they can be made again."""
    settings: list[object] = list(report.settings())
    if commit is not None:
        settings.append(f"commit {commit.commit}{', with changes that are not committed' if commit.dirty else ''}")
    versions = [[name, version] for name, version in sorted(report.versions.items())]
    return section(
        "How it was made",
        points(settings),
        join(tag("h3", "Phases"), points(phases_in_words(report.phases))) if report.phases else None,
        table(["Package", "Version"], versions, "Versions", ("Version",)),
        join(tag("h3", "Configuration"), tag("pre", text(recipe, _LONGEST_RECIPE))) if recipe else None,
    )
