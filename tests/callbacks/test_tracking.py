"""The report in loggers: read back from an offline run of Weights & Biases, and a server that does not answer."""

from __future__ import annotations

import csv
import json
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from test_evaluation import QUICK, TRAINING, VALIDATION, Classifier, Stub, stub, trainer

from lightning_edge import Budget, DeviceEvaluationCallback, EdgeCompressionCallback, Prune, Quantize
from lightning_edge.callbacks.tracking import (
    OfflineFallbackWandbLogger,
    answers,
    device_table_of,
    hashes,
    is_wandb,
    log_report,
    table_of,
)
from lightning_edge.errors import ExportError
from lightning_edge.reporting.devices import DeviceRow
from lightning_edge.reporting.report import Report, Row, digest

wandb = pytest.importorskip("wandb")

__all__ = ["stub"]  # a fixture

# Nothing listens on the port for discarding.
NO_SERVER = {"base_url": "http://127.0.0.1:9", "init_timeout": 1}
_BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    # WandbLogger(offline=True) writes WANDB_MODE itself; setting it first makes monkeypatch put it back.
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.finish()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "artifacts"
    package = found / "model-int8.mlpackage" / "Data"
    package.mkdir(parents=True)
    (package / "weight.bin").write_bytes(b"\x01\x02")
    (found / "model-int8.tflite").write_bytes(b"TFL3")
    return found


@pytest.fixture
def report(folder: Path) -> Report:
    found = Report(
        model="Digits",
        split="validate",
        rows=(
            Row("torch", "fp32", "float", metrics={"val_acc": 0.5}),
            Row("tflite", "int8", "trained", path="model-int8.tflite", metrics={"val_acc": 0.25}, float_ops=("a", "b")),
            Row("coreml", "int8", "trained", path="model-int8.mlpackage", metrics={"val_acc": 0.75}),
            Row("executorch", "int8", "trained", error="refused"),
        ),
        versions={"torch": "2.13"},
    )
    found.write(folder)
    return found


def records(folder: Path) -> list[Any]:
    """Finish the run and read its records; the process that writes them may be a little behind."""
    wandb.finish()
    (file,) = folder.rglob("offline-run-*/*.wandb")
    given_up = time.monotonic() + 30
    while time.monotonic() < given_up:
        found = list(parse(file.read_bytes()))
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.05)
    pytest.fail(f"{file} was never finished")


