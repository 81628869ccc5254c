"""DeviceEvaluationCallback: exports to every target after a fit; validates and times each file; writes one report."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import Metric

from lightning_edge.callbacks.compression import EdgeCompressionCallback
from lightning_edge.callbacks.loaders import generators_kept
from lightning_edge.callbacks.logged_settings import log_settings, plain
from lightning_edge.callbacks.tracking import log_metrics, log_report
from lightning_edge.devices.device import Device
from lightning_edge.devices.settings import DeviceSettings
from lightning_edge.errors import DeviceError, EdgeError, MissingExtraError, first_line
from lightning_edge.evaluation.evaluate import evaluate_module
from lightning_edge.evaluation.hooks import EvaluationHook
from lightning_edge.evaluation.on_devices import check_devices, raise_device_failures
from lightning_edge.evaluation.refusals import raise_failures
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.validation import (
    Split,
    Validation,
    calibration_inputs,
    check_data,
    check_split,
)
from lightning_edge.exporters import check_target_installed
from lightning_edge.interface import Interface
from lightning_edge.measure import Timing, Tolerance
from lightning_edge.network import Inputs
from lightning_edge.quantization import is_quantized
from lightning_edge.quiet import quiet_libraries
from lightning_edge.record import settings_of
from lightning_edge.reporting.budget import Budget
from lightning_edge.reporting.devices import failures
from lightning_edge.reporting.monitor import Mode, Monitor, direction
from lightning_edge.reporting.report import Report
from lightning_edge.reporting.rows import over_budget
from lightning_edge.surgery import find_network
from lightning_edge.verdict import Strict, check_strict

# Stands for the Trainer's default_root_dir in a folder's name.
_ROOT = "{root}"


@final
class DeviceEvaluationCallback(Callback):
    """Export to every target when training is done, and report how well and how fast each file does.

    Every file is run on the whole validation set, in the user's own validation loop, and compared there with the
    network it came from. A file that loads and runs is kept, with a verdict: exact, close, differs or broken. The
    report is written beside the files as ``report.json``, ``report.md`` and ``report.html``, with a ``manifest.json``
    of the files, printed as a table, and logged as ``edge/<target>/<name>``. With an `EdgeCompressionCallback` in the
    Trainer the int8 files are those of the network it trained; otherwise the trained network is quantized after
    training. ``Trainer(fast_dev_run=True)`` goes through all of it and keeps no file.

    Args:
        targets: Targets to export to: ``"executorch"``, ``"coreml"``, ``"tflite"``, ``"onnx"``.
        dirpath: Folder for the files and the report. ``{root}`` in it stands for the Trainer's ``default_root_dir``.
        module: Name of the network, as for `EdgeCompressionCallback`; found by itself, or taken from there.
        split: ``"validate"`` or ``"test"``: which of the user's loops gives the metrics.
        tolerance: How far a file may lie from the network it came from and be close.
        options: A target's own options, by target: ``{"tflite": {"io": "float"}}``.
        timing: Warm-up, repeats and threads of the latency measurement, and the time limit of a call.
        calibration_batches: Batches of training data for post-training quantization; 0 for none.
        fp32_files: Whether to export the float network as well, to compare with.
        metric: The metric by which trained and post-training quantization are compared. If not given: what the
            Trainer's checkpoints and early stopping monitor, else one whose name tells.
        mode: ``"max"`` if higher is better, ``"min"`` if lower; needed where the metric's name does not tell.
        metrics: Metrics by name, updated with ``(outputs, target)`` of batches ``(inputs, target)``, in place of the
            module's own step.
        strict: What is an error after the report is written. ``True``: a target that fails, and a broken file.
            ``"close"`` or ``"exact"``: also a file with a worse verdict. ``False``: nothing. A target that fails is
            told when it does and is in the table; other files that differ are warned of.
        budget: What a file may cost. One that costs more is kept, said to in the report, and warned of.
        max_fallback: Largest share of the multiply-accumulates, 0 to 1, that a file may leave to its runtime's own CPU
            kernels; a target with more fails. Any if not given.
        interface: How the files are called: names, layout, pixels, labels.
        devices: Devices to run the files on as well: names that ``devices.yaml`` describes, or `Device` objects.
        on_devices: What is measured on devices, and of how many samples.
        hooks: What is called with each file and with the report, for uploads of one's own.
        every_n_epochs: Evaluate during training as well, after every so many epochs, into ``<dirpath>/epoch-<n>``. The
            float file is left out there, and failures are warnings. The training goes on as it would without.
        jobs: How many targets are written at once, each in a process of its own; 0: in this process, one by one;
            ``None``: one a core, and in this process where there is one core only.
        name: First part of each file's name: ``<name>-int8.tflite``.

    Attributes:
        settings: The arguments that say which files are made, and how they are tested, timed and judged.
        report: The report of the last fit; ``None`` before, and on all processes but the first.

    Raises:
        ValueError: If an argument is not allowed.
    """

    def __init__(
        self,
        targets: list[str],
        dirpath: str = "artifacts",
        module: str | None = None,
        split: Split = "validate",
        tolerance: Tolerance | None = None,
        options: dict[str, dict[str, Any]] | None = None,
        timing: Timing | None = None,
        calibration_batches: int = 32,
        fp32_files: bool = True,
        metric: str | None = None,
        mode: Mode | None = None,
        metrics: dict[str, Metric] | None = None,
        strict: Strict = True,
        budget: Budget | None = None,
        max_fallback: float | None = None,
        interface: Interface | None = None,
        devices: list[str | Device] | None = None,
        on_devices: DeviceSettings | None = None,
        hooks: list[EvaluationHook] | None = None,
        every_n_epochs: int | None = None,
        jobs: int | None = 0,
        name: str = "model",
    ) -> None:
        check_split(split)
        check_strict(strict)
        if calibration_batches < 0:
            raise ValueError(f"calibration_batches={calibration_batches} is not allowed; give 0 or more")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs} is not allowed; give 1 or more, or leave it out")
        if metric is not None and metrics and not metric.startswith(tuple(metrics)):
            raise ValueError(f"metric={metric!r} is none of metrics={list(metrics)}; give the name of one")
        self.settings = EvaluationSettings(
            targets=targets,
            dirpath=dirpath,
            options=options or {},
            tolerance=tolerance or Tolerance(),
            timing=timing or Timing(),
            fp32_files=fp32_files,
            monitor=_monitor(metric, mode),
            budget=budget,
            max_fallback=max_fallback,
            interface=interface,
            devices=devices or [],
            on_devices=on_devices or DeviceSettings(),
            hooks=hooks or [],
            jobs=jobs,
            name=name,
        )
        self.module = module
        self.split = split
        self.calibration_batches = calibration_batches
        self.metrics = metrics
        self.strict = strict
        self.every_n_epochs = every_n_epochs
        self.report: Report | None = None
        self._knows_metrics = True  # outside of a fit nothing is asked

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log what is asked for."""
        if stage == "fit":
            log_settings(trainer, pl_module, self)

    def logged_settings(self) -> dict[str, Any]:
        """Give what files are made and how they are judged, for loggers."""
        asked = {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
        asked["devices"] = [str(device) for device in self.settings.devices]
        asked["hooks"] = [type(hook).__qualname__ for hook in self.settings.hooks]
        for name in ("split", "calibration_batches", "strict", "every_n_epochs"):
            asked[name] = getattr(self, name)
        return {"evaluation": {name: plain(value) for name, value in asked.items() if value is not None}}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out before training what would fail after it; what a target lacks is known when its file is written.

        Raises:
            ValueError: If there will be nothing to evaluate on.
            CompressionError: If the network cannot be found.
            MissingExtraError: If a target's packages are not installed; with ``strict=False`` that is a warning.
            DeviceError: If a device is not described, cannot be reached or lacks a runtime; with ``strict=False`` the
                latter two are a warning.
            EdgeError: If the folder cannot be written to.
        """
        quiet_libraries()
        self.report, self._knows_metrics = None, False
        check_data(trainer, self.split)
        find_network(pl_module, self._module(trainer))
        self._check_installed()
        if trainer.is_global_zero:
            self._check_devices()
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = self.folder(trainer)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=folder):
                    pass
            except OSError as error:
                cause = "it is a file" if folder.is_file() else error
                raise EdgeError(
                    f"dirpath={str(folder)!r} cannot be written to: {cause}. Give another folder"
                ) from error

    def folder(self, trainer: Trainer) -> Path:
        """Where the files go in runs of a Trainer."""
        return Path(str(self.settings.dirpath).replace(_ROOT, str(trainer.default_root_dir)))

    def _check_installed(self) -> None:
        for name in self.settings.targets:
            try:
                check_target_installed(name)
            except MissingExtraError as error:
                if self.strict:
                    given = list(self.settings.targets)
                    raise MissingExtraError(f"targets={given}: {error}, or leave {name!r} out") from error
                rank_zero_warn(f"There will be no file for {name!r}: {error}")

    def _check_devices(self) -> None:
        problems = check_devices(self.settings)
        if problems and self.strict:
            raise DeviceError("\n".join(problems))
        for problem in problems:
            rank_zero_warn(f"Nothing may be measured on {problem}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of a metric that the loop does not log, the first time it has run: in the sanity check, as a rule."""
        if self._knows_metrics or self.split != "validate" or self.metrics or not trainer.callback_metrics:
            return
        self._knows_metrics = True
        asked, names = self.settings.monitor, list(trainer.callback_metrics)
        if asked is not None and asked.metric not in names:
            rank_zero_warn(f"metric={asked.metric!r} is not among the metrics of validation_step: {names}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate during training where that is asked for; nothing that fails here ends the training."""
        ended = trainer.current_epoch + 1
        if self.every_n_epochs is None or ended % self.every_n_epochs or ended == trainer.max_epochs:
            return
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        folder = self.folder(trainer) / f"epoch-{ended:04d}"
        begun = time.monotonic()
        try:
            with isolate_rng(), generators_kept(trainer.train_dataloader, trainer.val_dataloaders):
                report = self._evaluate(trainer, pl_module, folder, fp32_files=False)
        except Exception as error:
            rank_zero_warn(f"The evaluation after epoch {ended} failed: {type(error).__name__}: {first_line(error)}")
            return
        seconds = time.monotonic() - begun
        rank_zero_info(f"The evaluation after epoch {ended} took {seconds:.0f} s; it is in {folder}")
        log_metrics(trainer.loggers, {**report.metrics(), "edge/evaluation_s": seconds}, folder, trainer.global_step)
        for row in report.failures:
            rank_zero_warn(f"After epoch {ended}, {row.label} failed: {row.error}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, write, print and log; then raise if a target failed.

        Raises:
            ExportError: If a target failed or a verdict is worse than ``strict`` allows; the report has all.
            DeviceError: If a device failed and ``strict`` is not ``False``.
        """
        if not trainer.is_global_zero:
            return
        with ExitStack() as stack:
            folder = self.folder(trainer)
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                rank_zero_info("fast_dev_run: the evaluation keeps no file")
            with isolate_rng():
                self.report = self._evaluate(trainer, pl_module, folder)
            _print(self.report)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                print(f"Written: {folder}; {folder / 'report.html'} is for a browser")
            log_report(trainer.loggers, self.report, folder, trainer.global_step)
        for message in over_budget(self.report):
            rank_zero_warn(message)
        refused = [] if self.strict is False else self.report.refused(self.strict)
        for row in self.report.rows:
            if row.verdict in ("differs", "broken") and row not in refused:
                rank_zero_warn(f"{row.label} {row.judgement}")
        if self.strict is not False:
            raise_failures(self.report, self.strict)
            raise_device_failures(self.report)
        for line in failures(self.report.devices):
            rank_zero_warn(f"failed on a device: {line}")

    def _evaluate(
        self, trainer: Trainer, pl_module: LightningModule, folder: Path, fp32_files: bool | None = None
    ) -> Report:
        name = self._module(trainer)
        compression = _compression(trainer)
        trained = compression is not None and is_quantized(find_network(pl_module, name))
        return evaluate_module(
            Validation.after_fit(trainer, pl_module, name, self.split, self.metrics),
            replace(
                self.settings,
                dirpath=folder,
                fp32_files=self.settings.fp32_files if fp32_files is None else fp32_files,
            ),
            calibration=(lambda: self._calibration(trainer, pl_module)) if self.calibration_batches else None,
            baseline=compression.baseline(pl_module) if compression is not None and trained else None,
            watched=_watched(trainer),
            recipe=recipe_of(trainer),
            phases=None if compression is None else settings_of(compression.phases),
            tell=rank_zero_info,
        )

    def _calibration(self, trainer: Trainer, pl_module: LightningModule) -> list[Inputs]:
        return calibration_inputs(
            pl_module,
            trainer.train_dataloader,
            min(self.calibration_batches, int(trainer.num_training_batches)),
            self._module(trainer),
            trainer.datamodule,  # type: ignore[attr-defined]
        )

    def _module(self, trainer: Trainer) -> str | None:
        compression = _compression(trainer)
        if compression is None or compression.module is None or compression.module == self.module:
            return self.module
        if self.module is None:
            return compression.module
        raise ValueError(
            f"DeviceEvaluationCallback(module={self.module!r}) and EdgeCompressionCallback(module="
            f"{compression.module!r}) name different networks; leave it out here"
        )


def _monitor(metric: str | None, mode: Mode | None) -> Monitor | None:
    if metric is None:
        if mode is not None:
            raise ValueError(f"mode={mode!r} without metric; name the metric as well")
        return None
    told = mode or direction(metric)
    if told is None:
        raise ValueError(f"metric={metric!r} does not tell where it is better; give mode='max' or mode='min'")
    return Monitor(metric, told)


def recipe_of(trainer: Trainer) -> str | None:
    """Text of the configuration that a LightningCLI runs; ``None`` where the Trainer was made in Python."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        parser, config = getattr(callback, "parser", None), getattr(callback, "config", None)
        # Lightning's SaveConfigCallback, told by what it has: its module needs jsonargparse.
        if parser is not None and config is not None and hasattr(parser, "dump"):
            return str(parser.dump(config, skip_none=False))
    return None


def _compression(trainer: Trainer) -> EdgeCompressionCallback | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, EdgeCompressionCallback)), None)


def _watched(trainer: Trainer) -> list[Monitor]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [
        Monitor(callback.monitor, "max" if callback.mode == "max" else "min")
        for callback in callbacks
        if isinstance(callback, ModelCheckpoint | EarlyStopping) and callback.monitor is not None
    ]


def _print(report: Report) -> None:
    try:
        from rich.console import Console
    except ImportError:
        print(report.to_markdown())
    else:
        Console().print(report.table())
