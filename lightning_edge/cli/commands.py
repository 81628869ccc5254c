"""Commands that take no configuration of LightningCLI: on files, on recipes and on sweeps.

Knows their names and what they are for; the module of one is imported when it is run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

# Name, and module with a function main(arguments) that returns the status.
_MODULES = {
    "fits": "lightning_edge.cli.fits",
    "front": "lightning_edge.cli.front",
    "microcontroller": "lightning_edge.cli.microcontroller",
    "recipes": "lightning_edge.cli.recipes",
    "report": "lightning_edge.cli.reports",
    "sweep": "lightning_edge.cli.sweep",
    "verify": "lightning_edge.cli.verify",
}
COMMANDS = {
    "fits": "tell whether a file, or a network before it is trained, fits a board",
    "front": "show the Pareto front of a sweep, and take the best files out of it",
    "microcontroller": "write an int8 .tflite file as C++ sources",
    "recipes": "list the configurations that ship with this package, show one, copy some",
    "report": "write the page of a report again, or put several side by side",
    "sweep": "train many settings of one configuration, and find the front of their files",
    "verify": "check a folder of exported files against its manifest",
}


def run(args: Sequence[str]) -> None:
    """Run the command that the first argument names, and exit with its status; return if it is none of these.

    Raises:
        SystemExit: With the status of the command.
    """
    if args and args[0] in _MODULES:
        sys.exit(import_module(_MODULES[args[0]]).main(args[1:]))
