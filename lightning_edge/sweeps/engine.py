"""Run a sweep: workers that take trials, train them, and record what came of them, until all are done."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from lightning_edge.cores import cores
from lightning_edge.errors import SweepError, first_line
from lightning_edge.sweeps.base import in_folder
from lightning_edge.sweeps.definition import Sweep
from lightning_edge.sweeps.fit import LOG, Fit, InterruptedFitError, Runner, run_address, run_fit, seconds_of
from lightning_edge.sweeps.front import Front
from lightning_edge.sweeps.objectives import (
    NoSuchFigureError,
    TrialFailedError,
    TrialStoppedError,
    measure,
    read_report,
)
from lightning_edge.sweeps.progress import progress_line, settings_line
from lightning_edge.sweeps.stop_early import with_stop
from lightning_edge.sweeps.storage import BEAT_S
from lightning_edge.sweeps.study import Claim, Result, Study, folder_name
from lightning_edge.wording import counted

# So many trials in a row that fail for the same cause end a sweep.
SAME_FAILURES = 3
_POLL_S = 1.0

# Adds to the configuration of one trial what tracks it: configuration, settings and name in, configuration out.
Decorate = Callable[[dict[str, Any], Mapping[str, Any], str], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended.

    Attributes:
        front: What came of it.
        cause: Why it ended before all trials were done, if it did.
        interrupted: Whether it was stopped from outside.
    """

    front: Front
    cause: str | None = None
    interrupted: bool = False


