"""The result of a sweep: its trials, the Pareto front among them, and the best one under a condition."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lightning_edge.condition import Condition
from lightning_edge.errors import SweepError
from lightning_edge.files import replace_text
from lightning_edge.sweeps.objectives import Direction

FILE = "front.json"
Status = Literal["complete", "ended early", "failed", "running", "stopped"]
_MOST_BYTES = 256_000_000


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: Its number in the study.
        status: ``"complete"``, ``"ended early"`` by ``stop_early``, ``"failed"``, ``"running"``, or ``"stopped"``: it
            begins anew when the sweep goes on.
        settings: Its values by the names of the space.
        values: Its objectives; the mean over seeds, if there are several.
        spread: Their standard deviation over seeds; ``None`` for one seed.
        feasible: Whether it is complete and keeps all constraints.
        front: Whether no feasible trial is at least as good in everything and better in something.
        folder: Its folder within that of the sweep.
        reason: Why it was ended early or failed.
        seconds: How long it took, or has taken.
        url: Where its run of Weights & Biases is.
        limited: The figures that have constraints, by name.
    """

    number: int
    status: Status
    settings: Mapping[str, Any]
    values: Mapping[str, float]
    spread: Mapping[str, float] | None
    feasible: bool
    front: bool
    folder: str
    reason: str | None
    seconds: float
    url: str | None = None
    limited: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Front:
    """A sweep's trials, as in ``front.json``.

    Attributes:
        study: Name of the study.
        objectives: ``max`` or ``min`` by name; the first one decides where one trial must be chosen.
        constraints: Largest values by name.
        base: What was varied.
        trials: All trials, in order.
    """

    study: str
    objectives: Mapping[str, Direction]
    constraints: Mapping[str, float]
    base: str
    trials: Sequence[TrialRecord] = field(default_factory=tuple)

    @property
    def front(self) -> list[TrialRecord]:
        """The trials on the Pareto front, the best in the first objective first."""
        return sorted((trial for trial in self.trials if trial.front), key=self._rank)

    @property
    def breaking(self) -> list[TrialRecord]:
        """The complete trials that break a constraint, the best in the first objective first."""
        found = (trial for trial in self.trials if trial.status == "complete" and not trial.feasible)
        return sorted(found, key=self._rank)

    def best(self, condition: Condition | None = None) -> TrialRecord:
        """Choose the feasible trial that is best in the first objective.

        Args:
            condition: What it must keep, too.

        Raises:
            SweepError: If there is none, or the condition names no objective.
        """
        if condition is not None and condition.name not in self.objectives:
            known = ", ".join(self.objectives)
            raise SweepError(f"--best: {condition.name!r} is no objective of this sweep; allowed: {known}")
        feasible = [trial for trial in self.trials if trial.feasible]
        if not feasible:
            raise SweepError(
                f"no trial of {self.study} is complete and keeps the constraints, so there is none to choose"
            )
        found = [trial for trial in feasible if condition is None or condition.holds(trial.values[condition.name])]
        if not found and condition is not None:
            values = [trial.values[condition.name] for trial in feasible]
            raise SweepError(
                f"--best: no feasible trial has {condition}; {condition.name} is {min(values):g} to {max(values):g}"
            )
        return min(found, key=self._rank)

    def write(self, folder: Path) -> Path:
        """Write ``front.json`` into a folder, whole or not at all.

        Raises:
            EdgeError: If it cannot be written.
        """
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return replace_text(folder / FILE, text)

    def _rank(self, trial: TrialRecord) -> tuple[float, ...]:
        return (*_costs(trial, self.objectives), trial.number)


def with_front(trials: Sequence[TrialRecord], objectives: Mapping[str, Direction]) -> list[TrialRecord]:
    """Mark the trials that are on the Pareto front of the feasible ones."""
    costs = {trial.number: _costs(trial, objectives) for trial in trials if trial.feasible}

    def is_beaten(own: tuple[float, ...]) -> bool:
        return any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in costs.values())

    return [replace(trial, front=trial.feasible and not is_beaten(costs[trial.number])) for trial in trials]


def read_front(folder: Path) -> Front:
    """Read ``front.json`` of a sweep's folder.

    Raises:
        SweepError: If there is none, or it is not what a sweep writes.
    """
    path = folder / FILE
    if not path.is_file():
        raise SweepError(f"{folder} has no {FILE}; give the folder of a sweep that has begun")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise SweepError(f"{path}: {path.stat().st_size:,} bytes; at most {_MOST_BYTES:,} are read")
        given = json.loads(path.read_text(encoding="utf-8"))
        trials = [TrialRecord(**trial) for trial in given.pop("trials")]
        front = Front(**given, trials=trials)
        for trial in trials:
            _check(trial, front.objectives)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SweepError(f"{path} is not what lightning-edge sweep writes: {error}") from error
    return front


def _check(trial: TrialRecord, objectives: Mapping[str, Direction]) -> None:
    if re.fullmatch(r"trial-\d{4,}", trial.folder) is None:
        raise ValueError(f"the folder {trial.folder!r} is none of a trial")
    if trial.feasible:
        for name in objectives:
            float(trial.values[name])


def _costs(trial: TrialRecord, objectives: Mapping[str, Direction]) -> tuple[float, ...]:
    """Give the objectives so that less is better."""
    return tuple(
        -trial.values[name] if direction == "max" else trial.values[name] for name, direction in objectives.items()
    )
