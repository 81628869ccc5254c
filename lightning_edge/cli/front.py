"""The command that shows what came of a sweep and takes the best file out of it: `lightning-edge front FOLDER`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_edge.condition import Condition, read_condition
from lightning_edge.errors import EdgeError, SweepError
from lightning_edge.sweeps.base import ARTIFACTS
from lightning_edge.sweeps.chosen import copy_files, training_folder
from lightning_edge.sweeps.fit import CONFIG
from lightning_edge.sweeps.front import Front, TrialRecord, read_front

# So many trials that break a constraint are listed behind the front.
_MOST_BREAKING = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lightning-edge front``.

    Args:
        arguments: Arguments behind ``front``.

    Returns:
        The status to exit with: 2 if there is no such sweep, or no trial of it is what was asked for.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-edge front", description="Show the Pareto front of a sweep, and take the best files out of it."
    )
    parser.add_argument("folder", type=Path, help="the folder of the sweep")
    parser.add_argument(
        "--best",
        metavar="CONDITION",
        help="choose the feasible trial with the best first objective under a condition: 'tflite.size_bytes < 60000'",
    )
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="with --best: copy its files and report into this new folder"
    )
    given = parser.parse_args(arguments)
    try:
        if given.to is not None and given.best is None:
            raise SweepError("--to: which trial? Give a --best with it, such as --best 'tflite.size_bytes < 60000'")
        condition = None if given.best is None else _condition(given.best)
        front = read_front(given.folder)
        if condition is None:
            Console().print(table(front))
            return 0
        best = front.best(condition)
        training = training_folder(front, given.folder, best)
        if given.to is not None:
            copy_files(training, given.to)
    except EdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    Console().print(table(front, [best]))
    if given.to is None:
        print(f"Its files: {training / ARTIFACTS}. To take them out: --to FOLDER")
    else:
        print(f"Its files: {given.to}")
        _print_how_to_go_on(training, given.to)
    return 0


def _condition(text: str) -> Condition:
    try:
        return read_condition(text)
    except ValueError as error:
        raise SweepError(f"--best: {error}") from None


def table(front: Front, trials: Sequence[TrialRecord] | None = None) -> Table:
    """Lay trials out: if none are given, those of the front, and behind them those that break a constraint, marked.

    Args:
        front: The sweep.
        trials: Which of its trials.
    """
    breaking = front.breaking if trials is None else []
    shown = [*front.front, *breaking[:_MOST_BREAKING]] if trials is None else trials
    counts = Counter(trial.status for trial in front.trials)
    told = [f"{counts[status]} {status}" for status in ("complete", "failed")]
    told += [f"{counts[status]} {status}" for status in ("ended early", "running", "stopped") if counts[status]]
    laid = Table(title=f"{front.study}: {', '.join(told)}, {len(front.front)} on the front", title_justify="left")
    settings = list(dict.fromkeys(key for trial in shown for key in trial.settings))
    laid.add_column("trial", justify="right")
    for name, direction in front.objectives.items():
        laid.add_column(Text(f"{name} ({direction})"), justify="right", overflow="fold")
    if breaking:
        laid.add_column("breaks", overflow="fold")
    for key in settings:
        laid.add_column(Text(key), overflow="fold")
    for trial in shown:
        values: list[Text | str] = [_with_spread(trial, name) for name in front.objectives]
        values += [_broken(front, trial)] if breaking else []
        laid.add_row(str(trial.number), *values, *(_short(trial.settings.get(key)) for key in settings))
    if len(breaking) > _MOST_BREAKING:
        laid.caption = f"{len(breaking) - _MOST_BREAKING} more trials break a constraint; front.json has them"
    return laid


def _broken(front: Front, trial: TrialRecord) -> Text:
    """Which constraints a trial breaks, and by what."""
    if trial.feasible:
        return Text("")
    over = [
        f"{name} {_short(trial.limited[name])} > {limit:g}"
        for name, limit in front.constraints.items()
        if trial.limited.get(name, limit) > limit
    ]
    return Text(", ".join(over) or "a constraint", style="yellow")


def _with_spread(trial: TrialRecord, name: str) -> str:
    if name not in trial.values:
        return "-"
    spread = "" if trial.spread is None else f" ± {trial.spread[name]:.2g}"
    return f"{_short(trial.values[name])}{spread}"


def _short(value: object) -> Text | str:
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) >= 100 else f"{value:.4g}"
    return Text("-" if value is None else str(value))


def _print_how_to_go_on(training: Path, to: Path) -> None:
    fit = ["lightning-edge", "fit", "--config", str(to / CONFIG)]
    print(f"To train it again: {shlex.join(fit)}")
    checkpoints = sorted(training.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if checkpoints:
        print(
            f"To train on from it: {shlex.join([*fit, '--ckpt_path', str(checkpoints[-1])])} --trainer.max_epochs MORE"
        )
