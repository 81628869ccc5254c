"""The command line: LightningCLI, recipes by name, and errors that start with the cause."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_edge import exporters, record
from lightning_edge.callbacks.compression import EdgeCompressionCallback
from lightning_edge.callbacks.evaluation import DeviceEvaluationCallback
from lightning_edge.cli import commands
from lightning_edge.cli.config_errors import cause, explain
from lightning_edge.cli.config_files import ConfigFile, strict_values
from lightning_edge.cli.trainer import EdgeTrainer
from lightning_edge.errors import HOPELESS, BudgetError, EdgeError, HopelessError, first_line
from lightning_edge.evaluation.refusals import raise_over_budget
from lightning_edge.evaluation.settings import check_targets
from lightning_edge.quantization.network import CHILD
from lightning_edge.quiet import quiet_libraries
from lightning_edge.user_warnings import print_messages_only

_OF_FILES = (
    "Before a training: fits CONFIG --device NAME. "
    "On files alone: verify FOLDER checks them against their manifest, microcontroller FILE makes C++ sources, report "
    "FOLDER [FOLDER ...] makes the page of a report or puts several side by side. "
    "recipes lists the configurations that ship with this package. "
    "On many trainings: sweep FILE runs them, front FOLDER chooses among them."
)
# Status of a run whose files are all written, and over their budget.
OVER_BUDGET = 3
_NAMED_CHECKPOINTS = ("best", "last", "hpc", "registry")
# Arguments that are true when they are given, without a value as with one.
_SWITCHES = ("--resume",)
_DEBUG = "JSONARGPARSE_DEBUG=true shows the whole of it, and where it was raised"
# How torch begins when the weights of a checkpoint are not those of the module.
_MISFIT = "Error(s) in loading state_dict"


class EdgeParser(LightningArgumentParser):
    """A parser whose errors start with the innermost line, and do not print every option there is."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **options: Any
    ) -> Any:
        """Parse arguments, among them `_SWITCHES`, which need no value."""
        given = sys.argv[1:] if args is None else list(args)
        following = [*given, "--"][1:]
        plain = [
            f"{word}=true" if word in _SWITCHES and after.startswith("-") else word
            for word, after in zip(given, following, strict=True)
        ]
        return super().parse_args(plain, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong with the arguments and exit with status 2."""
        if not self.exit_on_error or _debugging():
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]
        sys.stderr.write(f"error: {explain(message, options)}\n({_DEBUG})\n")
        sys.exit(2)


class _SaveConfig(SaveConfigCallback):
    """Keeps the configuration of a training beside what it wrote, of the latest where several share a folder.

    Lightning's own refuses to run where there is one already; without a logger that is every second run.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "overwrite": True})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration, but not over that of the training whose checkpoint is looked at, or the user's."""
        place = Path(trainer.log_dir or "", self.config_filename).resolve()
        given = {Path(str(path)).resolve() for path in self.config.get("config") or ()}
        if (stage == "fit" or trainer.loggers) and place not in given:
            super().setup(trainer, pl_module, stage)


class EdgeCLI(LightningCLI):
    """LightningCLI that tells a setting its class refuses from a failure of the run."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Build one parser, whose ``--config`` also takes ``recipe:<name>``."""
        kwargs.setdefault("dump_header", None)
        kwargs.setdefault("epilog", _OF_FILES)
        parser = self.parser_class(**kwargs)
        help_text = "Configuration file in YAML or JSON, or recipe:<name>. May be given several times."
        parser.add_argument("-c", "--config", action=ConfigFile, help=help_text)
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Name the subcommands, each with the arguments that the configuration gives."""
        given = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "export": given, "evaluate": given}

    def instantiate_classes(self) -> None:
        """Build module, data module and trainer; a value that one of them refuses is a mistake in the arguments."""
        given = self._get(self.config, "trainer", default={})
        if isinstance(given, list | str | int | float):
            sys.stderr.write(f"error: trainer: given {given!r}\n  allowed: settings of the Trainer by name\n")
            sys.exit(2)
        try:
            super().instantiate_classes()
            self._check_compression()
        except (TypeError, ValueError, MisconfigurationException) as error:
            if _debugging():
                raise
            sys.stderr.write(f"error: {cause(error)}\n")
            sys.exit(2)

    def _check_compression(self) -> None:
        """Refuse the checkpoint of a compressed training without the callback that makes the network fit it.

        Raises:
            ValueError: Naming the phases. Lightning's own loading would list parameters that do not fit.
        """
        path = self._get(self.config_init, "ckpt_path")
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, EdgeCompressionCallback) for callback in callbacks):
            return
        if self.subcommand in ("export", "evaluate") or not path or not Path(path).is_file():
            return
        saved = record.checked(_loaded(Path(path)).get(record.KEY), str(path))
        phases = dict.fromkeys(str(change["phase"]) for change in saved.get("changes", []))
        if phases:
            raise ValueError(
                f"ckpt_path: {path} is of a compressed training ({', '.join(phases)}), and its weights fit a network "
                "that was compressed so. Give the configuration the EdgeCompressionCallback of that training"
            )

    def before_export(self) -> None:
        """Refuse targets that there are not before the checkpoint is loaded."""
        targets = self._get(self.config_init, "targets")
        try:
            check_targets(list(exporters.TARGETS) if targets is None else targets, None)
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)

    before_evaluate = before_export

    def after_fit(self) -> None:
        """End with the status of a missed budget, now that checkpoints, files and report are written.

        Raises:
            BudgetError: If a file to ship is over it.
        """
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, DeviceEvaluationCallback) and callback.report is not None:
                raise_over_budget(callback.report)

    def _parse_ckpt_path(self) -> None:
        """Refuse a checkpoint that is none before anything is built."""
        subcommand = self.config.get("subcommand")
        given = self.config.get(f"{subcommand}.ckpt_path")
        # These are known to a Trainer that has trained, or finds them by itself; ours read a file.
        named = () if subcommand in ("export", "evaluate") else _NAMED_CHECKPOINTS
        try:
            if given and given not in named and "://" not in given:
                _check_checkpoint(Path(given))
            super()._parse_ckpt_path()
        except (OSError, RuntimeError, UnpicklingError, KeyError, AttributeError, EOFError, ValueError) as error:
            if _debugging():
                raise
            sys.stderr.write(
                f"error: ckpt_path: given {given!r}, {first_line(error)}\n"
                f"  allowed: {', '.join(('a checkpoint that Lightning wrote and weights_only=True loads', *named))}\n"
            )
            sys.exit(2)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments without the program's name, ``sys.argv`` if not given.

    Raises:
        SystemExit: With status 2 for a mistake in the arguments, 3 for files over their budget, after all is written, 4
            for a trial of a sweep that is not worth the rest, 1 for a failure of our own making.
    """
    quiet_libraries()
    print_messages_only()
    try:
        commands.run(sys.argv[1:] if args is None else args)
        with strict_values():
            EdgeCLI(trainer_class=EdgeTrainer, parser_class=EdgeParser, save_config_callback=_SaveConfig, args=args)
    except Exception as error:
        if _debugging() or not _is_told(error):
            raise
        if isinstance(error, BudgetError):
            sys.stderr.write(f"error: {error}\n")
            sys.exit(OVER_BUDGET)
        if isinstance(error, HopelessError):
            sys.stderr.write(f"error: {error}\n")
            sys.exit(HOPELESS)
        sys.stderr.write(f"error: {_told(error)}\n({_DEBUG})\n")
        sys.exit(1)


def _told(error: Exception) -> str:
    """The message; where weights do not fit, what to do about it comes before torch's list of them."""
    if not str(error).startswith(_MISFIT):
        return str(error)
    cause = "they are of another network; give the model the settings it was trained with"
    if CHILD in str(error):
        cause = "they were trained quantized; give the configuration the EdgeCompressionCallback of that training"
    return f"ckpt_path: the weights do not fit the model: {cause}"


def _check_checkpoint(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError("which is a folder" if path.is_dir() else "there is no such file")
    state = _loaded(path)
    if not isinstance(state, dict) or not {"state_dict", "pytorch-lightning_version"} <= state.keys():
        raise ValueError("which Lightning did not write")


def _loaded(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)


def _is_told(error: Exception) -> bool:
    """Whether the message says all there is to say: raised by us, by Lightning for a setting, or by the system."""
    if isinstance(error, EdgeError | OSError | MisconfigurationException) or str(error).startswith(_MISFIT):
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    raised_in = "" if traceback is None else traceback.tb_frame.f_globals.get("__name__", "")
    return isinstance(error, TypeError | ValueError) and raised_in.partition(".")[0] == "lightning_edge"


def _debugging() -> bool:
    """Whether jsonargparse's own switch asks for tracebacks."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true"
