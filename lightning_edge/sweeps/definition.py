"""A sweep file: what is varied, what decides, how many trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from lightning_edge.errors import SweepError
from lightning_edge.sweeps import strict_yaml
from lightning_edge.sweeps.base import Base, Checker
from lightning_edge.sweeps.objectives import (
    Constraint,
    Direction,
    Figure,
    Objective,
    find_figures,
    read_constraints,
    read_objectives,
)
from lightning_edge.sweeps.samplers import SamplerName
from lightning_edge.sweeps.space import Dimension, combinations, count, read_space
from lightning_edge.sweeps.stop_early import StopEarly, read_stop_early

_KEYS = ("base", "space", "objectives", "constraints", "trials", "seeds", "sampler", "warm_start", "stop_early")
_REQUIRED = ("base", "space", "objectives")
RECIPE = "recipe:"


@dataclass(frozen=True)
class Definition:
    """What a sweep file says, before anything is known of its base.

    Attributes:
        study: Name of the study: that of the file, without its ending.
        text: The file.
        configs: What is varied: ``recipe:<name>`` or paths, later ones merged over earlier ones.
        space: The values of each setting.
        objectives: ``max`` or ``min`` by name of a figure.
        constraints: Largest values by name of a figure.
        trials: How many settings are trained.
        seeds: How often each of them is.
        sampler: What chooses them.
        warm_start: What every trial begins from: the path of a checkpoint, or epochs to train the float network for.
        stop_early: When a training is ended without files.
    """

    study: str
    text: str
    configs: tuple[str, ...]
    space: Mapping[str, Dimension]
    objectives: Mapping[str, Direction]
    constraints: Mapping[str, float]
    trials: int
    seeds: int
    sampler: SamplerName
    warm_start: str | int | None = None
    stop_early: StopEarly | None = None

    @property
    def base(self) -> str:
        """What is varied, as one text."""
        return " + ".join(self.configs)

    def identity(self) -> dict[str, str]:
        """Give what must stay the same for trials to belong to one study, each as text to compare."""
        parts: dict[str, Any] = {
            "base": self.base,
            "space": {key: dimension.plain() for key, dimension in self.space.items()},
            "objectives": dict(self.objectives),
            "constraints": dict(self.constraints),
            "seeds": self.seeds,
        }
        if self.warm_start is not None:
            # The file may have been beside the sweep file, and a copy of that is elsewhere.
            parts["warm_start"] = self.warm_start if isinstance(self.warm_start, int) else Path(self.warm_start).name
        return {name: json.dumps(part, sort_keys=True) for name, part in parts.items()}


@dataclass(frozen=True)
class Sweep:
    """A sweep that can be run: its file, and the configuration it varies.

    Attributes:
        definition: What the file says.
        base: The configuration.
        objectives: What decides, in the order of the file.
        constraints: What must be kept.
    """

    definition: Definition
    base: Base
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]

    @property
    def figures(self) -> list[Figure]:
        """All figures that a trial must give, each once."""
        found = [objective.figure for objective in self.objectives]
        found += [constraint.figure for constraint in self.constraints]
        return list({figure.name: figure for figure in found}.values())

    @property
    def trials(self) -> int:
        """How many settings are trained."""
        return len(self.grid()) if self.definition.sampler == "grid" else self.definition.trials

    def settings_key(self, settings: Mapping[str, Any]) -> str:
        """Give a text that is the same for settings that give the same configuration."""
        return json.dumps(self.base.configuration(settings), sort_keys=True, default=str)

    def grid(self) -> list[dict[str, Any]]:
        """Give the settings of a grid; of those that give the same configuration only the first."""
        return list(
            {
                self.settings_key(settings): settings for settings in reversed([*combinations(self.definition.space)])
            }.values()
        )[::-1]


def read_definition(path: Path) -> Definition:
    """Read a sweep file.

    Raises:
        SweepError: Naming the key, what was given and what is allowed.
    """
    return parse_definition(strict_yaml.read_text(path), path)


def parse_definition(text: str, path: Path) -> Definition:
    """Read the text of a sweep file.

    Args:
        text: The text.
        path: The file: its name is that of the study, and ``base`` may lie beside it.

    Raises:
        SweepError: Naming the key, what was given and what is allowed.
    """
    given = strict_yaml.load(text, str(path))
    if not isinstance(given, dict):
        told = "it is empty" if given is None else f"given {str(given)[:80]!r}"
        raise SweepError(f"{path}: {told}; allowed: a YAML file with the keys {', '.join(_KEYS)}")
    for key in given:
        if key not in _KEYS:
            close = get_close_matches(str(key), _KEYS, n=1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise SweepError(f"{key}: there is no such key in a sweep file.{meant} Allowed: {', '.join(_KEYS)}")
    for key in _REQUIRED:
        if key not in given:
            raise SweepError(f"{key}: it is missing; a sweep file needs {', '.join(_REQUIRED)}")
    space = read_space(given["space"])
    total = count(space)
    trials = strict_yaml.whole("trials", given.get("trials", 24 if total is None else total))
    return Definition(
        study=path.stem,
        text=text,
        configs=_configs(given["base"], path),
        space=space,
        objectives=read_objectives(given["objectives"]),
        constraints=read_constraints(given.get("constraints")),
        trials=trials,
        seeds=strict_yaml.whole("seeds", given.get("seeds", 1)),
        sampler=_sampler(given.get("sampler"), total, trials),
        warm_start=_warm_start(given.get("warm_start"), path),
        stop_early=None if given.get("stop_early") is None else read_stop_early(given["stop_early"]),
    )


def bind(definition: Definition, checker: Checker) -> Sweep:
    """Look a sweep's base up, and refuse what cannot go together with it before anything is trained.

    Args:
        definition: What the sweep file says.
        checker: What knows configurations.

    Raises:
        SweepError: If a setting or a figure does not exist there, or a value is not allowed.
    """
    base = Base(definition.base, checker.resolve(*definition.configs))
    base.check_keys(definition.space, definition.seeds)
    if isinstance(definition.warm_start, str) and not Path(definition.warm_start).is_file():
        raise SweepError(
            f"warm_start: there is no file {definition.warm_start!r}; give a checkpoint, or {{epochs: <number>}} to "
            "train the float network first"
        )
    deciding = list(definition.objectives)
    objectives = [
        Objective(figure, definition.objectives[figure.name])
        for figure in find_figures(deciding, deciding, base, "objectives")
    ]
    limited = find_figures(list(definition.constraints), deciding, base, "constraints")
    constraints = [Constraint(figure, definition.constraints[figure.name]) for figure in limited]
    sweep = Sweep(definition, base, tuple(objectives), tuple(constraints))
    _check_values(sweep, checker)
    return sweep


def _check_values(sweep: Sweep, checker: Checker) -> None:
    """Try every value alone; if that is refused, with the other settings at their first, then at their last.

    What two values refuse together is left to the trials: others of the two may do.
    """
    space = sweep.definition.space
    company: list[dict[str, Any]] = [{}]
    company += [{key: dimension.examples()[number] for key, dimension in space.items()} for number in (0, -1)]
    for key, dimension in space.items():
        for value in dimension.examples():
            refused: list[SweepError] = []
            for others in company:
                try:
                    checker.check(sweep.base.configuration({**others, key: value}))
                    break
                except SweepError as error:
                    refused.append(error)
            else:
                raise SweepError(f"space: {key}: {value!r} is not allowed: {refused[0]}") from refused[0]


def _configs(given: Any, path: Path) -> tuple[str, ...]:
    names = given if isinstance(given, list) else [given]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise SweepError(
            f"base: given {given!r}; allowed: recipe:<name>, or the path of a configuration, or a list of them"
        )
    return tuple(name if name.startswith(RECIPE) else _beside(name, path) for name in names)


def _beside(given: str, path: Path) -> str:
    """Find a file that a sweep file names: beside it, else in the current folder."""
    beside = path.parent / given
    return str(beside) if beside.is_file() else given


def _warm_start(given: Any, path: Path) -> str | int | None:
    if given is None:
        return None
    if isinstance(given, str) and given:
        return _beside(given, path)
    if isinstance(given, dict) and set(given) == {"epochs"}:
        return strict_yaml.whole("warm_start.epochs", given["epochs"])
    raise SweepError(f"warm_start: given {given!r}; allowed: the path of a checkpoint, or {{epochs: <number>}}")


def _sampler(given: Any, total: int | None, trials: int) -> SamplerName:
    allowed: tuple[SamplerName, ...] = get_args(SamplerName)
    if given is None:
        return "grid" if total is not None and total <= trials else "tpe"
    if given not in allowed:
        raise SweepError(f"sampler: given {given!r}; allowed: {', '.join(allowed)}")
    if given == "grid" and total is None:
        raise SweepError("sampler: a grid needs a list of values for every setting; list them, or take tpe")
    if given == "grid" and total is not None and total > trials:
        raise SweepError(f"sampler: the grid has {total:,} settings, and trials: {trials}; raise trials, or take tpe")
    chosen: SamplerName = given
    return chosen
