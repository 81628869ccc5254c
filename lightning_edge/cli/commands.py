"""Commands that take no configuration of LightningCLI: on files, and on sweeps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lightning_edge.cli import front, reports, sweep
from lightning_edge.cli import microcontroller as firmware
from lightning_edge.reporting import verification

_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "front": front.main,
    "microcontroller": firmware.main,
    "report": reports.main,
    "sweep": sweep.main,
    "verify": verification.main,
}


def run(args: Sequence[str]) -> None:
    """Run the command that the first argument names, and exit with its status; return if it is none of these.

    Raises:
        SystemExit: With the status of the command.
    """
    if args and args[0] in _COMMANDS:
        sys.exit(_COMMANDS[args[0]](args[1:]))
