"""The files of a trial that was chosen from a front."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_edge.errors import SweepError
from lightning_edge.files import StagedPath, writing
from lightning_edge.sweeps import strict_yaml
from lightning_edge.sweeps.base import ARTIFACTS, in_folder
from lightning_edge.sweeps.fit import CONFIG, REPORT
from lightning_edge.sweeps.front import Front, TrialRecord
from lightning_edge.sweeps.objectives import figure_of, measure, read_report


def training_folder(front: Front, folder: Path, trial: TrialRecord) -> Path:
    """Find where a trial was trained; of several seeds, the best in the first objective.

    Args:
        front: The sweep.
        folder: Its folder.
        trial: The trial.

    Raises:
        SweepError: If its files are not on this machine.
    """
    own = folder / trial.folder
    found = [path for path in (own, *sorted(own.glob("seed-*"))) if (path / ARTIFACTS / REPORT).is_file()]
    if not found:
        raise SweepError(f"{own} has no {ARTIFACTS}/{REPORT}; the machine that trained the trial has its files")
    if len(found) == 1:
        return found[0]
    name, direction = next(iter(front.objectives.items()))
    targets = [other.partition(".")[0] for other in front.objectives if "." in other]
    figure = figure_of(name, targets[0])

    def value(path: Path) -> float:
        return measure(read_report(path / ARTIFACTS / REPORT), [figure])[name]

    return max(found, key=value) if direction == "max" else min(found, key=value)


def copy_files(training: Path, to: Path) -> None:
    """Copy the files and the report of a training into a new folder, whole or not at all.

    Beside them comes ``config.yaml``, which trains into that folder and leaves the sweep as it is.

    Args:
        training: The folder of the training.
        to: The new folder.

    Raises:
        SweepError: If the folder exists.
        EdgeError: If it cannot be written.
    """
    if to.exists():
        raise SweepError(f"--to: {to} exists already; give a new folder")
    text = strict_yaml.read_text(training / CONFIG)
    place = StagedPath(to)
    try:
        with writing(to):
            shutil.copytree(training / ARTIFACTS, place.staged)
            config = in_folder(strict_yaml.load(text, str(training / CONFIG)), (to / "training").resolve())
            (place.staged / CONFIG).write_text(strict_yaml.dump(config), encoding="utf-8")
        place.accept()
    finally:
        place.discard()
