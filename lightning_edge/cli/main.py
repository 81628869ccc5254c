"""The command line: LightningCLI, recipes by name, `export` and `evaluate`, and errors that start with the cause."""

from __future__ import annotations

import copy
import os
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import nn

from lightning_edge import exporters, record
from lightning_edge.callbacks.compression import EdgeCompressionCallback
from lightning_edge.callbacks.evaluation import DeviceEvaluationCallback, recipe_of
from lightning_edge.cli import commands
from lightning_edge.cli.config_errors import cause, explain
from lightning_edge.cli.config_files import ConfigFile
from lightning_edge.errors import EdgeError, first_line
from lightning_edge.evaluation.evaluate import evaluate_module, raise_failures, raise_over_budget
from lightning_edge.evaluation.settings import check_targets
from lightning_edge.evaluation.validation import Split, Validation, calibration_inputs
from lightning_edge.exporters import Artifact, deployable
from lightning_edge.interface import Interface
from lightning_edge.interrupts import unwinding
from lightning_edge.network import Inputs
from lightning_edge.one_run import only_run
from lightning_edge.quantization import float_copy, is_quantized
from lightning_edge.quantization.network import CHILD
from lightning_edge.record import load_compressed
from lightning_edge.reporting.report import Report
from lightning_edge.reporting.rows import of_artifact, write_manifest
from lightning_edge.surgery import find_network

_OF_FILES = "On files alone: verify FOLDER checks them against their manifest, microcontroller FILE makes C++ sources."
_NAMED_CHECKPOINTS = ("best", "last", "hpc", "registry")
# How torch begins when the weights of a checkpoint are not those of the module.
_MISFIT = "Error(s) in loading state_dict"
_Callback = TypeVar("_Callback", bound=Callback)


class EdgeParser(LightningArgumentParser):
    """A parser whose errors start with the innermost line, and do not print every option there is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong with the arguments and exit with status 2."""
        if not self.exit_on_error or _debugging():
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]
        sys.stderr.write(f"error: {explain(message, options)}\n")
        sys.exit(2)


