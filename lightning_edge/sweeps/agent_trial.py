"""One trial that somebody else chose: a `wandb agent` that runs our command line."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

from lightning_edge.errors import SweepError
from lightning_edge.sweeps.base import in_folder
from lightning_edge.sweeps.definition import Sweep
from lightning_edge.sweeps.fit import Fit, Runner, run_fit
from lightning_edge.sweeps.locks import take
from lightning_edge.sweeps.objectives import measure
from lightning_edge.sweeps.stop_early import with_stop
from lightning_edge.sweeps.tracking import as_trial, with_logger
from lightning_edge.sweeps.warm_start import beginning_from, common_start


def run_settings(
    sweep: Sweep, settings: Mapping[str, Any], folder: Path, stop: Event, runner: Runner = run_fit
) -> dict[str, float]:
    """Train settings in ``agent/<run>`` of a folder, logged to Weights & Biases, and give their figures.

    Args:
        sweep: The sweep.
        settings: Values by the names of the space.
        folder: The sweep's folder.
        stop: Is set when the training shall end.
        runner: What trains.

    Raises:
        TrialStoppedError: If ``stop_early`` ended it.
        TrialFailedError: If there is no report, or a figure is missing.
        InterruptedFitError: If ``stop`` was set.
        SweepError: If a training of that run is there already.
    """
    # The agent names the run.
    name = re.sub(r"[^\w-]", "-", os.environ.get("WANDB_RUN_ID") or f"run-{time.time_ns()}")
    place = folder / "agent" / name
    try:
        place.mkdir(parents=True)
    except OSError as error:
        raise SweepError(f"{place} cannot be made: {error.strerror}. Give another --folder") from error
    config = with_logger(
        with_stop(sweep.base.configuration(settings), sweep.definition.stop_early), sweep.definition.study
    )
    config = as_trial(in_folder(config, place.resolve()), settings, sweep.definition.study, name)
    if sweep.definition.warm_start is not None:
        start = common_start(sweep.definition.warm_start, sweep.base.config, folder, stop)
        config = beginning_from(config, start)
    lock = take(place / "lock")
    assert lock is not None  # the folder was made here
    try:
        report = runner(Fit(config, place.resolve(), lock.fileno(), stop, {}))
    finally:
        lock.close()
    return measure(report, sweep.figures)
