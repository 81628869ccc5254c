"""An evaluation with devices: their rows in the report, and what of them is kept when something fails."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from boards import Server, free_port
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy

from lightning_edge import DeviceEvaluationCallback
from lightning_edge.devices import Device, Local
from lightning_edge.devices.conversation import Conversation
from lightning_edge.devices.remote import RemoteRunner, Times
from lightning_edge.devices.settings import Cool, DeviceSettings, Sustained
from lightning_edge.errors import DeviceError
from lightning_edge.evaluation.device_file import DeviceFile, limited
from lightning_edge.evaluation.evaluate import evaluate_module
from lightning_edge.evaluation.journal import Journal
from lightning_edge.evaluation.on_devices import check_devices, left_out, raise_device_failures, run_on_devices
from lightning_edge.evaluation.reference import Reference
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.validation import Validation
from lightning_edge.measure import Timing
from lightning_edge.network import Inputs
from lightning_edge.reporting.devices import DeviceRow, Endurance, Point, State
from lightning_edge.reporting.read import read_report
from lightning_edge.reporting.report import Report

pytest.importorskip("onnxruntime")
pytest.importorskip("litert_torch")

TIMING = Timing(warmup=2, repeats=5, time_limit_s=20)


def data(samples: int, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (samples,), generator=generator)
    images = torch.randn(samples, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=16)


TRAINING, VALIDATION = data(64, 0), data(56, 1)


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
        self.accuracy = Accuracy("multiclass", num_classes=4)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_acc", self.accuracy)
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


@dataclass
class Evaluated:
    """An evaluation, and what of it went to the devices."""

    report: Report
    files: list[DeviceFile]
    validation: Validation
    settings: EvaluationSettings

    def again(self, device: Device, *targets: str, **on_devices: Any) -> tuple[DeviceRow, ...]:
        """Run the files of these targets on another device."""
        files = [file for file in self.files if file.row.target in targets]
        settings = replace(self.settings, devices=[device], on_devices=DeviceSettings(**on_devices))
        return run_on_devices(files, self.validation, settings)


@pytest.fixture(scope="module")
def evaluated(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """Both targets on a board by SSH, on this machine, and on a board that is off."""
    folder = tmp_path_factory.mktemp("evaluated")
    described = {"board": server.device(), "away": server.device(port=free_port())}
    lines = []
    for name, device in described.items():
        given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(device).items()}
        given = {key: value for key, value in given.items() if value is not None} | {"python": device.python[0]}
        lines.append(f"{name}: " + json.dumps({"class_path": "lightning_edge.devices.Ssh", "init_args": given}))
    (folder / "boards.yaml").write_text("\n".join(lines))
    devices: list[str | Device] = ["away", "board", Local()]
    torch.manual_seed(0)
    validation = Validation(Classifier().eval(), VALIDATION)
    settings = EvaluationSettings(
        targets=["onnx", "tflite"],
        dirpath=folder / "files",
        timing=TIMING,
        fp32_files=False,
        devices=devices,
        on_devices=DeviceSettings(file=str(folder / "boards.yaml")),
    )
    kept: list[DeviceFile] = []

    def keep(files: list[DeviceFile], *others: Any) -> tuple[DeviceRow, ...]:
        kept.extend(files)
        return run_on_devices(files, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_edge.evaluation.evaluate.run_on_devices", keep)
        report = evaluate_module(validation, settings, calibration=lambda: [Inputs.of(batch[0]) for batch in TRAINING])
    return Evaluated(report, kept, validation, settings)


@pytest.fixture(scope="module")
def report(evaluated: Evaluated) -> Report:
    return evaluated.report


def rows(report: Report, device: str) -> list[DeviceRow]:
    return [row for row in report.devices if row.device == device]


def test_every_file_has_a_row_on_every_device(report: Report) -> None:
    assert [(row.device, row.target) for row in report.devices] == [
        (device, target) for device in ("away", "board", "local") for target in ("onnx", "tflite")
    ]
    assert report.failures == []


@pytest.mark.parametrize("device", ["board", "local"])
def test_what_is_computed_there_is_what_is_computed_here(report: Report, device: str) -> None:
    here = {row.target: row for row in report.rows if row.target != "torch"}
    for row in rows(report, device):
        assert row.error is None
        assert row.metrics == here[row.target].metrics
        assert row.change_to_host == {"val_acc": 0.0, "val_loss": 0.0}
        floats = next(other.metrics for other in report.rows if other.source == "float")
        assert row.change_to_float == {name: value - floats[name] for name, value in row.metrics.items()}
        assert row.fallback_share == here[row.target].fallback_share  # ONNX Runtime has no delegate
        assert (row.fallback_share is None) == (row.target == "onnx")
        assert set(row.metrics) == {"val_acc", "val_loss"}
        assert row.samples == 56
        assert row.max_steps == here[row.target].max_steps
        assert row.top1 == here[row.target].top1


@pytest.mark.parametrize("device", ["board", "local"])
def test_what_was_measured_there(report: Report, device: str) -> None:
    for row in rows(report, device):
        assert row.repeats == TIMING.repeats
        times = (row.p50_ms, row.p95_ms, row.p99_ms, row.first_ms, row.load_ms, row.throughput, row.peak_memory_bytes)
        apart = (row.preprocess_ms, row.transfer_ms, row.postprocess_ms, row.jitter_ms)
        assert all(value is not None and value > 0 for value in (*times, *apart))
        assert row.p50_ms is not None
        assert row.p99_ms is not None
        assert row.p50_ms <= row.p99_ms
        assert row.about is not None
        assert row.about.machine == os.uname().machine
        assert row.runtime is not None
        assert row.runtime.endswith(", 1 thread")
        assert row.session


def test_a_device_that_is_off_is_asked_once_and_the_others_go_on(report: Report) -> None:
    first, second = rows(report, "away")
    assert first.error is not None
    assert "refused the connection. Start the SSH server" in first.error
    assert second.error == first.error
    assert first.metrics == {}
    with pytest.raises(DeviceError, match=r"away: onnx int8, away: tflite int8: 127.0.0.1 port \d+ refused") as error:
        raise_device_failures(report)
    assert str(error.value).count("refused") == 1
    raise_device_failures(replace(report, devices=rows(report, "board")))


def test_devices_are_in_every_form_of_the_report(report: Report) -> None:
    text = report.to_markdown()
    assert "## On devices" in text
    assert "| board: tflite int8 | " in text
    assert "- Failed: away: onnx int8, away: tflite int8: 127.0.0.1" in text
    assert "- board: " in text
    assert "- away: it was not reached" in text
    console = Console(width=100, record=True, file=StringIO())
    console.print(report.table())
    printed = console.export_text()
    assert "On devices" in printed
    assert "board: onnx int8" in printed
    assert "FAILED on away: onnx int8, away: tflite int8: 127.0.0.1" in printed
    stored = json.loads(report.to_json())["devices"]
    assert [row["device"] for row in stored] == [row.device for row in report.devices]
    assert stored[2]["session"]["session.x64quantprecision"] in ("0", "1")
    assert stored[2]["session"]["intra_op_num_threads"] == "1"
    assert stored[3]["session"] == {"threads": "1"}
    flat = report.metrics()
    found = rows(report, "board")[1]
    assert flat["edge/board/tflite/latency_p50_ms"] == found.p50_ms
    assert flat["edge/board/tflite/val_acc"] == found.metrics["val_acc"]
    assert flat["edge/board/tflite/val_acc_change_to_host"] == 0.0
    assert flat["edge/board/tflite/transfer_ms"] == found.transfer_ms
    assert not [name for name in flat if name.startswith("edge/away/")]


def test_fewer_samples_and_latency_alone(evaluated: Evaluated) -> None:
    (row,) = evaluated.again(Local(), "onnx", limit_samples=17)
    assert row.samples == 32  # whole batches
    assert row.error is None
    (row,) = evaluated.again(Local(), "onnx", measure=["latency"])
    assert row.metrics == {}
    assert row.samples is None
    assert row.p50_ms is not None
    (row,) = evaluated.again(Local(), "onnx", measure=["accuracy"])
    assert row.metrics
    assert row.p50_ms is None
    assert row.peak_memory_bytes is not None


def test_a_long_run_of_calls_in_stretches(
    evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_edge.evaluation.on_device._KEPT_TIMES", 50)
    (row,) = evaluated.again(Local(), "onnx", measure=["latency"], sustained=Sustained(minutes=0.02))
    assert row.error is None
    assert row.sustained is not None
    points = row.sustained.points
    assert len(points) > 5
    assert [point.at_s for point in points] == sorted(point.at_s for point in points)
    assert all(0 < point.p50_ms <= point.p95_ms and point.calls >= 1 for point in points)
    assert max(point.calls for point in points) > 50  # more calls than times that are told
    assert dict(row.flat())["edge/local/onnx/sustained_warm_p50_ms"] == row.sustained.warm_p50_ms
    report = replace(evaluated.report, devices=(row,))
    assert "local: onnx int8, one call after another: p50 " in report.to_markdown()
    report.write(tmp_path)
    found = read_report(tmp_path)
    assert found.remarks == ()
    assert found.report.devices == (row,)


def test_a_long_run_that_breaks_off_keeps_its_stretches(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    times, stretches = RemoteRunner.times, []

    def break_in_the_fourth(self: RemoteRunner, *given: Any, **named: Any) -> Times:
        stretches.append(given)
        if len(stretches) == 5:  # the first is of `latency`
            os.kill(self._asked._pids[1], signal.SIGSEGV)
        return times(self, *given, **named)

    monkeypatch.setattr(RemoteRunner, "times", break_in_the_fourth)
    (row,) = evaluated.again(Local(), "onnx", sustained=Sustained(minutes=0.5))
    assert row.error is not None
    assert "the runtime crashed (SIGSEGV) while calls were timed" in row.error
    assert row.sustained is not None
    assert len(row.sustained.points) == 3
    assert row.p50_ms is not None


def test_a_run_waits_until_the_device_is_cool(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_edge.evaluation.on_device._COOL_STEP_S", 0.001)
    told: list[float | None] = [60.0, 50.0, 44.0, 70.0]
    monkeypatch.setattr(RemoteRunner, "state", lambda self: State(told.pop(0)))
    cool = Cool(below_c=45.0, minutes=0.1)
    (row,) = evaluated.again(Local(), "onnx", measure=["latency"], cool=cool)
    assert row.error is None
    assert row.p50_ms is not None
    assert told == [70.0]
    told[:] = [70.0] * 10_000
    (row,) = evaluated.again(Local(), "onnx", measure=["latency"], cool=replace(cool, minutes=0.0001))
    assert row.error == (
        "local is at 70.0 °C after 0.0001 minutes of waiting for 45 °C. Cool it, or give a higher cool.below_c"
    )
    assert row.p50_ms is None
    told[:] = [None]
    (row,) = evaluated.again(Local(), "onnx", measure=["latency"], cool=cool)
    assert row.error == "local does not tell how warm it is. Leave cool out"


def test_energy_by_the_users_meter(evaluated: Evaluated, tmp_path: Path) -> None:
    meter = tmp_path / "meter"
    # The square of the time: what comes later takes more, so that calls take more than waiting before them.
    meter.write_text(f"#!{sys.executable}\nimport time\nprint((time.time() - {time.time()}) ** 2)\n")
    meter.chmod(0o755)
    (row,) = evaluated.again(Local(meter=[str(meter)]), "onnx", measure=["energy"], energy_seconds=1.0)
    assert row.error is None
    assert row.energy_mj is not None
    assert row.energy_mj > 0
    assert row.energy_note is not None
    assert row.energy_note.startswith(f"the meter that {meter} reads: ")
    assert (row.p50_ms, row.samples) == (None, None)


def test_without_a_counter_there_is_no_energy(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"calls": 3, "seconds": 1.5, "joules": None, "source": "no counter here"}
    ask = Conversation.ask

    def asked(self: Conversation, when: str, message: dict[str, Any], *given: Any) -> Any:
        return (told, []) if message["do"] == "energy" else ask(self, when, message, *given)

    monkeypatch.setattr(Conversation, "ask", asked)
    (row,) = evaluated.again(Local(), "onnx", measure=["energy"], energy_seconds=1.0)
    assert (row.error, row.energy_mj, row.energy_note) == (None, None, "not measured: no counter here")
    told["seconds"] = 0.5
    (row,) = evaluated.again(Local(), "onnx", measure=["energy"], energy_seconds=1.0)
    assert row.error is not None
    assert "answered with calls=3 in 0.5 s" in row.error


def test_a_program_of_the_device_gives_times_in_the_place_of_python(evaluated: Evaluated, tmp_path: Path) -> None:
    program = tmp_path / "benchmark_model"
    said = "count=5 first=9 curr=9 min=9 max=9 avg=12.5 std=0 p5=9 median=10 p95=20"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    device = Local("/no/python", programs={"tflite": [str(program)]})
    (row,) = evaluated.again(device, "tflite")
    assert row.error is None
    assert (row.p50_ms, row.p95_ms, row.throughput, row.repeats) == (0.01, 0.02, 80000.0, 5)
    assert (row.metrics, row.samples, row.verdict) == ({}, None, None)
    assert row.runtime == "benchmark_model, a program of the device, which gives times only"
    settings = replace(evaluated.settings, targets=["tflite"], devices=[device])
    assert check_devices(settings) == []
    assert "/no/python cannot be started" in check_devices(replace(settings, targets=["tflite", "onnx"]))[0]


def test_the_speed_of_an_emulated_device_is_not_measured(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Local, "times", False)
    (row,) = evaluated.again(Local(), "onnx", sustained=Sustained(), cool=Cool(1.0), limit_samples=8)
    assert row.error is None
    assert row.metrics
    assert (row.p50_ms, row.load_ms, row.sustained, row.energy_note) == (None, None, None, None)
    assert row.runtime is not None
    assert row.runtime.endswith("emulated: how long it takes says nothing")
    settings = replace(evaluated.settings, devices=["local"], on_devices=DeviceSettings(measure=["latency"]))
    assert check_devices(settings) == ["local is emulated: how long it takes says nothing. Add accuracy to measure"]


@pytest.mark.parametrize(
    ("medians", "cold", "warm", "slower_after_s"),
    [
        ([1.0, 1.0, 1.1, 1.0], 1.0, 1.0, None),
        ([1.0, 1.0, 1.3, 1.4, 1.5], 1.0, 1.5, 20.0),
        ([1.0, 1.5, 1.0, 1.0, 1.0], 1.0, 1.0, None),  # not for good
        ([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.3, 1.5], 2.0, 1.4, 80.0),
        ([1.0], 1.0, 1.0, None),
    ],
)
def test_a_device_that_slows_down_for_good(
    medians: list[float], cold: float, warm: float, slower_after_s: float | None
) -> None:
    heat = [State(temperature_c=40.0 + index) for index in range(len(medians))]
    points = [Point(10.0 * (index + 1), 5, p50, p50, heat[index]) for index, p50 in enumerate(medians)]
    found = Endurance.of(points)
    assert (found.cold_p50_ms, found.warm_p50_ms, found.slower_after_s) == (cold, warm, slower_after_s)
    assert f"{cold:.3f} ms at first, {warm:.3f} ms at the end" in str(found)
    assert f"40 to {39 + len(medians)} °C" in str(found)
    assert ("did not slow down" in str(found)) == (slower_after_s is None)


@pytest.mark.parametrize(
    ("before", "samples", "after"),
    [(1.0, 17, 2), (1.0, None, 1.0), (3, 17, 2), (1, 17, 1), (0.5, 17, 2), (0.25, 500, 1), (1.0, 10_000, 625)],
)
def test_a_limit_of_samples_is_one_of_batches(before: int | float, samples: int | None, after: int | float) -> None:
    reference = Reference(nn.Identity())
    reference.calls.append(Inputs.of(torch.zeros(16, 1)))
    found = limited(Validation(Classifier(), VALIDATION, limit_batches=before), reference, samples).limit_batches
    assert found == after
    assert type(found) is type(after)


def test_targets_without_a_runtime_on_devices_are_passed_over_and_told(evaluated: Evaluated) -> None:
    settings = replace(evaluated.settings, targets=["coreml", "onnx", "executorch"])
    told = " does not run files of coreml and executorch."
    assert left_out(settings) == [f"{name}{told}" for name in ("away", "board", "local")]
    assert left_out(evaluated.settings) == left_out(replace(settings, devices=())) == []
    other = replace(evaluated.files[0], row=replace(evaluated.files[0].row, target="coreml"))
    assert run_on_devices([other], evaluated.validation, evaluated.settings) == ()


def test_a_file_of_devices_that_went_away_during_the_training_costs_no_report(evaluated: Evaluated) -> None:
    settings = replace(evaluated.settings, devices=["pi4"], on_devices=DeviceSettings(file="gone.yaml"))
    found = run_on_devices(evaluated.files, evaluated.validation, settings)
    assert [(row.device, row.error is not None and "'gone.yaml'" in row.error) for row in found] == [("pi4", True)] * 2


def test_a_device_that_computes_something_else(evaluated: Evaluated, python: Callable[..., str]) -> None:
    lying = python(
        {
            "onnxruntime/__init__.py": "import numpy\n__version__ = '0'\n"
            "class SessionOptions:\n    def add_session_config_entry(self, name, value): pass\n"
            "class ExecutionMode:\n    ORT_SEQUENTIAL = 0\n"
            "class Value:\n    name = 'x'\n"
            "class InferenceSession:\n    def __init__(self, *arguments, **options): pass\n"
            "    def get_inputs(self): return [Value()]\n"
            "    def run(self, names, feed): return [numpy.ones((1, 4), 'float32') * 1e6]\n"
        }
    )
    (row,) = evaluated.again(Local(lying), "onnx")
    assert row.error is not None
    assert row.error.startswith("local: model-int8.onnx computes something else there than the network it came from")
    assert row.max_steps is not None
    assert row.max_steps > 1000
    assert row.metrics
    assert row.p50_ms is not None


def test_what_was_measured_before_the_connection_broke_is_kept(
    server: Server, evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run = RemoteRunner.__call__

    def cut_in_the_third_batch(self: RemoteRunner, tensors: list[Tensor]) -> list[Tensor]:
        calls.append(tensors)
        if len(calls) == 40:
            os.kill(self._asked._pids[1], signal.SIGKILL)
        return run(self, tensors)

    monkeypatch.setattr(RemoteRunner, "__call__", cut_in_the_third_batch)
    first, second = evaluated.again(server.device(), "onnx", "tflite")
    assert first.error is not None
    assert "the runtime was killed while it ran a sample" in first.error
    assert first.p50_ms is not None
    assert first.samples == 32  # two whole batches
    assert first.max_steps is not None
    assert first.metrics == {}
    assert second.error is None
    assert second.samples == 56


def test_a_run_that_broke_off_measures_only_what_is_missing(
    server: Server, evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []
    run, init = RemoteRunner.__call__, RemoteRunner.__init__

    def counted(self: RemoteRunner, tensors: list[Tensor]) -> list[Tensor]:
        calls.append("run")
        if len(calls) == 1 + 40:
            os.kill(self._asked._pids[1], signal.SIGKILL)
        return run(self, tensors)

    def begun(self: RemoteRunner, *given: Any) -> None:
        calls.append("load")
        init(self, *given)

    monkeypatch.setattr(RemoteRunner, "__call__", counted)
    monkeypatch.setattr(RemoteRunner, "__init__", begun)
    settings = replace(evaluated.settings, dirpath=tmp_path, devices=[server.device()], on_devices=DeviceSettings())
    told: list[str] = []

    def measured(
        files: list[DeviceFile] = evaluated.files, validation: Validation = evaluated.validation, resume: bool = True
    ) -> tuple[DeviceRow, ...]:
        calls.clear()
        return run_on_devices(files, validation, settings, told.append, Journal(settings, resume))

    broken, whole = measured(resume=False)
    assert broken.error is not None
    assert (broken.samples, whole.error, whole.samples) == (32, None, 56)
    assert (tmp_path / "devices.journal").exists()
    other = replace(evaluated.files[0], row=replace(evaluated.files[0].row, sha256="0" * 64))
    (row,) = measured([other])
    assert row.error is not None
    assert row.error.startswith("model-int8.onnx is another file than the one that was measured before the run broke")
    assert calls == []
    row, again = measured(validation=replace(evaluated.validation, dataloaders=data(56, 2)))
    assert row.error is not None
    assert row.error.startswith("the samples are not those that ran before the run broke off (batch 1)")
    assert again.error == row.error  # although nothing was missing
    assert calls == ["load"]
    told.clear()
    row, again = measured()
    assert (row.error, again.error) == (None, None)
    assert told == ["Going on with 127.0.0.1: onnx int8", "Going on with 127.0.0.1: tflite int8"]
    assert calls == ["load", *["run"] * 24]  # of one file, what is behind the two batches
    assert (row.p50_ms, row.first_ms, row.jitter_ms) == (broken.p50_ms, broken.first_ms, broken.jitter_ms)
    for found, board in zip((row, again), rows(evaluated.report, "board"), strict=True):
        assert (found.metrics, found.samples, found.max_steps) == (board.metrics, 56, board.max_steps)
        assert (found.verdict, found.change_to_host) == (board.verdict, board.change_to_host)
    assert again == replace(whole, load_ms=again.load_ms)
    assert not (tmp_path / "devices.journal").exists()


def fit(folder: Path, *, strict: bool = True, **options: Any) -> DeviceEvaluationCallback:
    callback = DeviceEvaluationCallback(
        ["onnx"], str(folder / "files"), timing=TIMING, fp32_files=False, strict=strict, **options
    )
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(folder, name="log"),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    trainer.fit(Classifier(), TRAINING, VALIDATION)
    return callback


def test_a_fit_ends_with_figures_of_the_device_in_the_logger(tmp_path: Path, server: Server) -> None:
    callback = fit(tmp_path, devices=[server.device()], on_devices=DeviceSettings(limit_samples=16))
    assert callback.report is not None
    (row,) = callback.report.devices
    assert row.error is None
    here = next(other.metrics for other in callback.report.rows if other.target == "onnx")
    assert row.metrics["val_loss"] != here["val_loss"]  # those of 16 samples and of all
    assert row.change_to_host == {"val_acc": 0.0, "val_loss": 0.0}
    assert set(row.change_to_float) == {"val_acc", "val_loss"}
    assert "edge/127.0.0.1/onnx/latency_p50_ms" in next(tmp_path.glob("log/*/metrics.csv")).read_text()


def test_a_device_that_is_off_is_told_before_the_training(tmp_path: Path, server: Server) -> None:
    off = server.device(port=free_port())
    with pytest.raises(DeviceError, match=r"^127.0.0.1: 127.0.0.1 port \d+ refused the connection"):
        fit(tmp_path, devices=[off])
    assert not (tmp_path / "files").exists()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = fit(tmp_path, strict=False, devices=[off])
    said = [str(entry.message) for entry in caught]
    assert any(text.startswith("Nothing may be measured on 127.0.0.1: ") for text in said)
    assert any(text.startswith("failed on a device: 127.0.0.1: onnx int8: ") for text in said)
    assert callback.report is not None
    assert callback.report.failures == []
    with pytest.raises(DeviceError, match=r"none.yaml', which describes devices by name"):
        fit(tmp_path, strict=False, devices=["pi4"], on_devices=DeviceSettings(file=str(tmp_path / "none.yaml")))


def test_a_runtime_that_is_missing_is_told_before_the_training(tmp_path: Path, python: Callable[..., str]) -> None:
    hidden = "import sys, importlib.util as util\nfind = util.find_spec\n" + (
        "util.find_spec = lambda name: None if name == 'onnxruntime' else find(name)\n"
    )
    with pytest.raises(DeviceError, match=r"^local: install on the device: .*python -m pip install onnxruntime$"):
        fit(tmp_path, devices=[Local(python({"sitecustomize.py": hidden}))])


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Lightning's advice on loaders is not what these tests are about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        yield
