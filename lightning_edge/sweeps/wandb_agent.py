"""W&B's own sweeps: the configuration that `wandb sweep` takes, so that `wandb agent` runs our command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_edge.errors import SweepError
from lightning_edge.sweeps.definition import Sweep
from lightning_edge.sweeps.objectives import LOGGED, Figure
from lightning_edge.sweeps.samplers import to_settings
from lightning_edge.sweeps.space import Choices, Dimension

_METHODS = {"grid": "grid", "random": "random"}


def wandb_config(sweep: Sweep, file: Path) -> dict[str, Any]:
    """Give the configuration of a W&B sweep over the same space.

    W&B decides by one metric: the first objective. Constraints it has none.

    Args:
        sweep: The sweep.
        file: Its file, as the machines that run agents find it.
    """
    definition = sweep.definition
    first = sweep.objectives[0]
    config: dict[str, Any] = {
        "name": definition.study,
        "program": "lightning_edge.cli",
        "method": _METHODS.get(definition.sampler, "bayes"),
        "metric": {
            "name": logged_name(first.figure, sweep.base.makes_int8),
            "goal": f"{first.direction}imize",
        },
        "parameters": {key: _parameter(dimension) for key, dimension in definition.space.items()},
        # One item for each word: an agent does not split them.
        "command": [
            *("${env}", "${interpreter}", "-m", "${program}"),
            *("sweep", str(file), "--settings", "${args_json}"),
        ],
    }
    if definition.sampler != "grid":
        config["run_cap"] = definition.trials
    return config


def logged_name(figure: Figure, int8: bool = True) -> str:
    """Name a figure as `DeviceEvaluationCallback` logs it."""
    prefix = "" if int8 else "fp32_"
    return f"edge/{figure.target}/{prefix}{LOGGED.get(figure.field, figure.field)}"


def read_settings(sweep: Sweep, text: str) -> dict[str, Any]:
    """Read the settings that an agent gives, as JSON.

    Args:
        sweep: The sweep.
        text: Values by the names of the space; lists and mappings as W&B stores them, in JSON of their own.

    Raises:
        SweepError: If they are not all of the settings of the space, or a value is not in it.
    """
    space = sweep.definition.space
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SweepError(f"--settings: given {text[:200]!r}, which is no JSON: {error}") from error
    if not isinstance(given, dict) or set(given) != set(space):
        raise SweepError(f"--settings: given {text[:200]!r}; allowed: a JSON object with the keys {', '.join(space)}")
    for key, dimension in space.items():
        if not _holds(dimension, given[key]):
            raise SweepError(f"--settings: {key}: given {given[key]!r}; allowed: {space[key].plain()}")
    return to_settings(space, given)


def _holds(dimension: Dimension, value: Any) -> bool:
    if isinstance(dimension, Choices):
        return isinstance(value, str | int | float | None) and value in dimension.labels()
    number = isinstance(value, int if dimension.whole else int | float) and not isinstance(value, bool)
    return number and dimension.low <= value <= dimension.high


def _parameter(dimension: Dimension) -> dict[str, Any]:
    if isinstance(dimension, Choices):
        return {"values": list(dimension.labels())}
    whole = dimension.whole
    bounds: dict[str, Any] = {"min": dimension.low, "max": dimension.high}
    if dimension.log:
        return {"distribution": "log_uniform_values", **bounds}
    if dimension.step is not None:
        return {"distribution": "q_uniform", **bounds, "q": dimension.step}
    return {"distribution": "int_uniform" if whole else "uniform", **bounds}
