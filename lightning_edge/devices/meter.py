"""A counter of energy that is read here and not on the device, such as by the user's own program for a meter."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_edge.devices.words import last_line
from lightning_edge.errors import DeviceError

_LIMIT_S = 15.0


@dataclass(frozen=True)
class Reading:
    """What a counter of energy says.

    Attributes:
        joules: Joules since some moment; ``None`` where it cannot be told.
        source: What tells it, in words; why it cannot be told where there is none.
    """

    joules: float | None
    source: str


def check_meter(command: Sequence[str] | None) -> Sequence[str] | None:
    """Refuse a meter that is no program and its arguments.

    Raises:
        ValueError: Naming what was given.
    """
    if command is None:
        return None
    if isinstance(command, str) or not command or not all(isinstance(part, str) and part for part in command):
        raise ValueError(f"meter={command!r} is not allowed; give a list: a program and its arguments")
    return list(command)


def read_meter(command: Sequence[str]) -> Reading:
    """Run a program that prints the joules that a meter has counted so far, as one number.

    Raises:
        DeviceError: If there is no such program, or it does not print one.
    """
    if shutil.which(command[0]) is None:
        raise DeviceError(f"meter: there is no program {command[0]!r}. Give its path")
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"meter: {command[0]} did not end within {_LIMIT_S:g} s. Let it print and end") from error
    except OSError as error:
        raise DeviceError(f"meter: {command[0]} cannot be started: {error.strerror}. Give its path") from error
    said = last_line(ended.stdout)
    try:
        joules = float(said)
    except ValueError:
        joules = math.nan
    if ended.returncode != 0 or not math.isfinite(joules):
        told = last_line(ended.stderr) or said or "nothing"
        raise DeviceError(
            f"meter: {command[0]} ended with status {ended.returncode} and said {told!r}. Let it print the joules that "
            "the meter has counted so far, as one number"
        )
    return Reading(joules, f"the meter that {command[0]} reads")
