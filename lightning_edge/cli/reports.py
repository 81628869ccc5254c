"""``lightning-edge report``: the page of a report or of a sweep, and several reports side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_edge.errors import EdgeError
from lightning_edge.files import replace_text
from lightning_edge.reporting.html.comparison import MOST, comparison_page
from lightning_edge.reporting.html.sweep import FRONT, sweep_page
from lightning_edge.reporting.read import read_front, read_report

PAGE = "report.html"
COMPARISON = "compare.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lightning-edge report``: write the page and say where it is.

    Args:
        arguments: Arguments behind ``report``.

    Returns:
        The status to exit with: 2 if a report cannot be used or the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-edge report",
        description="Write the page of a report or of a sweep again, or put several reports side by side.",
    )
    parser.add_argument(
        "reports",
        nargs="+",
        type=Path,
        metavar="REPORT",
        help="a report.json, the folder it lies in, or the folder of a sweep",
    )
    parser.add_argument(
        "--to", type=Path, help=f"the page to write; {PAGE} beside the report, {COMPARISON} here for several"
    )
    given = parser.parse_args(arguments)
    try:
        written = _write(given.reports, given.to)
    except (EdgeError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(written)
    return 0


def _write(places: Sequence[Path], to: Path | None) -> Path:
    if to is not None and (to.is_dir() or to.suffix.lower() not in (".html", ".htm")):
        raise ValueError(f"--to {to} is no name of a page; give one that ends in .html")
    if len(places) == 1 and (places[0].name == FRONT or (places[0] / FRONT).exists()):
        place = places[0] / FRONT if places[0].is_dir() else places[0]
        front = read_front(place)
        try:
            page = sweep_page(front)
        except ValueError as error:
            raise EdgeError(f"{place} is no sweep that can be used: {error}. Give the folder of a sweep") from error
        return replace_text(to or place.parent / PAGE, page)
    if len(places) > MOST:
        raise ValueError(f"{len(places)} reports are given; {MOST} at most can be read side by side")
    found = [read_report(place) for place in places]
    for remark in (remark for one in found for remark in one.remarks):
        sys.stderr.write(f"note: {remark}\n")
    if len(found) == 1:
        only = found[0]
        return replace_text(to or only.path.parent / PAGE, only.report.to_html(only.recipe, only.commit))
    names = names_of([one.path.resolve().parent for one in found])
    return replace_text(
        to or Path(COMPARISON), comparison_page(dict(zip(names, (one.report for one in found), strict=True)))
    )


def names_of(folders: Sequence[Path]) -> list[str]:
    """Name reports by their folders, with as many of the folders above as tell them apart.

    Args:
        folders: Absolute paths.
    """
    longest = max(len(folder.parts) for folder in folders)
    for depth in range(1, longest + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len({*names}) == len(names):
            return names
    return [f"{number}: {folder.name}" for number, folder in enumerate(folders, 1)]
