"""What a trial is judged by: figures of exported files, read from a trial's report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from lightning_edge.errors import SweepError
from lightning_edge.reporting.report import Row
from lightning_edge.sweeps.base import Base

Direction = Literal["max", "min"]

# Numbers of a report's row, of which more or less can be better.
FIGURES = (
    "size_bytes",
    "compressed_bytes",
    "load_ms",
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "throughput",
    "planned_memory_bytes",
    "arena_bytes",
    "peak_memory_bytes",
    "top1",
    "max_steps",
    "mean_steps",
    "most_steps",
    "max_relative",
    "int8_weight_share",
    "delegated_ops",
)
# As loggers and budgets name them.
LOGGED = {"p50_ms": "latency_p50_ms", "p95_ms": "latency_p95_ms", "p99_ms": "latency_p99_ms", "top1": "top1_agreement"}
_ALIASES = {name: field for field, name in LOGGED.items()}
# Milliseconds and what follows from them: other work on the machine changes them.
TIMES = ("load_ms", "p50_ms", "p95_ms", "p99_ms", "throughput")
# A reference interpreter's own figures mean nothing for the target.
_OF_RUNTIME = (*TIMES, "peak_memory_bytes")
_ROW = {name for name in Row.__dataclass_fields__}
_MOST_BYTES = 64_000_000


class TrialStoppedError(SweepError):
    """A trial was ended by ``stop_early``; with what its metric was."""


class TrialFailedError(SweepError):
    """One trial gives no values; others may."""


class NoSuchFigureError(SweepError):
    """No trial of this sweep can give the values that are asked for."""


@dataclass(frozen=True)
class Figure:
    """One number of the file to ship of one target.

    Attributes:
        name: As the sweep file names it.
        target: The target.
        field: A field of the report's row, or one of the user's own metrics.
    """

    name: str
    target: str
    field: str

    @property
    def is_metric(self) -> bool:
        """Whether it is one of the user's own metrics."""
        return self.field not in FIGURES

    def read(self, row: Mapping[str, Any]) -> float:
        """Take the number from a row of a report.

        Raises:
            NoSuchFigureError: If no report of this sweep will have it.
            TrialFailedError: If only this one has not.
        """
        metrics = row.get("metrics") or {}
        value = metrics.get(self.field) if self.is_metric else row.get(self.field)
        if self.is_metric and self.field not in metrics:
            known = ", ".join((*metrics, *FIGURES))
            raise NoSuchFigureError(f"{self.name}: the report of {self.target} has no {self.field}; it has: {known}")
        if self.field in _OF_RUNTIME and (row.get("is_reference") or row.get("not_run")):
            why = row.get("not_run") or f"{row.get('runtime')} is a reference interpreter"
            raise NoSuchFigureError(
                f"{self.name}: it cannot be measured on this machine ({why}). Run the sweep where the runtime of "
                f"{self.target} is, or take a figure of the file itself, such as {self.target}.size_bytes"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TrialFailedError(f"{self.name}: the report has no number there, but {value!r}")
        return float(value)


@dataclass(frozen=True)
class Objective:
    """A figure, and where it is better."""

    figure: Figure
    direction: Direction


@dataclass(frozen=True)
class Constraint:
    """A figure, and the largest value that is allowed."""

    figure: Figure
    limit: float


def read_objectives(given: Any) -> dict[str, Direction]:
    """Read the ``objectives`` of a sweep file.

    Raises:
        SweepError: If it is not a mapping of names to ``max`` or ``min``.
    """
    if not isinstance(given, Mapping) or not given:
        raise SweepError(f"objectives: given {given!r}; allowed: figures by name, each with max or min")
    for name, direction in given.items():
        if not isinstance(name, str) or not name:
            raise SweepError(f"objectives: given the name {name!r}; allowed: text such as tflite.size_bytes")
        if direction not in ("max", "min"):
            raise SweepError(f"objectives: {name}: given {direction!r}; allowed: max, min")
    return dict(given)


def read_constraints(given: Any) -> dict[str, float]:
    """Read the ``constraints`` of a sweep file: upper limits by name.

    Raises:
        SweepError: If it is not a mapping of names to numbers.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise SweepError(f"constraints: given {given!r}; allowed: figures by name, each with its largest value")
    for name, limit in given.items():
        if not isinstance(name, str) or not name:
            raise SweepError(f"constraints: given the name {name!r}; allowed: text such as tflite.size_bytes")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
            raise SweepError(f"constraints: {name}: given {limit!r}; allowed: a number, the largest value")
    return {name: float(limit) for name, limit in given.items()}


def figure_of(name: str, target: str) -> Figure:
    """Give the figure that a name stands for.

    Args:
        name: ``<target>.<field>``, or a field alone.
        target: The target.
    """
    field = name.partition(".")[2] if "." in name else name
    return Figure(name, target, _ALIASES.get(field, field))


def find_figures(names: Sequence[str], deciding: Sequence[str], base: Base, where: str) -> list[Figure]:
    """Find the target and the field that names stand for.

    Args:
        names: Names of figures.
        deciding: Names of all objectives; the target of names without one is the only one among these.
        base: What the trials begin with.
        where: The key of the sweep file they are in.

    Raises:
        SweepError: If a name stands for nothing that a report of ``base`` has.
    """
    named = sorted({_target(name, base, where) for name in deciding if "." in name})
    found: list[Figure] = []
    for name in names:
        if "." in name:
            target = _target(name, base, where)
        elif len(named) == 1:
            target = named[0]
        else:
            told = f"the objectives name {', '.join(named)}" if named else "no objective names a target"
            example = (named or base.targets)[0]
            raise SweepError(f"{where}: {name}: of which target? {told}. Write, for example, {example}.{name}")
        found.append(_checked(figure_of(name, target), base, where))
    same = [
        figure
        for figure in found
        if [(other.target, other.field) for other in found].count((figure.target, figure.field)) > 1
    ]
    if same:
        raise SweepError(f"{where}: {same[0].name} and {same[1].name} are the same figure; give one of them")
    return found


def read_report(path: Path) -> dict[str, Any]:
    """Read a ``report.json``.

    Raises:
        TrialFailedError: If there is none, or it cannot be used.
    """
    try:
        if not path.is_file():
            raise TrialFailedError("it wrote no report")
        if path.stat().st_size > _MOST_BYTES:
            raise TrialFailedError(f"its report has {path.stat().st_size:,} bytes, more than {_MOST_BYTES:,}")
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrialFailedError(f"its report cannot be read: {error}") from error
    if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
        raise TrialFailedError("its report has no rows")
    return report


def row_to_ship(report: Mapping[str, Any], target: str) -> Mapping[str, Any]:
    """Find the row of a target's file to ship: the int8 one if an int8 network was made, never the network in torch.

    Raises:
        TrialFailedError: If there is no such file, or it failed.
    """
    rows = [row for row in report["rows"] if isinstance(row, dict)]
    broken = [
        row for row in rows if row.get("target") == "torch" and row.get("precision") == "int8" and row.get("error")
    ]
    files = [row for row in rows if row.get("target") == target]
    int8 = [row for row in files if row.get("precision") == "int8"]
    chosen = int8 or [row for row in files if row.get("scheme")] or files
    if broken and not int8:
        raise TrialFailedError(f"there is no int8 network: {_line(broken[-1]['error'])}")
    if not chosen:
        raise TrialFailedError(f"the report has no file of {target}")
    if chosen[-1].get("error"):
        raise TrialFailedError(f"the file of {target} failed: {_line(chosen[-1]['error'])}")
    if chosen[-1].get("verdict") == "broken":
        raise TrialFailedError(f"the file of {target} is broken: {_line(chosen[-1].get('verdict_reason') or '')}")
    return chosen[-1]


def measure(report: Mapping[str, Any], figures: Sequence[Figure]) -> dict[str, float]:
    """Read figures from a report, by name.

    Raises:
        TrialFailedError: If one is missing or its file failed.
        NoSuchFigureError: If no report of this sweep will have it.
    """
    return {figure.name: figure.read(row_to_ship(report, figure.target)) for figure in figures}


def _target(name: str, base: Base, where: str) -> str:
    target = name.partition(".")[0]
    if target not in base.targets:
        raise SweepError(
            f"{where}: {name}: {base.name} exports to no target {target!r}; it exports to {', '.join(base.targets)}"
        )
    return target


def _checked(figure: Figure, base: Base, where: str) -> Figure:
    """Refuse what no report has, and what is misspelled; other names are metrics, which only a training tells."""
    known = [*FIGURES, *(base.metrics or ())]
    if figure.field in known:
        return figure
    close = get_close_matches(figure.field, known, n=1, cutoff=0.8)
    meant = f" Did you mean {figure.target}.{close[0]}?" if close else ""
    if figure.field in _ROW or close or base.metrics is not None:
        raise SweepError(f"{where}: {figure.name}: no report has that number.{meant} Allowed: {', '.join(known)}")
    return figure


def _line(text: Any) -> str:
    lines = str(text).strip().splitlines()
    return lines[0] if lines else "no reason given"
