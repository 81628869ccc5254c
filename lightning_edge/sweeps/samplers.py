"""What chooses the settings of the next trial: Optuna's samplers, and its distributions of a space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from lightning_edge.errors import require
from lightning_edge.sweeps.space import Choices, Dimension

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

SamplerName = Literal["grid", "random", "tpe", "gp", "nsga2"]
EXTRA = "sweep"


def sampler(name: SamplerName, trials: int) -> BaseSampler:
    """Make a sampler.

    Args:
        name: Which one. A grid is listed before the sweep begins, so that nothing is left to sample.
        trials: How many trials there will be.
    """
    samplers = require("optuna.samplers", EXTRA)
    made: BaseSampler
    if name == "tpe":
        made = samplers.TPESampler()
    elif name == "gp":
        made = samplers.GPSampler()
    elif name == "nsga2":
        # Optuna's 50 would be random for as many trials as most sweeps have.
        made = samplers.NSGAIISampler(population_size=max(4, min(50, trials // 4)))
    else:
        made = samplers.RandomSampler()
    return made


def distributions(space: Mapping[str, Dimension]) -> dict[str, BaseDistribution]:
    """Give Optuna's distribution of each setting; choices are stored by their labels."""
    kinds = require("optuna.distributions", EXTRA)
    found: dict[str, BaseDistribution] = {}
    for key, dimension in space.items():
        if isinstance(dimension, Choices):
            found[key] = kinds.CategoricalDistribution(list(dimension.labels()))
        elif dimension.whole:
            found[key] = kinds.IntDistribution(dimension.low, dimension.high, dimension.log, dimension.step or 1)
        else:
            found[key] = kinds.FloatDistribution(dimension.low, dimension.high, dimension.log, dimension.step)
    return found


def to_settings(space: Mapping[str, Dimension], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Give the values that a study's parameters stand for, in the order of the space."""
    found = {}
    for key, dimension in space.items():
        if key in stored:
            found[key] = dimension.labels()[stored[key]] if isinstance(dimension, Choices) else stored[key]
    return found


def to_stored(space: Mapping[str, Dimension], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give the parameters of a study that stand for values."""
    found = {}
    for key, value in settings.items():
        dimension = space[key]
        if isinstance(dimension, Choices):
            value = next(label for label, choice in dimension.labels().items() if choice == value)
        found[key] = value
    return found
