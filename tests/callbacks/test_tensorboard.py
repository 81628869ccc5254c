"""What was asked for, the cuts and the report, read back from TensorBoard's event files."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from test_evaluation import QUICK, TRAINING, VALIDATION, Classifier, Stub, stub, trainer

from lightning_edge import DeviceEvaluationCallback, EdgeCompressionCallback, Prune, Quantize
from lightning_edge.errors import ExportError

events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

__all__ = ["stub"]  # a fixture


def read(folder: str) -> tuple[dict[str, list[tuple[int, float]]], bytes]:
    """Give the steps and values of each scalar, and the hyper-parameters as TensorBoard holds them."""
    found = events.EventAccumulator(folder)
    found.Reload()
    scalars = {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    return scalars, found.summary_metadata["_hparams_/session_start_info"].plugin_data.content


@pytest.mark.parametrize("refused", [False, True])
def test_a_fit_is_read_back_with_its_settings_cuts_and_figures(tmp_path: Path, stub: Stub, refused: bool) -> None:
    if refused:
        stub.refusal = ExportError("stub: refused")
    logger = TensorBoardLogger(tmp_path, name="board")
    phases = [Prune(start=1, end=2, every=1, macs=0.6, round_to=1), Quantize(start=2)]
    evaluation = DeviceEvaluationCallback(["stub"], str(tmp_path / "files"), timing=QUICK, strict=False)
    fitted = trainer(EdgeCompressionCallback(phases), evaluation, max_epochs=3, logger=logger)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted.fit(Classifier(), TRAINING, VALIDATION)

    scalars, settings = read(logger.log_dir)
    assert evaluation.report is not None
    figures = evaluation.report.metrics()
    assert ("edge/stub/val_acc" in figures) is not refused
    for name, value in figures.items():
        assert scalars[name] == [(fitted.global_step, pytest.approx(value, nan_ok=True))], name
    layers = [module for module in fitted.lightning_module.modules() if hasattr(module, "out_channels")]
    assert scalars["edge/prune/channels"][-1][1] == layers[0].out_channels + 4
    for name in ("macs", "params"):
        assert scalars[f"edge/prune/{name}"], name
    assert b"edge/phases/prune/macs" in settings
    saved = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert saved["edge"]["phases"]["quantize"]["start"] == 2
    assert saved["edge"]["evaluation"]["targets"] == ["stub"]