class EdgeTrainer(Trainer):
    """A Trainer that can also export and evaluate what another run has trained."""

    callbacks: list[Callback]

    def export(
        self,
        model: LightningModule,
        ckpt_path: str,
        datamodule: LightningDataModule | None = None,
        targets: list[str] | None = None,
        dirpath: str | None = None,
        batches: int = 8,
        max_fallback: float | None = None,
        interface: Interface | None = None,
    ) -> list[Artifact]:
        """Write the network of a checkpoint for each target, int8 if it was trained so, and prove each file.

        Args:
            model: The module the checkpoint was written by, newly made.
            ckpt_path: The checkpoint.
            datamodule: Where the validation data is, if not in ``model``.
            targets: Targets to export to: those of the DeviceEvaluationCallback, or all.
            dirpath: Folder for the files: that of the DeviceEvaluationCallback, or ``artifacts``.
            batches: Validation batches on which each file is compared with the network.
            max_fallback: Share of the multiply-accumulates that may run outside the target's delegate.
            interface: How the files are called: that of the DeviceEvaluationCallback, if it has one.

        Raises:
            EdgeError: If the checkpoint does not load or a file cannot be made.
            ValueError: If a target is unknown.
        """
        callback = self._callback(targets, dirpath=dirpath, max_fallback=max_fallback, interface=interface)
        settings = callback.settings
        if batches < 1:
            raise ValueError(f"batches={batches} leaves nothing to compare the files on; give 1 or more")
        network = find_network(self._load(model, ckpt_path, callback.module, "validate", datamodule), callback.module)
        loaders = _loader(datamodule or model, "val_dataloader")
        inputs = calibration_inputs(model, loaders, batches, callback.module, datamodule)
        finished = deployable(network, None if is_quantized(network) else inputs[0])
        artifacts, rows = [], []
        with unwinding(), only_run(Path(settings.dirpath)):
            for target in settings.targets:
                path = Path(settings.dirpath) / f"model-{finished.precision}{exporters.target(target).suffix}"
                options = exporters.options_of(target, finished.precision, settings.options)
                given: dict[str, Any] = {
                    "max_fallback": settings.max_fallback,
                    "interface": settings.interface,
                    **options,
                }
                artifact = exporters.export(
                    finished, target, path, batches=inputs, tolerance=settings.tolerance, **given
                )
                print(f"{path}: {artifact.precision}, {artifact.size_bytes:,} bytes")
                rows.append(of_artifact(artifact, options.get("scheme")))
                artifacts.append(artifact)
            write_manifest(Report(type(model).__name__, "validate", rows), Path(settings.dirpath), recipe_of(self))
        return artifacts

    def evaluate(
        self,
        model: LightningModule,
        ckpt_path: str,
        datamodule: LightningDataModule | None = None,
        targets: list[str] | None = None,
        dirpath: str | None = None,
        split: Split | None = None,
        max_fallback: float | None = None,
        interface: Interface | None = None,
    ) -> Report:
        """Export the network of a checkpoint, validate and time every file, and write the report.

        Settings that are not given are those of the configuration's DeviceEvaluationCallback.

        Args:
            model: The module the checkpoint was written by, newly made.
            ckpt_path: The checkpoint.
            datamodule: Where the data is, if not in ``model``.
            targets: Targets to export to, all of them without a callback.
            dirpath: Folder for the files and the report, ``artifacts`` without a callback.
            split: The loop that gives the metrics, ``validate`` without a callback.
            max_fallback: Share of the multiply-accumulates that may run outside the target's delegate.
            interface: How the files are called: that of the DeviceEvaluationCallback, if it has one.

        Raises:
            EdgeError: If the checkpoint does not load, a file cannot be made or is over its budget; the report has all.
            ValueError: If a target is unknown.
        """
        callback = self._callback(targets, dirpath=dirpath, max_fallback=max_fallback, interface=interface)
        settings = callback.settings
        split = split or callback.split
        self._load(model, ckpt_path, callback.module, split, datamodule)
        loaders = _loader(datamodule or model, "val_dataloader" if split == "validate" else "test_dataloader")
        limit = self.limit_val_batches if split == "validate" else self.limit_test_batches
        validation = Validation(model, loaders, callback.module, split, limit, datamodule, callback.metrics)

        def calibration() -> list[Inputs]:
            if datamodule is not None:
                datamodule.setup("fit")
            loader = _loader(datamodule or model, "train_dataloader")
            return calibration_inputs(model, loader, callback.calibration_batches, callback.module, datamodule)

        report = evaluate_module(
            validation,
            settings,
            calibration=calibration if callback.calibration_batches else None,
            baseline=_float_network(ckpt_path, find_network(model, callback.module)),
            recipe=recipe_of(self),
            tell=print,
        )
        Console().print(report.table())
        raise_failures(report)
        raise_over_budget(report)
        return report

    def _load(
        self,
        model: LightningModule,
        ckpt_path: str,
        name: str | None,
        split: Split,
        datamodule: LightningDataModule | None,
    ) -> nn.Module:
        """Set everything up as a run of this Trainer would, then load the checkpoint."""
        model.trainer = self
        if datamodule is not None:
            datamodule.prepare_data()
            datamodule.setup(split)
        model.prepare_data()
        # All of it now: a module may build its network here, and after the weights are loaded it would be another one.
        for stage in ("fit", split):
            model.setup(stage)
        model.configure_model()
        return load_compressed(ckpt_path, model, name)

    def _callback(self, targets: list[str] | None, **others: Any) -> DeviceEvaluationCallback:
        """The configuration's callback, or a default one, with the settings that were given in place of its own."""
        found = _first(self.callbacks, DeviceEvaluationCallback) or DeviceEvaluationCallback(list(exporters.TARGETS))
        callback = copy.copy(found)
        settings = callback.settings if targets is None else callback.settings.for_targets(targets)
        given = {name: value for name, value in others.items() if value is not None}
        callback.settings = replace(settings, **given)
        compression = _first(self.callbacks, EdgeCompressionCallback)
        if compression is not None and compression.module is not None:
            callback.module = compression.module
        return callback


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
        except (TypeError, ValueError, MisconfigurationException) as error:
            if _debugging():
                raise
            sys.stderr.write(f"error: {cause(error)}\n")
            sys.exit(2)

    def before_export(self) -> None:
        """Refuse targets that there are not before the checkpoint is loaded."""
        targets = self._get(self.config_init, "targets")
        try:
            check_targets(list(exporters.TARGETS) if targets is None else targets, None)
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)

    before_evaluate = before_export

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
        SystemExit: With status 2 for a mistake in the arguments, 1 for a failure of our own making.
    """
    try:
        commands.run(sys.argv[1:] if args is None else args)
        EdgeCLI(trainer_class=EdgeTrainer, parser_class=EdgeParser, save_config_callback=_SaveConfig, args=args)
    except Exception as error:
        if _debugging() or not _is_told(error):
            raise
        sys.stderr.write(f"error: {_told(error)}\n(JSONARGPARSE_DEBUG=true shows where it was raised)\n")
        sys.exit(1)


def _told(error: Exception) -> str:
    """The message; where weights do not fit, what to do about it comes before torch's list of them."""
    if not str(error).startswith(_MISFIT):
        return str(error)
    cause = "they are of another network; give the model the settings it was trained with"
    if CHILD in str(error):
        cause = "they were trained quantized; give the configuration the EdgeCompressionCallback of that training"
    return f"ckpt_path: the weights do not fit the model: {cause}\n\nin full:\n  {error}"


def _check_checkpoint(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError("which is a folder" if path.is_dir() else "there is no such file")
    state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    if not isinstance(state, dict) or not {"state_dict", "pytorch-lightning_version"} <= state.keys():
        raise ValueError("which Lightning did not write")


def _is_told(error: Exception) -> bool:
    """Whether the message says all there is to say: raised by us, by Lightning for a setting, or by the system."""
    if isinstance(error, EdgeError | OSError | MisconfigurationException) or str(error).startswith(_MISFIT):
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    raised_in = "" if traceback is None else traceback.tb_frame.f_globals.get("__name__", "")
    return isinstance(error, TypeError | ValueError) and raised_in.partition(".")[0] == "lightning_edge"


def _loader(source: LightningModule | LightningDataModule, name: str) -> Any:
    """The dataloader of a module that has one, for there is nothing to compare on otherwise.

    Raises:
        EdgeError: If it has none.
    """
    if not is_overridden(name, source):
        raise EdgeError(f"{type(source).__name__} has no {name}; give it one, or another data module by data:")
    return getattr(source, name)()


def _first(callbacks: Iterable[Callback], kind: type[_Callback]) -> _Callback | None:
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def _float_network(ckpt_path: str, network: nn.Module) -> nn.Module | None:
    """The float network that quantization-aware training began with, which the checkpoint keeps."""
    loaded = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    saved = record.checked(loaded.get(record.KEY), ckpt_path)
    if saved.get("float_state") is None:
        return None
    baseline = float_copy(network)
    baseline.load_state_dict(saved["float_state"])
    return baseline


def _debugging() -> bool:
    """Whether jsonargparse's own switch asks for tracebacks."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true"
