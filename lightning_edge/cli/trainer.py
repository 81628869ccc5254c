"""`export` and `evaluate` of the command line: a Trainer that looks at what another run has trained."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import nn

from lightning_edge import exporters, record
from lightning_edge.callbacks.compression import EdgeCompressionCallback
from lightning_edge.callbacks.evaluation import DeviceEvaluationCallback, recipe_of
from lightning_edge.contents import Precision
from lightning_edge.errors import EdgeError, ExportError
from lightning_edge.evaluation.evaluate import evaluate_module
from lightning_edge.evaluation.on_devices import raise_device_failures, require_devices
from lightning_edge.evaluation.refusals import raise_failures, raise_over_budget
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.validation import Split, Validation, calibration_inputs
from lightning_edge.exporters import Artifact, deployable
from lightning_edge.exporters.jobs import Pending, Writers
from lightning_edge.exporters.pipeline import proved
from lightning_edge.interface import Interface
from lightning_edge.interrupts import unwinding
from lightning_edge.measure import Tolerance
from lightning_edge.network import Deployable, Inputs
from lightning_edge.one_run import only_run
from lightning_edge.quantization import float_copy, is_quantized
from lightning_edge.record import load_compressed
from lightning_edge.reporting.budget import Budget
from lightning_edge.reporting.report import Report, Row
from lightning_edge.reporting.rows import SOURCES, of_artifact, write_manifest
from lightning_edge.surgery import find_network
from lightning_edge.verdict import Strict, check_strict

_Callback = TypeVar("_Callback", bound=Callback)


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
        tolerance: Tolerance | None = None,
        options: dict[str, dict[str, Any]] | None = None,
        strict: Strict | None = None,
        jobs: int | None = None,
        name: str | None = None,
        weights_only: bool | None = None,
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
            tolerance: How far a file may lie from the network and be close.
            options: A target's own options, by target.
            strict: The worst verdict that is no error, see `lightning_edge.export`; broken files are, if not given.
            jobs: How many targets are written at once, each in a process of its own: as the DeviceEvaluationCallback
                says, or 0, which is in this process.
            name: First part of each file's name: as the DeviceEvaluationCallback says, or ``model``.
            weights_only: A key of configurations that `fit` has written; a checkpoint is read no other way.

        Raises:
            EdgeError: If the checkpoint does not load or a file cannot be made; the others are made.
            ValueError: If a target is unknown.
        """
        _check_weights_only(weights_only)
        given = {"max_fallback": max_fallback, "interface": interface, "tolerance": tolerance, "options": options}
        callback = self._callback(targets, strict, dirpath=dirpath, jobs=jobs, name=name, **given)
        settings = callback.settings
        if batches < 1:
            raise ValueError(f"batches={batches} leaves nothing to compare the files on; give 1 or more")
        network = find_network(self._load(model, ckpt_path, callback.module, "validate", datamodule), callback.module)
        loaders = loader_of(datamodule or model, "val_dataloader")
        inputs = calibration_inputs(model, loaders, batches, callback.module, datamodule)
        finished = deployable(network, None if is_quantized(network) else inputs[0])
        artifacts: list[Artifact] = []
        rows: list[Row] = []
        with unwinding(), only_run(Path(settings.dirpath)), Writers(settings.writing_jobs, _told) as writers:
            for target, file in [(target, _begun(writers, finished, target, settings)) for target in settings.targets]:
                try:
                    row, artifact = _exported(file, finished.precision, target, inputs, callback)
                except EdgeError as error:
                    if not file.announced:  # now: the other targets may take long
                        _told(f"FAILED: {target}: {error}")
                    rows.append(Row(target, finished.precision, SOURCES[finished.precision], error=str(error)))
                else:
                    artifacts.append(artifact)
                    rows.append(row)
            report = Report(type(model).__name__, "validate", rows, phases=_saved(ckpt_path).get("settings", {}))
            write_manifest(report, Path(settings.dirpath), recipe_of(self))
        if report.failures:
            names = ", ".join(row.target for row in report.failures)
            raise ExportError(f"{len(report.failures)} of {len(rows)} files could not be made: {names}; see above")
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
        tolerance: Tolerance | None = None,
        options: dict[str, dict[str, Any]] | None = None,
        budget: Budget | None = None,
        strict: Strict | None = None,
        devices: list[str] | None = None,
        jobs: int | None = None,
        name: str | None = None,
        resume: bool = False,
        weights_only: bool | None = None,
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
            tolerance: How far a file may lie from the network and be close.
            options: A target's own options, by target.
            budget: What a file may cost.
            strict: What is an error beside a file over its budget, see `DeviceEvaluationCallback`.
            devices: Devices to run the files on as well, by name: those of the DeviceEvaluationCallback, if any.
            jobs: How many targets are written at once, each in a process of its own; 0 is in this process, as without a
                callback.
            name: First part of each file's name, ``model`` without a callback.
            resume: Whether to measure on devices only what is missing of an evaluation into the same folder that broke
                off there.
            weights_only: A key of configurations that `fit` has written; a checkpoint is read no other way.

        Raises:
            EdgeError: If the checkpoint does not load, a device cannot be reached, a file cannot be made, has a worse
                verdict than ``strict`` allows, or is over its budget; the report has all.
            ValueError: If a target is unknown.
        """
        _check_weights_only(weights_only)
        given = {"max_fallback": max_fallback, "interface": interface, "tolerance": tolerance, "options": options}
        ours = {"budget": budget, "devices": devices, "jobs": jobs, "name": name}
        callback = self._callback(targets, strict, dirpath=dirpath, **given, **ours)
        settings = callback.settings
        require_devices(settings)
        split = split or callback.split
        self._load(model, ckpt_path, callback.module, split, datamodule)
        loaders = loader_of(datamodule or model, "val_dataloader" if split == "validate" else "test_dataloader")
        limit = self.limit_val_batches if split == "validate" else self.limit_test_batches
        validation = Validation(model, loaders, callback.module, split, limit, datamodule, callback.metrics)

        def calibration() -> list[Inputs]:
            if datamodule is not None:
                datamodule.setup("fit")
            loader = loader_of(datamodule or model, "train_dataloader")
            return calibration_inputs(model, loader, callback.calibration_batches, callback.module, datamodule)

        saved = _saved(ckpt_path)
        report = evaluate_module(
            validation,
            settings,
            calibration=calibration if callback.calibration_batches else None,
            baseline=_float_network(saved, find_network(model, callback.module)),
            recipe=recipe_of(self),
            phases=saved.get("settings"),
            tell=print,
            resume=resume,
        )
        Console().print(report.table())
        raise_failures(report, callback.strict)
        raise_device_failures(report)
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

    def _callback(self, targets: list[str] | None, strict: Strict | None, **others: Any) -> DeviceEvaluationCallback:
        """The configuration's callback, or a default one, with the settings that were given in place of its own."""
        found = first_of(self.callbacks, DeviceEvaluationCallback) or DeviceEvaluationCallback(list(exporters.TARGETS))
        callback = copy.copy(found)
        settings = callback.settings if targets is None else callback.settings.for_targets(targets)
        given = {name: value for name, value in others.items() if value is not None}
        callback.settings = replace(settings, **given)
        callback.settings = replace(callback.settings, dirpath=callback.folder(self))
        if strict is not None:
            check_strict(strict)
            callback.strict = strict
        compression = first_of(self.callbacks, EdgeCompressionCallback)
        if compression is not None and compression.module is not None:
            callback.module = compression.module
        return callback


