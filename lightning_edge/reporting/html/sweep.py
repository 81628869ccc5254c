"""The page of a sweep: its Pareto front, every trial, and a link to the report of each."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_edge.reporting.html.markup import Markup, file_link, join, link, tag
from lightning_edge.reporting.html.page import page, pictures, points, quiet, section, state, table
from lightning_edge.reporting.html.parts import plain_axis
from lightning_edge.reporting.html.scatter import Point, Side, scatter
from lightning_edge.reporting.html.words import ABSENT, clipped, known, number
from lightning_edge.reporting.typed import built
from lightning_edge.wording import counted

FRONT = "front.json"

# So that a page of thousands of trials stays one that a phone opens: the front is whole, of the others these many.
_MOST_TRIALS = 250
_MOST_POINTS = 400
_MOST_PICTURES = 6
_LONGEST_VALUE = 40
_NAMED_TOO = 8
_UNFINISHED = {"running": "still running", "stopped": "stopped"}
_COUNTED = {"ended early": "ended early", **_UNFINISHED}


@dataclass(frozen=True)
class _Trial:
    number: int
    status: Literal["complete", "ended early", "failed", "running", "stopped"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, float] | None = None
    feasible: bool = False
    front: bool = False
    folder: str | None = None
    reason: str | None = None
    seconds: float | None = None
    url: str | None = None
    limited: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Front:
    study: str
    objectives: Mapping[str, Literal["max", "min"]]
    trials: Sequence[_Trial]
    constraints: Mapping[str, float] = field(default_factory=dict)
    base: str | None = None


def sweep_page(front: Mapping[str, Any]) -> str:
    """Make the page of a sweep from what ``front.json`` holds.

    Args:
        front: ``study``, ``objectives`` by name with ``"max"`` or ``"min"``, ``constraints`` by name with their limits,
            ``base``, and ``trials`` with ``number``, ``status``, ``settings``, ``values``, ``spread``, ``feasible``,
            ``front``, ``folder`` (relative, its ``artifacts/report.html`` is linked to), ``reason``, ``seconds`` and
            ``url``.

    Raises:
        ValueError: If it is not of that form.
    """
    sweep = _read(front)
    best = [trial for trial in sweep.trials if trial.front]
    failed = [trial for trial in sweep.trials if trial.status == "failed"]
    counts = Counter[str](trial.status for trial in sweep.trials)
    others = [f"{counts[status]:,} {word}" for status, word in _COUNTED.items() if counts[status]]
    names = list(sweep.objectives)
    drawn = [(f"{names[0]} over {name}", _picture(sweep, names[0], name)) for name in names[1 : 1 + _MOST_PICTURES]]
    drawn = [(words, picture) for words, picture in drawn if picture]
    done = f"{counted(len(sweep.trials), 'trial')}: {len(best):,} on the front, {len(failed):,} failed"
    return page(
        f"Sweep {sweep.study}",
        tag("h1", f"Sweep {sweep.study}"),
        tag("p", f"{', '.join([done, *others])}.", class_="lead"),
        quiet(_aims(sweep)),
        section(
            "The front",
            pictures(*drawn),
            quiet(
                "Numbered marks are trials that no other beats in every objective; the line joins those that none "
                "beats in the two that are drawn. Hollow marks break a constraint, pale triangles are beaten."
            )
            if drawn
            else None,
            None if best else quiet("No trial is on the front: none is complete and keeps the constraints."),
        ),
        _trials(sweep),
        section("Failed", points([_failure(trial) for trial in failed])),
    )


def sweep_svg(front: Mapping[str, Any]) -> str:
    """Draw the first picture of the sweep's page alone, as an SVG file: the first objective over the second.

    Args:
        front: As for `sweep_page`.

    Raises:
        ValueError: If it is not of that form, has one objective only, or no trial has values for both.
    """
    sweep = _read(front)
    names = list(sweep.objectives)
    if len(names) < 2:
        raise ValueError(f"a picture needs two objectives and the sweep has {names}")
    drawn = _picture(sweep, names[0], names[1], alone=True)
    if not drawn:
        raise ValueError(f"no trial has values for {names[0]!r} and {names[1]!r} yet; there is nothing to draw")
    return drawn


def _read(front: Mapping[str, Any]) -> _Front:
    # Through JSON, so that what was read and what was made in the same process are taken alike.
    sweep: _Front = built(_Front, json.loads(json.dumps(front)), "it", unknown=[])
    if not sweep.objectives:
        raise ValueError("its objectives are empty; a sweep has one or more")
    return sweep


def _page_of(trial: _Trial) -> str:
    """Where the page of a trial lies; of several seeds that of the first."""
    seed = "" if trial.spread is None else "seed-0/"
    return f"{trial.folder}/{seed}artifacts/report.html"


def _aims(sweep: _Front) -> str:
    aims = [f"{name} ({'more' if way == 'max' else 'less'} is better)" for name, way in sweep.objectives.items()]
    told = f"Objectives: {', '.join(aims)}."
    if sweep.constraints:
        told += (
            f" Constraints: {', '.join(f'{name} within {number(limit)}' for name, limit in sweep.constraints.items())}."
        )
    return told + (f" Made from {sweep.base}." if sweep.base else "")


def _picture(sweep: _Front, up: str, across: str, alone: bool = False) -> Markup:
    """One objective over another: the front in color and joined by a line, the rest behind it."""
    usable = [
        trial
        for trial in sweep.trials
        if trial.status == "complete" and known(trial.values.get(up)) and known(trial.values.get(across))
    ]
    best = sorted((trial for trial in usable if trial.front), key=lambda trial: trial.values[across])[:_MOST_POINTS]
    others = [trial for trial in usable if not trial.front][: max(_MOST_POINTS - len(best), 0)]
    if not usable:
        return Markup()
    named = {trial.number for trial in best} | {trial.number for trial in others if len(usable) <= _NAMED_TOO}
    marks = [
        Point(
            trial.values[across],
            trial.values[up],
            f"{trial.number}" if trial.number in named else "",
            _described(trial, (up, across)),
            color=0 if trial.front else 1 if not trial.feasible else 2,
            full=trial.feasible,
            pale=not trial.front,
        )
        for trial in (*best, *others)
    ]
    edge = _edge(
        [(trial.values[across], trial.values[up]) for trial in best], sweep.objectives[across], sweep.objectives[up]
    )
    amounts = all(mark.x >= 0 for mark in marks)
    return scatter(
        marks,
        Side(across, plain_axis, zero=amounts and sweep.objectives[across] == "min", better=sweep.objectives[across]),
        Side(up, plain_axis, better=sweep.objectives[up]),
        [edge] if len(edge) > 1 else (),
        alone,
    )


def _edge(values: Sequence[tuple[float, float]], across: str, up: str) -> list[int]:
    """Number the values, which are sorted from left to right, that no other beats in both directions."""
    right = values if across == "min" else values[::-1]
    sign = 1 if up == "max" else -1
    edge, best = [], -math.inf
    # Among equals from the side, the one that is better upwards counts.
    for value in sorted(right, key=lambda one: (one[0] if across == "min" else -one[0], -sign * one[1])):
        if sign * value[1] > best:
            best = sign * value[1]
            edge.append(values.index(value))
    return sorted(edge)


def _described(trial: _Trial, names: Sequence[str]) -> str:
    values = ", ".join(f"{clipped(name, _LONGEST_VALUE)} {number(trial.values[name])}" for name in names)
    return f"trial {trial.number}{'' if trial.feasible else ', breaks a constraint'}: {values}"


def _trials(sweep: _Front) -> Markup:
    ranked = sorted(sweep.trials, key=lambda trial: _rank(trial, sweep))
    shown = ranked[: max(_MOST_TRIALS, sum(trial.front for trial in ranked[:_MOST_POINTS]))]
    objectives = list(sweep.objectives)
    settings = list(dict.fromkeys(name for trial in shown for name in trial.settings))[:12]
    limited = [name for name in sweep.constraints if name not in objectives]
    short = dict(zip(settings, _last_words(settings), strict=True))
    headers: list[object] = ["Trial", "State", *objectives, *limited, *short.values(), "Minutes", "Report", "Run"]
    cells = [
        [
            f"{trial.number}",
            _state(trial),
            *(_value(trial, name) for name in (*objectives, *limited)),
            *(_setting(trial.settings[name]) if name in trial.settings else ABSENT for name in settings),
            ABSENT if not known(trial.seconds) else f"{trial.seconds / 60:.1f}",
            file_link(_page_of(trial), "report") if trial.folder and trial.status == "complete" else ABSENT,
            link(trial.url, "run") if trial.url else ABSENT,
        ]
        for trial in shown
    ]
    marked = [number for number, trial in enumerate(shown) if trial.front]
    words = ("State", *short.values())
    left = len(ranked) - len(shown)
    return section(
        "All trials",
        table(headers, cells, "Trials, those on the front first", words, marked),
        quiet(f"{left:,} more trials are in {FRONT}.") if left else None,
        quiet(
            join(
                "Settings in full: ", ", ".join(f"{short[name]} is {name}" for name in settings if short[name] != name)
            )
        )
        if any(short[name] != name for name in settings)
        else None,
    )


def _rank(trial: _Trial, sweep: _Front) -> tuple[Any, ...]:
    first, way = next(iter(sweep.objectives.items()))
    value = trial.values.get(first)
    order = 0.0 if not known(value) else -value if way == "max" else value
    status = ("complete", "running", "stopped", "ended early", "failed").index(trial.status)
    return not trial.front, status, not trial.feasible, not known(value), order, trial.number


def _state(trial: _Trial) -> Markup:
    if trial.status == "failed":
        return state("bad", "failed", trial.reason)
    if trial.status == "ended early":
        return state("warn", "ended early", trial.reason)
    if trial.status in _UNFINISHED:
        return state("unknown", trial.status)
    if trial.front:
        return state("good", "front")
    return state("unknown", "beaten") if trial.feasible else state("warn", "breaks a constraint", trial.reason)


def _value(trial: _Trial, name: str) -> str:
    value, spread = {**trial.limited, **trial.values}.get(name), (trial.spread or {}).get(name)
    return f"{number(value)} ± {number(spread, 2)}" if known(value) and known(spread) else number(value)


def _setting(value: Any) -> str:
    words = number(value) if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return clipped(words, _LONGEST_VALUE)


def _last_words(names: Sequence[str]) -> list[str]:
    """Name settings by the ends of their paths, as far as that tells them apart: ``optimizer.lr`` is ``lr``."""
    ends = [name.rsplit(".", 1)[-1] for name in names]
    return [end if ends.count(end) == 1 else name for name, end in zip(names, ends, strict=True)]


def _failure(trial: _Trial) -> Markup:
    return join(tag("strong", f"trial {trial.number}: "), clipped(trial.reason or "no reason is known", 400))
