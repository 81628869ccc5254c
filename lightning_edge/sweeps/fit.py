"""One training of a sweep: `lightning-edge fit` in a process group of its own, its output in a file."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_edge.errors import HOPELESS, SweepError
from lightning_edge.files import replace_text
from lightning_edge.sweeps import strict_yaml
from lightning_edge.sweeps.base import ARTIFACTS
from lightning_edge.sweeps.objectives import TrialFailedError, TrialStoppedError, read_report

CONFIG, LOG, REPORT = "config.yaml", "log.txt", "report.json"
_POLL_S = 0.5
# How long a training may take to end by itself when it is told to.
_PATIENCE_S = 15
_TAIL_BYTES = 64_000
_MOST_CHARACTERS = 500
_URL = re.compile(r"https?://\S+/runs/[\w-]+")
_COLOR = re.compile(r"\x1b\[[\d;]*m")


class InterruptedFitError(SweepError):
    """A training was stopped from outside."""


@dataclass(frozen=True)
class Fit:
    """A training to run.

    Attributes:
        config: Its complete configuration, which writes into ``folder`` only.
        folder: Its folder.
        keep_open: Descriptor of a lock that the training holds, too; it ends with the last process that has it.
        stop: Is set when the training shall end.
        environment: What to add to the environment.
    """

    config: Mapping[str, Any]
    folder: Path
    keep_open: int
    stop: threading.Event
    environment: Mapping[str, str]

    @property
    def report_path(self) -> Path:
        """Where the report will be."""
        return self.folder / ARTIFACTS / REPORT


# What trains: takes a training and gives its report, as `report.json` has it.
Runner = Callable[[Fit], Mapping[str, Any]]


def run_fit(fit: Fit) -> Mapping[str, Any]:
    """Train, and give the report.

    Raises:
        TrialStoppedError: If ``stop_early`` ended it.
        TrialFailedError: If there is no report; with what the training said last.
        InterruptedFitError: If ``stop`` was set.
    """
    status = train(fit)
    if status == HOPELESS:
        raise TrialStoppedError(why_it_failed(status, tail(fit.folder / LOG)))
    if not fit.report_path.exists():
        raise TrialFailedError(why_it_failed(status, tail(fit.folder / LOG)))
    # A report is written when all files are measured; one target that failed does not spoil the others.
    return read_report(fit.report_path)


def train(fit: Fit) -> int:
    """Train, and give the status of the process: below zero, the signal that ended it.

    Raises:
        InterruptedFitError: If ``stop`` was set.
    """
    fit.folder.mkdir(parents=True, exist_ok=True)
    config = replace_text(fit.folder / CONFIG, strict_yaml.dump(fit.config))
    command = [sys.executable, *_safe_path(), "-m", "lightning_edge.cli", "fit", "--config", str(config)]
    with (fit.folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **fit.environment},
            start_new_session=True,
            pass_fds=(fit.keep_open,),
        )
        try:
            while process.poll() is None:
                if fit.stop.wait(_POLL_S if process.returncode is None else 0):
                    raise InterruptedFitError("it was stopped")
        finally:
            end(process)
    return process.returncode


def seconds_of(fit: Fit) -> float:
    """Tell how long a training took that nobody watched: from its configuration to its report."""
    config = fit.folder / CONFIG
    return max(0.0, fit.report_path.stat().st_mtime - config.stat().st_mtime) if config.exists() else 0.0


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group, first by asking."""
    for number, patience_s in ((signal.SIGTERM, _PATIENCE_S), (signal.SIGKILL, _PATIENCE_S)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue


def why_it_failed(status: int, said: str) -> str:
    """Give the cause of a training that ended without a report: its error, or the signal that ended it."""
    if status < 0:
        name = signal.Signals(-status).name if -status in signal.valid_signals() else str(-status)
        hint = "; often there was no memory left" if -status == signal.SIGKILL else ""
        return f"ended by {name}{hint}"
    lines = [line.strip() for line in _COLOR.sub("", said).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    # A traceback says the cause in its last line.
    told = (errors or lines or [f"it ended with status {status} and said nothing"])[-1]
    return told.removeprefix("error: ")[:_MOST_CHARACTERS]


def run_address(folder: Path) -> str | None:
    """Find the address of the run of Weights & Biases that a training told of."""
    found = _URL.findall(_COLOR.sub("", tail(folder / LOG)))
    return found[-1] if found else None


def tail(path: Path) -> str:
    """Read the end of a file; nothing if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _safe_path() -> list[str]:
    """Keep the switches of this interpreter that say where it imports from."""
    return ["-P"] if sys.flags.safe_path else []