def _check_weights_only(weights_only: bool | None) -> None:
    if weights_only is False:
        raise ValueError(
            "weights_only=False is not allowed: a checkpoint is read with weights_only=True, so that nothing in it runs"
        )


def _begun(writers: Writers, network: Deployable, target: str, settings: EvaluationSettings) -> Pending:
    """Begin to write one file."""
    path = Path(settings.dirpath) / f"{settings.name}-{network.precision}{exporters.target(target).suffix}"
    options = exporters.options_of(target, network.precision, settings.options)
    shape: dict[str, Any] = {"max_fallback": settings.max_fallback, "interface": settings.interface}
    return writers.begin(network, target, path, label=target, **shape, **options)


def _exported(
    file: Pending, precision: Precision, target: str, inputs: list[Inputs], callback: DeviceEvaluationCallback
) -> tuple[Row, Artifact]:
    """Wait for one file, prove it, and say what it is."""
    settings = callback.settings
    scheme = exporters.options_of(target, precision, settings.options).get("scheme")
    with file.staged() as staged:
        artifact = proved(staged, inputs, settings.tolerance_for(scheme), callback.strict, scheme)
    verdict = "" if artifact.judgement is None else f", {artifact.judgement}"
    print(f"{artifact.path}: {artifact.precision}, {artifact.size_bytes:,} bytes{verdict}")
    return of_artifact(artifact, scheme), artifact


def _told(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def loader_of(source: LightningModule | LightningDataModule, name: str) -> Any:
    """The dataloader of a module that has one, for there is nothing to compare on otherwise.

    Raises:
        EdgeError: If it has none.
    """
    if not is_overridden(name, source):
        raise EdgeError(f"{type(source).__name__} has no {name}; give it one, or another data module by data:")
    return getattr(source, name)()


def first_of(callbacks: Iterable[Callback], kind: type[_Callback]) -> _Callback | None:
    """The first of the callbacks that is of this kind."""
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def _saved(ckpt_path: str) -> dict[str, Any]:
    """What a checkpoint says of its compression; nothing where there was none."""
    loaded = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    return record.checked(loaded.get(record.KEY), ckpt_path)


def _float_network(saved: Mapping[str, Any], network: nn.Module) -> nn.Module | None:
    """The float network that quantization-aware training began with, which the checkpoint keeps."""
    if saved.get("float_state") is None:
        return None
    baseline = float_copy(network)
    baseline.load_state_dict(saved["float_state"])
    return baseline
