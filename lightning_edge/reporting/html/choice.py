"""What a person who ships asks first: which file can ship, which one to take, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lightning_edge.reporting.html.words import known
from lightning_edge.reporting.monitor import Mode, choose, direction

if TYPE_CHECKING:
    from lightning_edge.reporting.report import Report, Row

State = Literal["ready", "for comparison", "over budget", "broken", "not run here", "failed"]
KINDS: dict[State, str] = {
    "ready": "good",
    "for comparison": "unknown",
    "over budget": "warn",
    "broken": "bad",
    "not run here": "unknown",
    "failed": "bad",
}
# Files whose metric lies closer together than this share of it are taken for equally good.
CLOSE = 0.005
# Files whose bytes lie closer together than this share are taken for equally large.
ALIKE = 0.1


@dataclass(frozen=True)
class Choice:
    """A file to ship.

    Attributes:
        row: Its row.
        baseline: The float file of the same target, else the float network in torch; ``None`` where there is neither.
        why: By what it was chosen.
    """

    row: Row
    baseline: Row | None
    why: str


def verdict_of(row: Row) -> tuple[str | None, str | None]:
    """How true a file is to its network, in a word, and why; ``None`` where that was not judged."""
    return row.verdict, row.verdict_reason


def state_of(report: Report, row: Row) -> State:
    """Whether a file can ship, in a word; a float file beside compressed ones is for comparison."""
    if row.error is not None:
        return "failed"
    if verdict_of(row)[0] == "broken":
        return "broken"
    if row.not_run is not None:
        return "not run here"
    if not is_compressed(row) and any(is_compressed(other) and other.error is None for other in files_of(report)):
        return "for comparison"
    return "over budget" if row.within_budget is False else "ready"


def files_of(report: Report) -> list[Row]:
    """The rows of files, without those of networks in torch."""
    return [row for row in report.rows if row.target != "torch"]


def is_compressed(row: Row) -> bool:
    """Whether a file's weights take fewer bits than those of the float network."""
    return row.precision == "int8" or row.scheme is not None


def timed(row: Row) -> bool:
    """Whether a row has a latency that means something."""
    return known(row.p50_ms) and not row.is_reference and row.error is None and row.not_run is None


def names_of(rows: Sequence[Row]) -> list[str]:
    """Name rows as shortly as tells them apart."""
    plain = [f"{row.target} {row.scheme or row.precision}" for row in rows]
    longer = [f"{row.label} {row.scheme}" if row.scheme else row.label for row in rows]
    return [full if plain.count(short) > 1 else short for short, full in zip(plain, longer, strict=True)]


def metric_of(report: Report) -> tuple[str | None, Mode | None]:
    """The metric that decides, and where it is better, as far as its name tells."""
    names = report.metric_names()
    if report.monitor in names:
        return report.monitor, direction(str(report.monitor))
    monitor = choose(names)
    if monitor is not None:
        return monitor.metric, monitor.mode
    return (names[0], None) if names else (None, None)


def baseline_of(report: Report, row: Row) -> Row | None:
    """The float file of the same target, else the float network in torch."""
    floats = [
        other for other in report.rows if other.source == "float" and not is_compressed(other) and not other.error
    ]
    for target in (row.target, "torch"):
        for other in floats:
            if other.target == target and other is not row:
                return other
    return None


def choose_file(report: Report) -> Choice | None:
    """Choose the file to ship: the smallest that can, of those that are about as good as the best.

    Returns:
        The choice; ``None`` where no file can ship.
    """
    sound = [row for row in files_of(report) if row.size_bytes is not None and row.within_budget is not False]
    compressed = [row for row in sound if is_compressed(row) and state_of(report, row) == "ready"]
    left = compressed or [row for row in sound if state_of(report, row) in ("ready", "for comparison")]
    if not left:
        return None
    kind = "int8 or compressed file" if compressed else "file"
    why = f"the smallest {kind}"
    if any(row.budget is not None for row in left):
        why += " that is not over its budget"
    metric, mode = metric_of(report)
    values = [row.metrics[metric] for row in left if known(row.metrics.get(metric))] if metric else []
    if metric and mode and values:
        best = max(values) if mode == "max" else min(values)
        left = [
            row
            for row in left
            if known(row.metrics.get(metric)) and abs(row.metrics[metric] - best) <= CLOSE * abs(best)
        ]
        why += f", of those whose {metric} lies within {CLOSE:.1%} of the best"
    smallest = min(row.size_bytes or 0 for row in left)
    left = [row for row in left if (row.size_bytes or 0) <= (1 + ALIKE) * smallest]
    if len(left) > 1 and all(timed(row) for row in left):
        why += f"; of sizes within {ALIKE:.0%}, the fastest"
        row = min(left, key=lambda row: row.p50_ms or 0.0)
    else:
        row = min(left, key=lambda row: row.size_bytes or 0)
    return Choice(row, baseline_of(report, row), why)
