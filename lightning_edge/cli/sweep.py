"""The command that runs a sweep: `lightning-edge sweep FILE`."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_edge.cli.front import table
from lightning_edge.errors import EdgeError, check_installed
from lightning_edge.sweeps import strict_yaml
from lightning_edge.sweeps.agent_trial import run_settings
from lightning_edge.sweeps.definition import Sweep, bind, read_definition
from lightning_edge.sweeps.dry_run import cost, first_settings
from lightning_edge.sweeps.engine import Engine
from lightning_edge.sweeps.fit import InterruptedFitError
from lightning_edge.sweeps.objectives import TIMES
from lightning_edge.sweeps.page import write_page
from lightning_edge.sweeps.samplers import EXTRA
from lightning_edge.sweeps.study import Study
from lightning_edge.sweeps.tracking import as_trial, log_front, logger_of, with_logger
from lightning_edge.sweeps.wandb_agent import read_settings, wandb_config
from lightning_edge.sweeps.warm_start import beginning_from, common_start
from lightning_edge.wording import counted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lightning-edge sweep``.

    Args:
        arguments: Arguments behind ``sweep``.

    Returns:
        The status to exit with: 1 if the sweep ended with a failure, 2 for a mistake in the file or the arguments, 130
        or 143 if it was interrupted or terminated.
    """
    given = _parser().parse_args(arguments)
    try:
        check_installed("optuna", EXTRA)
        definition = read_definition(given.file)
        # LightningCLI takes seconds to import, and a mistake in the file needs none of it.
        from lightning_edge.cli.sweep_base import CommandLineChecker

        sweep = bind(definition, CommandLineChecker())
        if given.wandb:
            sweep = replace(sweep, base=replace(sweep.base, config=with_logger(sweep.base.config, definition.study)))
        if given.dry_run:
            return _dry_run(sweep, given.folder or Path("sweeps") / definition.study, given.workers)
        if given.wandb_config:
            print(strict_yaml.dump(wandb_config(sweep, given.file)), end="")
            return 0
        folder = given.folder or Path("sweeps") / definition.study
        if given.settings is not None:
            return _run_settings(sweep, read_settings(sweep, given.settings), folder)
        study = Study(sweep, folder, given.storage)
    except EdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return _run(sweep, study, given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-edge sweep",
        description="Train many settings of one configuration, and find the Pareto front of the files they export. "
        "Run the same command again to go on with a sweep that was stopped.",
    )
    parser.add_argument("file", type=Path, help="the sweep file, in YAML")
    parser.add_argument("--folder", type=Path, help="where trials and results go (default: sweeps/<name of the file>)")
    parser.add_argument("--workers", type=_workers, default=1, help="trials to train at once (default: 1)")
    parser.add_argument("--storage", help="a database that several machines share, such as postgresql://user@host/name")
    parser.add_argument("--retry-failed", action="store_true", help="train once more what failed")
    parser.add_argument("--wandb", action="store_true", help="log trials to Weights & Biases, if the base does not")
    parser.add_argument("--wandb-config", action="store_true", help="print a configuration for `wandb sweep`")
    parser.add_argument("--settings", metavar="JSON", help="train these settings only, as `wandb agent` asks for")
    parser.add_argument("--dry-run", action="store_true", help="print the trials and write nothing")
    return parser


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: a whole number from 1 on")
    return int(text)


def _dry_run(sweep: Sweep, folder: Path, workers: int) -> int:
    definition = sweep.definition
    settings = first_settings(definition, sweep)
    for number, values in enumerate(settings):
        print(f"{number:4}: {', '.join(f'{key}={value}' for key, value in values.items())}")
    trials = sweep.trials
    if definition.sampler != "grid":
        print(f"Examples: {definition.sampler} samples anew, and chooses later trials by what came of earlier ones.")
    each = f"{counted(trials, 'trial')} x {counted(definition.seeds, 'seed')}"
    print(f"{each} = {counted(trials * definition.seeds, 'fit')} of {definition.base}")
    if isinstance(definition.warm_start, int):
        print(f"and one training of the float network before them, for {counted(definition.warm_start, 'epoch')}")
    print(cost(sweep, folder, workers))
    return 0


def _run(sweep: Sweep, study: Study, given: argparse.Namespace) -> int:
    stop = threading.Event()
    name = sweep.definition.study
    start: Path | None = None

    def tell(line: str) -> None:
        print(line, flush=True)

    def decorate(config: dict[str, Any], settings: Mapping[str, Any], trial: str) -> dict[str, Any]:
        tracked = as_trial(config, settings, name, trial)
        return tracked if start is None else beginning_from(tracked, start)

    engine = Engine(sweep, study, given.workers, tell=tell, decorate=decorate, stop=stop)
    try:
        if given.retry_failed:
            print(f"trained once more: {counted(study.retry_failed(), 'failed trial')}")
        if study.base_changed:
            print(f"note: {sweep.base.name} has changed since the sweep began; earlier trials are of the earlier one")
        if timed := [figure.name for figure in sweep.figures if figure.field in TIMES and given.workers > 1]:
            others = counted(given.workers - 1, "other training")
            print(f"note: {timed[0]} is measured beside {others} on the same machine")
        with _stopped_by_signals(stop) as received:
            if sweep.definition.warm_start is not None:
                config = as_trial(sweep.base.config, {}, name, "float")
                start = common_start(sweep.definition.warm_start, config, study.folder, stop, tell)
            outcome = engine.run()
    except InterruptedFitError:
        print(f"stopped; nothing is lost. To go on: {_again()}")
        return 128 + (received[0] if received else signal.SIGINT)
    except EdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    Console().print(table(outcome.front))
    page = write_page(outcome.front, study.folder)
    print(f"{study.folder / 'front.json'} has all trials, {page} shows them")
    if (logger := logger_of(sweep.base.config)) is not None and not outcome.interrupted:
        address = log_front(outcome.front, logger, study.folder, study.identifier[:8])
        print(f"in Weights & Biases: {address or 'an offline run in the folder; send it with wandb sync'}")
    if outcome.interrupted:
        print(f"stopped; nothing is lost. To go on: {_again()}")
        return 128 + (received[0] if received else signal.SIGINT)
    if outcome.cause is not None:
        sys.stderr.write(
            f"error: the sweep ended because its trials fail for one cause: {outcome.cause}\n"
            f"  When it is mended: {_again()}{'' if given.retry_failed else ' --retry-failed'}\n"
        )
        return 1
    if not any(trial.status == "complete" for trial in outcome.front.trials):
        sys.stderr.write("error: no trial gave files; the reasons are above and in front.json\n")
        return 1
    return 0


def _run_settings(sweep: Sweep, settings: Mapping[str, Any], folder: Path) -> int:
    """Train one trial of a sweep of Weights & Biases, which keeps account of it."""
    stop = threading.Event()
    try:
        with _stopped_by_signals(stop) as received:
            values = run_settings(sweep, settings, folder, stop)
    except InterruptedFitError:
        return 128 + (received[0] if received else signal.SIGINT)
    except EdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for name, value in values.items():
        print(f"{name}: {value:g}")
    return 0


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[list[int]]:
    """Within this context Ctrl-C and SIGTERM set ``stop``; gives the signals that came."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if not stop.is_set():
            print("stopping: the trainings are told to end", flush=True)
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _again() -> str:
    """The command that this process was started by."""
    return shlex.join(["lightning-edge", *sys.argv[1:]])
