"""Reports read back from the disk, with what the manifest beside them says of how they were made. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_edge.errors import EdgeError, ManifestError
from lightning_edge.reporting.manifest import NAME as MANIFEST
from lightning_edge.reporting.manifest import Manifest
from lightning_edge.reporting.provenance import Commit
from lightning_edge.reporting.report import Report
from lightning_edge.reporting.typed import built, read_json

NAME = "report.json"
_MOST_ROWS = 200


@dataclass(frozen=True)
class Found:
    """A report that was found on the disk.

    Attributes:
        path: Its ``report.json``.
        report: The report.
        recipe: The configuration it was made with, if the manifest beside it has one.
        commit: The commit it was made in, if the manifest beside it has one.
        remarks: What could not be read, one sentence each.
    """

    path: Path
    report: Report
    recipe: str | None = None
    commit: Commit | None = None
    remarks: tuple[str, ...] = ()


def read_report(path: str | Path) -> Found:
    """Read a report, strictly in its types and sizes.

    Entries that this version does not know are left out with a remark, so that a report of a later version can be read.
    The manifest beside it is read for the configuration only; one that cannot be used is a remark.

    Args:
        path: The ``report.json``, or the folder it lies in.

    Raises:
        EdgeError: If there is none, it is no file, too large, cut short, or is no report.
    """
    path = Path(path)
    place = path / NAME if path.is_dir() else path
    again = f"Give a {NAME} that lightning-edge has written, or the folder it lies in"
    unknown: list[str] = []
    try:
        plain = read_json(place)
        report: Report = built(Report, plain, "it", unknown)
    except FileNotFoundError as error:
        raise EdgeError(f"there is no {place}. {again}") from error
    except OSError as error:
        raise EdgeError(f"{place} cannot be read: {error.strerror or error}. {again}") from error
    except ValueError as error:
        raise EdgeError(f"{place} is no report that can be used: {error}. {again}") from error
    if len(report.rows) > _MOST_ROWS:
        raise EdgeError(f"{place} has {len(report.rows):,} rows; a report has {_MOST_ROWS} at most. {again}")
    remarks = []
    if unknown:
        remarks.append(f"{place} has entries that this version does not know and leaves out: {', '.join(unknown[:8])}")
    recipe, commit = None, None
    if (place.parent / MANIFEST).is_file():
        try:
            manifest = Manifest.read(place.parent)
            recipe, commit = manifest.recipe, manifest.git
        except ManifestError as error:
            remarks.append(f"the configuration is left out: {error}")
    return Found(place, _complete(report), recipe, commit, tuple(remarks))


def read_front(path: str | Path) -> dict[str, Any]:
    """Read the ``front.json`` of a sweep; whether it is of the right form is seen where its page is made.

    Raises:
        EdgeError: If there is none, it is no file, too large or cut short.
    """
    try:
        front = read_json(Path(path))
    except OSError as error:
        raise EdgeError(f"{path} cannot be read: {error.strerror or error}. Give the folder of a sweep") from error
    except ValueError as error:
        raise EdgeError(f"{path} is none that can be used: {error}. Give the folder of a sweep") from error
    if not isinstance(front, dict):
        raise EdgeError(f"{path} holds a {type(front).__name__} and no sweep. Give the folder of a sweep")
    return front


def _complete(report: Report) -> Report:
    """Give a report its numbers without those that were not finite, which are none for a picture or a table."""
    rows = tuple(
        replace(row, metrics={name: value for name, value in row.metrics.items() if value == value})
        for row in report.rows
    )
    return replace(report, rows=rows)
