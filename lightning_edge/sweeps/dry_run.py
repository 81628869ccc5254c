"""What a sweep would train and take, without a study."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path
from typing import Any

from lightning_edge.errors import require
from lightning_edge.sweeps.definition import Definition, Sweep
from lightning_edge.sweeps.front import FILE, read_front
from lightning_edge.sweeps.progress import duration
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


def cost(sweep: Sweep, folder: Path, workers: int) -> str:
    """Say what a sweep takes: its epochs, and the time where some of its trials are done.

    Args:
        sweep: The sweep.
        folder: Its folder, if it has begun.
        workers: How many trials are trained at once.

    Raises:
        SweepError: If the folder's ``front.json`` is not what a sweep writes.
    """
    trials = sweep.trials
    told = []
    epochs = sweep.base.config["trainer"].get("max_epochs")
    if isinstance(epochs, int) and epochs > 0 and "trainer.max_epochs" not in sweep.definition.space:
        told.append(f"{trials * sweep.definition.seeds * epochs:,} epochs")
    known = read_front(folder).trials if (folder / FILE).is_file() else []
    done = [trial for trial in known if trial.status == "complete"]
    if done:
        left = max(trials - len(done), 0)
        seconds = statistics.fmean(trial.seconds for trial in done)
        told.append(
            f"{duration(seconds)} for each of the {len(done)} done, so about {duration(seconds * left / workers)} for "
            f"{left} more, {workers} at once"
        )
    else:
        told.append("the time is told after the first trial; --dry-run tells it, too, while the sweep runs")
    return f"cost: {'; '.join(told)}"