@final
@dataclass
class Engine:
    """One process's part in a sweep.

    Attributes:
        sweep: The sweep.
        study: Its study.
        workers: How many trials to train at once.
        runner: What trains.
        tell: Is called with a line of progress.
        decorate: Adds to a trial's configuration what tracks it.
        stop: Set it to stop everything; what was not finished is trained when the sweep runs again.
    """

    sweep: Sweep
    study: Study
    workers: int = 1
    runner: Runner = run_fit
    tell: Callable[[str], None] = print
    decorate: Decorate | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, Claim] = {}
        # What this process began and did not finish; in the study it runs until somebody takes it on.
        self._stopped: set[int] = set()
        self._cause: str | None = None
        self._failures: list[str] = []
        self._error: BaseException | None = None
        self._waits = False
        self._trials = self.sweep.trials

    def run(self) -> Outcome:
        """Train until all trials are done, ``stop`` is set or the same failure comes again and again.

        Raises:
            EdgeError: If the study or the folder cannot be written any more.
        """
        ended = threading.Event()
        beats = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        threads = [threading.Thread(target=self._guarded, daemon=True) for _ in range(self.workers)]
        self._write()
        for thread in (beats, *threads):
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    # Short, so that signals are seen.
                    thread.join(0.2)
        finally:
            interrupted = self.stop.is_set() and self._cause is None and self._error is None
            self.stop.set()
            for thread in threads:
                thread.join()
            ended.set()
            beats.join()
        if self._error is not None:
            raise self._error
        return Outcome(self._write(), self._cause, interrupted)

    def _guarded(self) -> None:
        """Work; whatever goes wrong outside of a trial ends all workers, and is raised where they were started."""
        try:
            self._work()
        except BaseException as error:
            if type(error).__module__.partition(".")[0] in ("optuna", "sqlalchemy"):
                told = f"the storage of the study does not answer any more: {first_line(error)}"
                error = SweepError(f"{told}. When it does, run the sweep again: it goes on where it was")
            self._error = self._error or error
            self.stop.set()

    def _work(self) -> None:
        while not self.stop.is_set():
            claim = self.study.claim()
            if claim is not None:
                try:
                    self._train(claim)
                finally:
                    claim.lock.close()
                    with self._lock:
                        self._running.pop(claim.number, None)
                continue
            with self._lock:
                own = len(self._running)
            others = self.study.unfinished() - own
            if others <= 0:
                return
            if not self._waits and own == 0:
                self._waits = True
                self.tell(f"waiting for {counted(others, 'trial')} that other workers train")
            self.stop.wait(_POLL_S)

    def _train(self, claim: Claim) -> None:
        with self._lock:
            self._running[claim.number] = claim
        again = " again, for its worker is gone" if claim.resumed else ""
        self.tell(f"trial {claim.number} begins{again}: {settings_line(claim.settings)}")
        begun = time.monotonic()
        reason: str | None = None
        hopeless = False
        try:
            values, spread, earlier_s = self._measure(claim)
            url = run_address(self._folders(claim)[0])
            result = Result(values, spread, time.monotonic() - begun + earlier_s, url)
            if not self.study.complete(claim, result):
                self.tell(f"trial {claim.number} was given to another machine, for this one had not been heard of")
                return
        except InterruptedFitError:
            self._stopped.add(claim.number)
            return
        except (TrialFailedError, NoSuchFigureError) as error:
            reason, hopeless = str(error), isinstance(error, NoSuchFigureError)
            if self.stop.is_set():  # it was stopped by the same signal as this process
                self._stopped.add(claim.number)
                return
            self.study.fail(claim, reason, time.monotonic() - begun, run_address(self._folders(claim)[0]))
        except TrialStoppedError as error:
            self.study.stop(claim, str(error), time.monotonic() - begun, run_address(self._folders(claim)[0]))
            self.tell(f"trial {claim.number} is ended early: {error}")
        with self._lock:
            self._running.pop(claim.number, None)
            self._judge(claim, reason, hopeless)
            front = self._write()
            self.tell(progress_line(front, self._trials, claim.number, self.workers))

    def _measure(self, claim: Claim) -> tuple[dict[str, float], dict[str, float] | None, float]:
        """Train with each seed, and give the means of the figures, their spread, and the seconds of what was there."""
        base, figures = self.sweep.base, self.sweep.figures
        seeds = self.sweep.definition.seeds
        config = with_stop(base.configuration(claim.settings), self.sweep.definition.stop_early)
        found, earlier_s = [], 0.0
        for index, folder in enumerate(self._folders(claim)):
            seed = None if seeds == 1 else base.seed + index
            placed = in_folder(config, folder.resolve(), seed)
            if self.decorate is not None:
                name = folder_name(claim.number) + ("" if seeds == 1 else f"-seed-{seed}")
                placed = self.decorate(placed, claim.settings, name)
            fit = Fit(placed, folder.resolve(), claim.lock.fileno(), self.stop, self._environment())
            if claim.resumed and fit.report_path.exists():
                # Its worker was gone, the training itself was not.
                report: Mapping[str, Any] = read_report(fit.report_path)
                earlier_s += seconds_of(fit)
            else:
                _clear(folder)
                report = self.runner(fit)
            found.append(measure(report, figures))
        means = {figure.name: statistics.fmean(values[figure.name] for values in found) for figure in figures}
        if seeds == 1:
            return means, None, earlier_s
        names = [objective.figure.name for objective in self.sweep.objectives]
        return means, {name: statistics.stdev(values[name] for values in found) for name in names}, earlier_s

    def _environment(self) -> dict[str, str]:
        """Share the cores among trainings at once, each of which would take all of them."""
        if self.workers == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, cores() // self.workers))}

    def _folders(self, claim: Claim) -> list[Path]:
        seeds = self.sweep.definition.seeds
        return [claim.folder] if seeds == 1 else [claim.folder / f"seed-{index}" for index in range(seeds)]

    def _judge(self, claim: Claim, reason: str | None, hopeless: bool) -> None:
        """Remember failures of a cause, and end the sweep where another trial would only fail again."""
        if reason is None:
            self._failures.clear()
            return
        self.tell(f"trial {claim.number} failed: {reason} ({claim.folder / LOG})")
        # Numbers differ between trials of one cause.
        self._failures.append(re.sub(r"\d+(\.\d+)?", "#", reason))
        same = self._failures[-SAME_FAILURES:]
        if hopeless or (len(same) == SAME_FAILURES and len(set(same)) == 1):
            self._cause = self._cause or reason
            self.stop.set()

    def _write(self) -> Front:
        definition = self.sweep.definition
        records = [
            replace(trial, status="stopped") if trial.status == "running" and trial.number in self._stopped else trial
            for trial in self.study.records()
        ]
        front = Front(definition.study, definition.objectives, definition.constraints, definition.base, records)
        front.write(self.study.folder)
        return front

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_S):
            with self._lock:
                numbers = list(self._running)
            for number in numbers:
                try:
                    self.study.beat(number)
                except Exception as error:  # of the database; the next call that matters will say it
                    self.tell(f"the storage does not answer: {type(error).__name__}")


def _clear(folder: Path) -> None:
    """Empty a trial's folder of what an earlier attempt left there, but for the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()
    except OSError as error:
        raise SweepError(f"{folder} cannot be emptied: {error}") from error
