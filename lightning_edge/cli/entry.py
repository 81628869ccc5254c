"""What the command `lightning-edge` starts with: answers what needs no torch before that is imported.

`cli.main` is the same without it, for whoever has everything imported.
"""

from __future__ import annotations

import difflib
import os
import sys

from lightning_edge.cli import commands

# The subcommands of LightningCLI and our own, each with one line.
SUBCOMMANDS = {
    "fit": "train; with the callbacks of the configuration also compress, export and evaluate",
    "validate": "run the validation loop of a checkpoint",
    "test": "run the test loop of a checkpoint",
    "predict": "run the prediction loop of a checkpoint",
    "export": "write the network of a checkpoint for each target, and prove each file",
    "evaluate": "export, validate and time the files of a checkpoint, and write the report",
}


# What shells give a program that Ctrl-C has ended: 128 and the number of the signal.
_INTERRUPTED = 130


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: With the status of what was run, 130 where Ctrl-C ended it.
    """
    try:
        _run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing half-written is left\n")
        sys.exit(_INTERRUPTED)


def _run() -> None:
    _find_modules_here()
    args = sys.argv[1:]
    if args in ([], ["-h"], ["--help"]):
        print(_help())
        sys.exit(0 if args else 2)
    commands.run(args)
    if args[0] not in SUBCOMMANDS and not args[0].startswith("-"):
        known = [*SUBCOMMANDS, *commands.COMMANDS]
        close = difflib.get_close_matches(args[0], known, 1)
        meant = f"  did you mean: {close[0]}\n" if close else ""
        sys.stderr.write(f"error: there is no command {args[0]!r}\n{meant}  allowed: {', '.join(known)}\n")
        sys.exit(2)

    from lightning_edge.cli.main import main as run

    run()


def _find_modules_here() -> None:
    """Let a class path name a module of the current folder, as `python train.py` does.

    Behind all others, so that a file of the folder never takes the place of a library.
    """
    here = os.getcwd()
    if not sys.flags.safe_path and not {here, ""} & {*sys.path}:
        sys.path.append(here)


def _help() -> str:
    def listed(entries: dict[str, str]) -> str:
        return "\n".join(f"  {name:<17}{text}" for name, text in entries.items())

    return (
        "usage: lightning-edge SUBCOMMAND [-h] [--config FILE | recipe:NAME] [--KEY VALUE ...]\n\n"
        f"with a configuration of LightningCLI:\n{listed(SUBCOMMANDS)}\n\n"
        f"without one:\n{listed(commands.COMMANDS)}\n\n"
        "lightning-edge SUBCOMMAND --help shows the options of one."
    )