def parse(data: bytes) -> Iterator[Any]:
    """Take the records out of a LevelDB log behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    position, payload = 7, b""
    while position + _HEADER.size <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER.size:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        if position + length > len(data):  # it is being written
            return
        payload += data[position : position + length]
        position += length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


def history(folder: Path) -> dict[str, Any]:
    found = {}
    for record in records(folder):
        for item in record.history.item:
            found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found


def test_offline_run_holds_metrics_table_and_files_with_their_hashes(
    tmp_path: Path, report: Report, folder: Path
) -> None:
    logger = WandbLogger(offline=True, save_dir=str(tmp_path))
    log_report([logger], report, folder, step=7)

    logged = history(tmp_path)
    assert logged["edge/tflite/val_acc"] == 0.25
    assert logged["edge/torch/fp32_val_acc"] == 0.5
    assert logged["trainer/global_step"] == 7

    (table,) = tmp_path.rglob("offline-run-*/files/media/table/**/*.table.json")
    content = json.loads(table.read_text())
    rows = {row[0]: dict(zip(content["columns"], row, strict=True)) for row in content["data"]}
    assert rows["tflite int8 (quantized in training)"]["val_acc"] == 0.25
    assert rows["tflite int8 (quantized in training)"]["float_ops"] == "a, b"
    assert rows["executorch int8 (quantized in training)"]["error"] == "refused"

    (page,) = tmp_path.rglob("offline-run-*/files/media/html/**/*.html")
    assert page.read_text() == (folder / "report.html").read_text()

    artifacts = {record.artifact.type: record.artifact for record in records(tmp_path) if record.HasField("artifact")}
    found = artifacts["edge-model"]
    metadata = json.loads(found.metadata)
    assert metadata["sha256"] == {
        **{name: digest(folder / name) for name in ("report.json", "report.md", "report.html")},
        "model-int8.tflite": digest(folder / "model-int8.tflite"),
        "model-int8.mlpackage/Data/weight.bin": digest(folder / "model-int8.mlpackage" / "Data" / "weight.bin"),
    }
    assert {entry.path for entry in found.manifest.contents} == set(metadata["sha256"])
    assert {entry.path: entry.size for entry in found.manifest.contents}["model-int8.tflite"] == 4


def test_fit_with_an_offline_logger_leaves_all_of_it_in_the_run(tmp_path: Path, stub: Stub) -> None:
    files = tmp_path / "files"
    evaluation = DeviceEvaluationCallback(["stub"], str(files), timing=QUICK, calibration_batches=2)
    logger = WandbLogger(offline=True, save_dir=str(tmp_path))
    trainer(evaluation, max_epochs=1, logger=logger).fit(Classifier(), TRAINING, VALIDATION)
    assert evaluation.report is not None
    assert history(tmp_path)["edge/stub/val_acc"] == pytest.approx(evaluation.report.rows[-1].metrics["val_acc"])
    (artifact,) = [
        record.artifact
        for record in records(tmp_path)
        if record.HasField("artifact") and record.artifact.type == "edge-model"
    ]
    assert json.loads(artifact.metadata)["sha256"]["model-int8.stub"] == digest(files / "model-int8.stub")
    assert list(tmp_path.rglob("offline-run-*/files/media/table/**/*.table.json"))


class Width(Classifier):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_what_was_asked_and_what_came_of_it_is_in_every_logger(tmp_path: Path, stub: Stub) -> None:
    stub.refusal = ExportError("stub: refused")
    loggers: list[Any] = [
        WandbLogger(offline=True, save_dir=str(tmp_path)),
        CSVLogger(tmp_path, name="csv"),
    ]
    phases = [Prune(start=1, end=2, every=1, macs=0.6, round_to=1), Quantize(start=2)]
    evaluation = DeviceEvaluationCallback(
        ["stub"], str(tmp_path / "files"), timing=QUICK, strict=False, budget=Budget(size_bytes=10**6)
    )
    fitted = trainer(EdgeCompressionCallback(phases), evaluation, max_epochs=3, logger=loggers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted.fit(Width(8), TRAINING, VALIDATION)

    found = records(tmp_path)
    config = {
        entry.key or "/".join(entry.nested_key): json.loads(entry.value_json)
        for record in found
        for entry in [*record.config.update, *record.run.config.update]
    }
    saved = [yaml.safe_load((Path(logger.log_dir or "") / "hparams.yaml").read_text()) for logger in loggers[1:]]
    for asked in (config, *saved):
        assert asked["width"] == 8
        assert asked["edge"]["phases"]["prune"]["macs"] == 0.6
        assert asked["edge"]["phases"]["quantize"]["start"] == 2
        assert asked["edge"]["evaluation"]["targets"] == ["stub"]
        assert asked["edge"]["evaluation"]["budget"] == {"size_bytes": 10**6}

    with open(Path(loggers[1].log_dir or "") / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}
    for name in ("macs", "params", "channels"):
        assert logged[f"edge/prune/{name}"] == sorted(logged[f"edge/prune/{name}"], reverse=True)
    layers = [module for module in fitted.lightning_module.modules() if hasattr(module, "out_channels")]
    assert logged["edge/prune/channels"][-1] == layers[0].out_channels + 4
    assert logged["edge/stub/verdict"] == [-1.0]
    assert history(tmp_path)["edge/stub/verdict"] == -1.0


def test_metrics_go_to_every_logger(tmp_path: Path, report: Report, folder: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="one"), CSVLogger(tmp_path, name="two")]
    log_report(loggers, report, folder, step=3)
    for logger in loggers:
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            (row,) = csv.DictReader(file)
        assert float(row["edge/tflite/val_acc"]) == 0.25
        assert row["step"] == "3"


@pytest.mark.parametrize("error", [RuntimeError("broken"), TimeoutError("late"), wandb.errors.CommError("no network")])
def test_logger_that_fails_is_warned_of_and_the_next_one_is_served(
    tmp_path: Path, report: Report, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    broken, whole = CSVLogger(tmp_path, name="broken"), CSVLogger(tmp_path, name="whole")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(broken, "log_metrics", fail)
    with pytest.warns(UserWarning, match=f"CSVLogger did not take the report .*{error}"):
        log_report([broken, whole], report, folder)
    assert (Path(whole.log_dir) / "metrics.csv").exists()


def test_wandb_is_known_by_name(tmp_path: Path) -> None:
    """That nothing imports it on the way is in test_imports.py."""
    assert is_wandb(OfflineFallbackWandbLogger(offline=True, save_dir=str(tmp_path)))
    assert not is_wandb(CSVLogger(tmp_path))


def test_table_has_a_value_for_every_column(report: Report) -> None:
    columns, data = table_of(report)
    assert columns[:2] == ["candidate", "val_acc"]
    assert {len(row) for row in data} == {len(columns)}
    assert table_of(Report("m", "validate", ())) == (["candidate"], [])


def test_table_of_devices_has_a_value_or_none_for_every_column() -> None:
    rows = [
        DeviceRow("pi4", "onnx", "int8", "trained", metrics={"val_acc": 0.5}, change_to_host={"val_acc": 0.25}),
        DeviceRow("pi5", "onnx", "int8", "trained", "it is off"),
    ]
    columns, data = device_table_of(Report("m", "validate", (), devices=rows))
    assert columns == [
        "device",
        "target",
        "precision",
        "verdict",
        "error",
        "runtime",
        "val_acc",
        "val_acc_change_to_host",
    ]
    assert data == [
        ["pi4", "onnx", "int8", None, None, None, 0.5, 0.25],
        ["pi5", "onnx", "int8", None, "it is off", None, None, None],
    ]


def test_hashes_leave_out_files_that_were_not_made(report: Report, folder: Path) -> None:
    written = {"report.json", "report.md", "report.html"}
    assert set(hashes(report, folder)) == {*written, "model-int8.tflite", "model-int8.mlpackage/Data/weight.bin"}
    (folder / "report.html").unlink()
    assert "report.html" not in hashes(report, folder)


def test_server_that_does_not_answer_makes_the_run_offline(tmp_path: Path, report: Report, folder: Path) -> None:
    logger = OfflineFallbackWandbLogger(save_dir=str(tmp_path), answer_within_s=2, settings=wandb.Settings(**NO_SERVER))
    with pytest.warns(UserWarning, match=r"logs offline.*127.0.0.1:9 did not answer"):
        log_report([logger], report, folder, step=1)
    assert history(tmp_path)["edge/tflite/val_acc"] == 0.25


def test_run_that_does_not_begin_makes_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_edge.callbacks.tracking.answers", lambda url, within_s: True)
    begin, modes = wandb.init, []

    def refuse_online(**options: Any) -> Any:
        modes.append((options.get("mode"), options["settings"].init_timeout))
        if options.get("mode") != "offline":
            raise wandb.errors.CommError("Timed out initializing run")
        return begin(**options)

    monkeypatch.setattr(wandb, "init", refuse_online)
    logger = OfflineFallbackWandbLogger(save_dir=str(tmp_path), init_within_s=1.5)
    with pytest.warns(UserWarning, match=r"the run did not begin \(CommError: Timed out"):
        logger.log_metrics({"a": 1.0})
    assert modes == [(None, 1.5), ("offline", 1.5)]
    assert history(tmp_path)["a"] == 1.0


def test_lightnings_own_logger_without_network_fails_no_evaluation(
    tmp_path: Path, report: Report, folder: Path
) -> None:
    logger = WandbLogger(save_dir=str(tmp_path), mode="online", settings=wandb.Settings(**NO_SERVER))
    csv_logger = CSVLogger(tmp_path)
    begun = time.monotonic()
    with pytest.warns(UserWarning, match="WandbLogger did not take the report"):
        log_report([logger, csv_logger], report, folder)
    assert time.monotonic() - begun < 60
    assert (Path(csv_logger.log_dir) / "metrics.csv").exists()


def test_times_of_the_fallback_are_above_zero() -> None:
    with pytest.raises(ValueError, match="answer_within_s=0"):
        OfflineFallbackWandbLogger(answer_within_s=0)


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(403)

    def log_message(self, *args: Any) -> None:
        pass


def test_any_answer_of_a_server_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert answers(f"http://127.0.0.1:{server.server_port}", within_s=10)
    finally:
        server.shutdown()
        server.server_close()
    assert not answers(f"http://127.0.0.1:{server.server_port}", within_s=10)
    assert not answers("no address", within_s=10)


def test_silent_server_is_given_up() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not answers(f"http://127.0.0.1:{silent.getsockname()[1]}", within_s=0.3)
