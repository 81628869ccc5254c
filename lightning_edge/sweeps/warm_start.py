"""The common start of a sweep's trials: a float network that is trained once, or a checkpoint that is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

from lightning_edge.sweeps.base import in_folder, with_callback, without_edge_callbacks
from lightning_edge.sweeps.fit import LOG, Fit, InterruptedFitError, tail, train, why_it_failed
from lightning_edge.sweeps.locks import take
from lightning_edge.sweeps.objectives import TrialFailedError
from lightning_edge.wording import counted

FOLDER, CHECKPOINT = "warm-start", "float.ckpt"
# What the training itself writes; it is moved when that has ended well.
_WRITTEN = "training.ckpt"
_POLL_S = 1.0

# What trains: takes a training, and gives the status of its process.
Train = Callable[[Fit], int]


def common_start(
    warm_start: str | int,
    config: Mapping[str, Any],
    folder: Path,
    stop: Event,
    tell: Callable[[str], None] = print,
    training: Train = train,
) -> Path:
    """Give the checkpoint that all trials of a sweep begin from; train it where it is asked for and not there.

    Of several processes that share a folder one trains, and the others wait for it.

    Args:
        warm_start: As `Definition.warm_start`.
        config: The complete configuration of the sweep's base, which is trained without its compression.
        folder: The sweep's folder.
        stop: Is set when the training shall end.
        tell: Is called with a line of progress.
        training: What trains.

    Returns:
        The checkpoint; of a training, that of its last epoch.

    Raises:
        TrialFailedError: If the training fails.
        InterruptedFitError: If ``stop`` was set.
        SweepError: If the folder cannot be written to.
    """
    if isinstance(warm_start, str):
        return Path(warm_start).resolve()
    place = (folder / FOLDER).resolve()
    place.mkdir(parents=True, exist_ok=True)
    found = place / CHECKPOINT
    while (lock := take(place / "lock")) is None:
        if stop.wait(_POLL_S):
            raise InterruptedFitError("it was stopped")
    try:
        if not found.exists():
            tell(f"the float network is trained once, for {counted(warm_start, 'epoch')}, for all trials to begin from")
            status = training(Fit(_configuration(config, warm_start, place), place, lock.fileno(), stop, {}))
            written = place / _WRITTEN
            if status != 0 or not written.exists():
                reason = why_it_failed(status, tail(place / LOG)) if status else "it wrote no checkpoint"
                raise TrialFailedError(f"the float network could not be trained: {reason} ({place / LOG})")
            os.replace(written, found)
    finally:
        lock.close()
    return found


def beginning_from(config: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Give a configuration whose training begins with the weights of a checkpoint."""
    return with_callback(config, "lightning_edge.WarmStart", {"checkpoint": str(checkpoint)}, first=True)


def _configuration(config: Mapping[str, Any], epochs: int, folder: Path) -> dict[str, Any]:
    alone = without_edge_callbacks(in_folder(config, folder))
    trainer = alone["trainer"]
    # A base may keep no checkpoints of its own; this one is wanted.
    trainer |= {"max_epochs": epochs, "max_steps": -1, "enable_checkpointing": True}
    arguments = {
        "dirpath": str(folder),
        "filename": Path(_WRITTEN).stem,
        "enable_version_counter": False,
        # Lightning refuses two that look the same to it; one of the user's is not likely to have this.
        "every_n_epochs": epochs,
        "save_on_train_epoch_end": True,
    }
    return with_callback(alone, "lightning.pytorch.callbacks.ModelCheckpoint", arguments)
