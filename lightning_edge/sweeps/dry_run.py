"""What a sweep would train, without a study."""

from __future__ import annotations

import logging
from typing import Any

from lightning_edge.errors import require
from lightning_edge.sweeps.definition import Definition, Sweep
from lightning_edge.sweeps.samplers import EXTRA, distributions, sampler, to_settings

_EXAMPLES = 10


def first_settings(definition: Definition, sweep: Sweep) -> list[dict[str, Any]]:
    """Give the settings of a grid, or some of the first that a sampler may choose."""
    if definition.sampler == "grid":
        return sweep.grid()
    optuna = require("optuna", EXTRA)
    optuna.logging.set_verbosity(logging.WARNING)
    study = optuna.create_study(
        directions=["minimize"] * len(definition.objectives), sampler=sampler(definition.sampler, definition.trials)
    )
    asked = [study.ask(distributions(definition.space)) for _ in range(min(_EXAMPLES, definition.trials))]
    return [to_settings(definition.space, trial.params) for trial in asked]
