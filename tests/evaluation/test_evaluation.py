"""From a finished fit to files and report: with real files once, with a target of our own where things go wrong."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy, MeanMetric, MeanSquaredError

from lightning_edge import DeviceEvaluationCallback, EdgeCompressionCallback, Prune, Quantize
from lightning_edge.contents import Placements
from lightning_edge.errors import BudgetError, EdgeError, ExportError, MissingExtraError
from lightning_edge.evaluation.evaluate import evaluate_module
from lightning_edge.evaluation.hooks import EvaluationHook
from lightning_edge.evaluation.refusals import raise_failures, raise_over_budget
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.validation import Validation
from lightning_edge.exporters import TARGETS, Contents, ExportWarning, Target, TensorSpec, load, options_of
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.measure import Timing, Tolerance, parameter_count
from lightning_edge.network import Deployable, Inputs, flatten_outputs
from lightning_edge.reporting.budget import Budget
from lightning_edge.reporting.manifest import Manifest
from lightning_edge.reporting.monitor import Monitor
from lightning_edge.reporting.read import read_report
from lightning_edge.reporting.report import Report, Row, digest
from lightning_edge.reporting.verification import verify

ISOLATED = True
QUICK = Timing(warmup=1, repeats=3)


def data(samples: int, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (samples,), generator=generator)
    images = torch.randn(samples, 1, 8, 8, generator=generator) * 0.4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, label // 2 * 4 : label // 2 * 4 + 4, label % 2 * 4 : label % 2 * 4 + 4] += 1.5
    return DataLoader(TensorDataset(images, labels), batch_size=32)


TRAINING, VALIDATION = data(160, 0), data(72, 1)


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
        )
        self.accuracy = Accuracy("multiclass", num_classes=4)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_acc", self.accuracy)
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings = {"max_epochs": 2, "logger": False, **options}
    return L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@dataclass
class Fitted:
    targets: tuple[str, ...]
    folder: Path
    report: Report
    module: Classifier
    logs: Path
    printed: str


@pytest.fixture(
    scope="module",
    params=[("tflite",), pytest.param(("executorch", "tflite"), marks=pytest.mark.slow)],
    ids="+".join,
)
def fitted(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Fitted:
    """One fit with quantization-aware training and real targets."""
    targets: tuple[str, ...] = request.param
    for name in targets:
        pytest.importorskip({"tflite": "litert_torch"}.get(name, name))
    folder = tmp_path_factory.mktemp("fitted")
    L.seed_everything(3)
    module = Classifier()
    evaluation = DeviceEvaluationCallback(list(targets), str(folder / "files"), timing=QUICK)
    capture = request.config.pluginmanager.getplugin("capturemanager")
    logger = CSVLogger(folder, name="log")
    capture.read_global_capture()
    trainer(EdgeCompressionCallback([Quantize(start=0.5)]), evaluation, logger=logger).fit(module, TRAINING, VALIDATION)
    printed = capture.read_global_capture().out
    assert evaluation.report is not None
    return Fitted(targets, folder / "files", evaluation.report, module, Path(logger.log_dir), printed)


TARGET_SUFFIXES = {"executorch": ".pte", "tflite": ".tflite"}


def test_every_candidate_has_a_row_with_the_users_metrics(fitted: Fitted) -> None:
    assert [row.label for row in fitted.report.rows] == [
        "torch fp32",
        "torch int8 (quantized after training)",
        "torch int8 (quantized in training)",
        *(f"{name} {form}" for name in fitted.targets for form in ("fp32", "int8 (quantized in training)")),
    ]
    assert fitted.report.failures == []
    for row in fitted.report.rows:
        assert set(row.metrics) == {"val_acc", "val_loss"}
        assert row.metrics["val_acc"] > 0.5


def test_layers_classes_and_times_are_in_the_report_that_is_read_back(fitted: Fitted) -> None:
    report = read_report(fitted.folder).report
    assert [(layer.name, layer.precision) for layer in report.layers] == [("0", "int8"), ("4", "int8")]
    assert [layer.float_bytes for layer in report.layers] == [4 * (72 + 8), 4 * (512 + 4)]
    assert [layer.bytes for layer in report.layers] == [72 + 4 * 8, 512 + 4 * 4]
    assert all(layer.increase is not None and layer.increase > 0 for layer in report.layers)
    assert report.rows[0].classes is None  # the float network itself
    for row in report.rows[1:]:
        assert row.classes is not None
        assert row.classes.samples == 72
        assert sum(samples for samples, _, _ in row.classes.by_class) == 72
        right = sum(now for _, _, now in row.classes.by_class)
        assert right / 72 == pytest.approx(row.metrics["val_acc"])
    for row in report.rows[3:]:
        assert len(row.quantiles_ms) == 21
        assert list(row.quantiles_ms) == sorted(row.quantiles_ms)
        assert row.p50_ms == pytest.approx(row.quantiles_ms[10])


def test_metric_of_a_file_is_that_of_running_it_by_hand(fitted: Fitted) -> None:
    for row in fitted.report.rows[3:]:
        assert row.path is not None
        artifact = load(fitted.folder / row.path)
        correct = sum(int((artifact(images)[0].argmax(1) == labels).sum()) for images, labels in VALIDATION)
        assert row.metrics["val_acc"] == pytest.approx(correct / 72)


def test_row_of_the_trained_network_is_that_of_the_module_itself(fitted: Fitted) -> None:
    with torch.no_grad():
        correct = sum(
            int((fitted.module.net.eval()(images).argmax(1) == labels).sum()) for images, labels in VALIDATION
        )
    assert fitted.report.rows[2].metrics["val_acc"] == pytest.approx(correct / 72, abs=2 / 72)


def test_files_are_described_and_hashed(fitted: Fitted) -> None:
    for row in fitted.report.rows[3:]:
        assert row.path is not None
        file = fitted.folder / row.path
        assert (row.sha256, row.size_bytes) == (digest(file), file.stat().st_size)
        assert row.samples == 72
        assert row.int8_weight_share == (1.0 if row.precision == "int8" else 0.0)
        assert row.p50_ms is not None
        assert row.p99_ms is not None
        assert row.p50_ms <= row.p99_ms
        assert "XNNPACK" in str(row.runtime)
        if sys.platform.startswith("linux"):  # told for a process of its own only
            assert row.peak_memory_bytes is not None
            assert 0 < row.peak_memory_bytes < 32 * 2**20
        assert (row.max_steps is None) == (row.precision == "fp32")
    suffixes = [TARGET_SUFFIXES[name] for name in fitted.targets]
    files = {f"model-{precision}{suffix}" for precision in ("fp32", "int8") for suffix in suffixes}
    written = {"manifest.json", *files, "report.html", "report.json", "report.md"}
    assert {path.name for path in fitted.folder.iterdir()} == written


def test_manifest_holds_what_the_report_does_and_the_folder_keeps_to_it(fitted: Fitted) -> None:
    manifest = Manifest.read(fitted.folder)
    rows = {row.path: row for row in fitted.report.rows[3:]}
    assert {entry.path for entry in manifest.files} == {*rows}
    for entry in manifest.files:
        row = rows[entry.path]
        assert (entry.sha256, entry.metrics, entry.latency["p95_ms"]) == (row.sha256, row.metrics, row.p95_ms)
        assert entry.agreement["samples"] == 72
        # The network: one convolution of 8 filters with its folded BatchNorm, one linear layer.
        assert entry.placements is not None
        assert entry.placements.macs == 16 * 8 * 9 + 128 * 4
    assert manifest.versions["torch"] == version("torch")
    assert manifest.recipe is None
    assert verify(fitted.folder) == []


def test_simulated_int8_has_no_latency(fitted: Fitted) -> None:
    float_row, *int8 = fitted.report.rows[:3]
    assert float_row.p50_ms is not None
    assert [row.p50_ms for row in int8] == [None, None]


def test_settings_are_stated(fitted: Fitted) -> None:
    content = json.loads((fitted.folder / "report.json").read_text())
    assert (content["seed"], content["warmup"], content["repeats"], content["threads"]) == (3, 1, 3, 1)
    assert content["calibration_batches"] == 5
    assert content["versions"]["torch"] == version("torch")
    assert "when quantization-aware training began" in (fitted.folder / "report.md").read_text()


def test_table_is_printed(fitted: Fitted) -> None:
    assert "Classifier" in fitted.printed
    assert "on the device" not in fitted.printed
    assert all(f"{name} int8" in fitted.printed for name in fitted.targets)


def test_metrics_are_in_the_loggers(fitted: Fitted) -> None:
    with open(fitted.logs / "metrics.csv") as file:
        logged = [row for row in csv.DictReader(file) if row["edge/tflite/val_acc"]]
    assert float(logged[-1]["edge/tflite/val_acc"]) == pytest.approx(fitted.report.rows[-1].metrics["val_acc"])
    assert float(logged[-1][f"edge/{fitted.targets[0]}/fp32_size_bytes"]) == fitted.report.rows[3].size_bytes


# A target of our own, so that what may go wrong does, and fast.


class Stub:
    """Keeps networks in memory; a file holds a number only."""

    def __init__(self) -> None:
        self.networks: dict[str, Deployable] = {}
        self.offset = 0.0
        self.extra_column = False
        self.refusal: Exception | None = None
        self.warning: str | None = None
        self.is_reference = False
        self.not_run: str | None = None

    def module(self) -> ModuleType:
        stub = self

        class StubTarget(Target):
            suffix = ".stub"
            extra = "stub"
            needs: ClassVar[tuple[str, ...]] = ()
            in_process = True

            def write(self, network: Deployable, path: Path, *, flavor: str = "plain") -> None:
                if stub.refusal is not None:
                    raise stub.refusal
                if stub.warning is not None:
                    warnings.warn(stub.warning, ExportWarning, stacklevel=2)
                key = str(len(stub.networks))
                stub.networks[key] = network
                path.write_text(key)

            def inspect(self, path: Path) -> Contents:
                network = stub.networks[path.read_text()]
                int8 = network.precision == "int8"
                return Contents(100 if int8 else 0, 0 if int8 else 400, {"conv": 1}, planned_memory_bytes=64)

            def open(self, path: Path, threads: int) -> Runner:
                return stub.runner(stub.networks[path.read_text()])

            def not_run_here(self, contents: Contents) -> str | None:
                return stub.not_run

        module = ModuleType("stub_target")
        vars(module)["TARGET"] = StubTarget()
        return module

    def runner(self, network: Deployable) -> Runner:
        stub = self

        class StubRunner(Runner):
            runtime = "stub"
            is_reference = stub.is_reference
            inputs = tuple(TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in network.inputs.tensors)

            def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
                outputs = flatten_outputs(network(*tensors))
                if stub.extra_column:
                    return [torch.cat([output, output[:, :1]], 1) for output in outputs]
                return [output + stub.offset for output in outputs]

        return StubRunner()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    found = Stub()
    monkeypatch.setitem(sys.modules, "stub_target", found.module())
    monkeypatch.setitem(TARGETS, "stub", "stub_target")
    return found  # type: ignore[return-value]


def evaluate(
    folder: Path,
    module: L.LightningModule | None = None,
    *,
    validation: Validation | None = None,
    calibration: Callable[[], list[Inputs]] | None = None,
    baseline: nn.Module | None = None,
    tell: Callable[[str], None] = str,
    **chosen: Any,
) -> Report:
    validation = validation or Validation(module or Classifier(), VALIDATION)
    settings = EvaluationSettings(["stub"], folder, timing=QUICK, **chosen)
    return evaluate_module(validation, settings, calibration=calibration, baseline=baseline, tell=tell)


def calibration() -> list[Inputs]:
    return [Inputs.of(images) for images, _ in TRAINING]


def test_network_that_was_not_trained_quantized_is_quantized_after_training(stub: Stub, tmp_path: Path) -> None:
    report = evaluate(tmp_path, calibration=calibration)
    assert [row.label for row in report.rows] == [
        "torch fp32",
        "torch int8 (quantized after training)",
        "stub fp32",
        "stub int8 (quantized after training)",
    ]
    assert report.rows[3].max_steps == 0.0
    assert report.rows[3].planned_memory_bytes == 64
    assert report.rows[3].metrics == report.rows[1].metrics


def test_without_calibration_there_is_no_int8_and_the_report_says_so(stub: Stub, tmp_path: Path) -> None:
    report = evaluate(tmp_path)
    assert [row.label for row in report.rows] == ["torch fp32", "stub fp32"]
    assert any("no int8 network" in note for note in report.notes)


def test_float_files_can_be_left_out(stub: Stub, tmp_path: Path) -> None:
    report = evaluate(tmp_path, calibration=calibration, fp32_files=False)
    assert [row.label for row in report.rows if row.target == "stub"] == ["stub int8 (quantized after training)"]


def test_file_that_differs_is_kept_with_its_verdict(stub: Stub, tmp_path: Path) -> None:
    stub.offset = 0.05
    told: list[str] = []
    report = evaluate(tmp_path, tell=told.append)
    row = report.rows[1]
    assert (row.verdict, row.error, row.path, row.samples) == ("differs", None, "model-fp32.stub", 72)
    assert "of the largest output, allowed 0.001" in str(row.verdict_reason)
    assert "val_acc is" in str(row.verdict_reason)  # what it costs
    assert f"stub fp32 {row.judgement}" in told
    (entry,) = Manifest.read(tmp_path).files
    assert (entry.verdict, entry.verdict_reason) == (row.verdict, row.verdict_reason)
    assert json.loads((tmp_path / "report.json").read_text())["rows"][1]["verdict"] == "differs"
    assert report.metrics()["edge/stub/fp32_verdict"] == 1.0
    raise_failures(report)
    with pytest.raises(ExportError, match=r"1 compute something else.*strict='close'.*: stub fp32 differs\."):
        raise_failures(report, "close")


def test_broken_file_is_kept_and_an_error_when_all_is_written(stub: Stub, tmp_path: Path) -> None:
    stub.offset = math.nan
    report = evaluate(tmp_path)
    assert (report.rows[1].verdict, report.failures) == ("broken", [])
    assert (tmp_path / "model-fp32.stub").is_file()
    assert Manifest.read(tmp_path).files[0].verdict == "broken"
    with pytest.raises(ExportError, match=r"and are kept: stub fp32 broken\."):
        raise_failures(report)
    raise_failures(report, strict=False)


def test_report_and_page_tell_what_was_cut(stub: Stub, tmp_path: Path) -> None:
    module = Classifier()
    evaluation = DeviceEvaluationCallback(["stub"], str(tmp_path), timing=QUICK, calibration_batches=2)
    phases = [Prune(params=0.5, start=0, end=0, round_to=2), Quantize(start=0.5)]
    trainer(EdgeCompressionCallback(phases), evaluation).fit(module, TRAINING, VALIDATION)
    assert evaluation.report is not None
    assert evaluation.report.channels == {"0": (8, module.net[0].out_channels)}
    assert module.net[0].out_channels < 8
    assert json.loads((tmp_path / "report.json").read_text())["channels"] == {"0": [8, module.net[0].out_channels]}
    assert "What was cut" in (tmp_path / "report.html").read_text()
    original = evaluation.report.original
    assert original is not None
    assert original.parameters == parameter_count(Classifier().net) > (evaluation.report.parameters or 0)
    assert original.macs is not None
    assert original.macs > (evaluation.report.macs or 0) > 0
    # A run from Python says what was asked of it, as a run of a configuration does.
    assert read_report(tmp_path).report.phases["prune"]["params"] == 0.5
    assert Manifest.read(tmp_path).phases["quantize"]["start"] == 0.5


def test_file_with_outputs_of_another_shape_is_broken(stub: Stub, tmp_path: Path) -> None:
    stub.extra_column = True
    row = evaluate(tmp_path).rows[1]
    assert (row.verdict, row.metrics) == ("broken", {})
    assert "the outputs have shapes" in str(row.verdict_reason)


def test_tolerance_says_what_is_close(stub: Stub, tmp_path: Path) -> None:
    stub.offset = 0.05
    assert evaluate(tmp_path, tolerance=Tolerance(max_relative=1e9)).rows[1].verdict == "close"


def test_failure_is_told_when_it_happens_and_is_a_number_in_the_loggers(stub: Stub, tmp_path: Path) -> None:
    stub.refusal = ExportError("no such operation")
    told: list[str] = []
    report = evaluate(tmp_path, tell=told.append)
    assert "FAILED: stub fp32, there is no such file: no such operation" in told
    assert report.metrics()["edge/stub/fp32_verdict"] == -1.0


class WithoutMetrics(Classifier):
    validation_step = L.LightningModule.validation_step  # type: ignore[assignment]


def test_int8_network_that_is_noise_beside_float_is_told_with_its_layers(stub: Stub, tmp_path: Path) -> None:
    module = WithoutMetrics()
    evaluated = evaluate(tmp_path, module, calibration=calibration)
    assert not [warning for warning in evaluated.warnings if "int8 leaves little" in warning]
    # Ranges of data a thousand times as large leave one step to what comes.
    with pytest.warns(UserWarning, match="int8 leaves little of the float network's outputs: signal to noise is"):
        report = evaluate(tmp_path, module, calibration=lambda: [Inputs.of(images * 1000) for images, _ in TRAINING])
    (told,) = [warning for warning in report.warnings if "int8 leaves little" in warning]
    assert "The layers that lose most by themselves: " in told


@pytest.mark.parametrize("refusal", [ExportError("no such operation"), MemoryError("out of memory")])
def test_target_that_fails_does_not_stop_the_others(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    other = Stub()
    other.refusal = refusal
    monkeypatch.setitem(sys.modules, "other_target", other.module())
    monkeypatch.setitem(TARGETS, "other", "other_target")
    report = evaluate_module(
        Validation(Classifier(), VALIDATION), EvaluationSettings(["other", "stub"], tmp_path, timing=QUICK)
    )
    assert [(row.label, row.error is None) for row in report.rows[1:]] == [("other fp32", False), ("stub fp32", True)]
    assert str(refusal) in str(report.rows[1].error)
    assert json.loads((tmp_path / "report.json").read_text())["rows"][1]["error"] == report.rows[1].error


def test_warning_of_an_export_is_in_the_report(stub: Stub, tmp_path: Path) -> None:
    stub.warning = "softmax computes in float"
    with pytest.warns(ExportWarning, match="softmax"):
        report = evaluate(tmp_path)
    assert report.warnings == ("stub fp32: softmax computes in float",)


def test_reference_interpreter_has_no_latency(stub: Stub, tmp_path: Path) -> None:
    stub.is_reference = True
    report = evaluate(tmp_path)
    assert report.rows[1].p50_ms is None
    assert "-\\*" in report.to_markdown()


def test_a_file_that_cannot_run_here_is_kept_and_has_no_numbers_of_what_it_computes(stub: Stub, tmp_path: Path) -> None:
    stub.not_run = "there is no stub on this machine"
    budget = Budget(size_bytes=1000, latency_p95_ms=1000.0, load_ms=1000.0)
    with pytest.warns(ExportWarning, match="it was NOT run: there is no stub on this machine"):
        report = evaluate(tmp_path, budget=budget)
    row = report.rows[1]
    assert (row.error, row.not_run, row.size_bytes) == (None, stub.not_run, 1)
    assert row.metrics == {}
    assert {row.samples, row.top1, row.max_relative, row.p50_ms, row.load_ms, row.peak_memory_bytes} == {None}
    assert row.within_budget is None
    assert (tmp_path / "model-fp32.stub").is_file()
    assert "edge/stub/fp32_val_acc" not in report.metrics()
    assert any("NOT run" in warning for warning in report.warnings)
    (entry,) = Manifest.read(tmp_path).files
    assert (entry.not_run, entry.agreement, entry.latency, entry.metrics) == (stub.not_run, {}, {}, {})


def test_module_without_a_step_has_agreement_and_latency_and_a_note(stub: Stub, tmp_path: Path) -> None:
    class Bare(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Classifier().net

    report = evaluate(tmp_path, Bare())
    assert report.rows[1].samples == 72
    assert report.rows[1].metrics == {}
    assert report.rows[1].p50_ms is not None
    assert any("no validation_step" in note for note in report.notes)


def test_given_metrics_are_in_the_rows(stub: Stub, tmp_path: Path) -> None:
    validation = Validation(Classifier(), VALIDATION, metrics={"accuracy": Accuracy("multiclass", num_classes=4)})
    report = evaluate(tmp_path, validation=validation)
    assert [set(row.metrics) for row in report.rows] == [{"accuracy"}, {"accuracy"}]


def test_reconstruction_is_not_taken_for_class_scores(stub: Stub, tmp_path: Path) -> None:
    class Autoencoder(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 6))

    rows = torch.rand(20, 6)
    validation = Validation(Autoencoder(), DataLoader(TensorDataset(rows, rows)), metrics={"mse": MeanSquaredError()})
    report = evaluate(tmp_path, validation=validation)
    assert report.rows[1].top1 is None
    assert report.rows[1].max_relative is not None


@pytest.mark.filterwarnings("ignore:.*int8 leaves little")  # of a network that hardly trained
def test_training_that_made_it_worse_is_warned_of(stub: Stub, tmp_path: Path) -> None:
    module = Classifier()
    trainer(EdgeCompressionCallback([Quantize(start=0)]), max_epochs=1).fit(module, TRAINING, VALIDATION)
    good = Classifier()
    trainer(max_epochs=4).fit(good, TRAINING, VALIDATION)
    with pytest.warns(
        UserWarning, match=r"val_loss .* \(min is better\)\. Lower the .*rate.*start later.*fold_batch_norm.*skip="
    ):
        report = evaluate(
            tmp_path, module, calibration=calibration, baseline=good.net, monitor=Monitor("val_loss", "min")
        )
    assert report.monitor == "val_loss"
    assert any("worse than post-training" in warning for warning in report.warnings)
    with pytest.warns(UserWarning, match="val_f1' is not among the metrics"):
        evaluate(tmp_path, module, calibration=calibration, baseline=module.net, monitor=Monitor("val_f1", "max"))


def test_the_post_training_baseline_keeps_the_same_layers_in_float(stub: Stub, tmp_path: Path) -> None:
    module = Classifier()
    phase = Quantize(start=0, skip=[f"{len(module.net) - 1}"], linear_weights="per_tensor")
    trainer(EdgeCompressionCallback([phase]), max_epochs=1).fit(module, TRAINING, VALIDATION)
    report = evaluate(tmp_path, module, calibration=calibration)
    trained, after = (
        next(row.size_bytes for row in report.rows if (row.target, row.source) == ("torch", source))
        for source in ("trained", "post-training")
    )
    assert trained == after


# The callback.


def test_metric_that_early_stopping_watches_decides(stub: Stub, tmp_path: Path) -> None:
    evaluation = DeviceEvaluationCallback(["stub"], str(tmp_path), timing=QUICK, calibration_batches=1)
    trainer(evaluation, EarlyStopping("val_loss"), max_epochs=1).fit(Classifier(), TRAINING, VALIDATION)
    assert evaluation.report is not None
    assert evaluation.report.monitor == "val_loss"
    assert evaluation.report.calibration_batches == 1
    assert [row.label for row in evaluation.report.rows][-1] == "stub int8 (quantized after training)"


def test_a_metric_that_is_not_logged_is_told_before_training(tmp_path: Path) -> None:
    evaluation = DeviceEvaluationCallback(["onnx"], str(tmp_path), metric="val_accuracy")
    trainer = SimpleNamespace(callback_metrics={"val_acc": 1.0})
    evaluation.on_validation_end(trainer, Classifier())  # type: ignore[arg-type]
    evaluation._knows_metrics = False  # as when a fit begins
    with pytest.warns(UserWarning, match=r"metric='val_accuracy' is not among .*: \['val_acc'\]"):
        evaluation.on_validation_end(trainer, Classifier())  # type: ignore[arg-type]
    evaluation.on_validation_end(trainer, Classifier())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"metric='acc' is none of metrics=\['accuracy'\]"):
        DeviceEvaluationCallback(["onnx"], metric="acc", metrics={"accuracy": MeanMetric()})


def test_limit_of_validation_batches_is_kept(stub: Stub, tmp_path: Path) -> None:
    evaluation = DeviceEvaluationCallback(["stub"], str(tmp_path), timing=QUICK, calibration_batches=0)
    trainer(evaluation, max_epochs=1, limit_val_batches=2).fit(Classifier(), TRAINING, VALIDATION)
    assert evaluation.report is not None
    assert evaluation.report.rows[1].samples == 64


def test_fast_dev_run_goes_through_all_and_keeps_nothing(stub: Stub, tmp_path: Path) -> None:
    evaluation = DeviceEvaluationCallback(["stub"], str(tmp_path / "files"), timing=QUICK)
    trainer(EdgeCompressionCallback([Quantize(start=0)]), evaluation, fast_dev_run=True).fit(
        Classifier(), TRAINING, VALIDATION
    )
    assert evaluation.report is not None
    assert evaluation.report.rows[-1].samples == 32
    assert evaluation.report.rows[-1].source == "trained"
    assert not (tmp_path / "files").exists()


def test_failure_is_raised_after_the_report_is_written(stub: Stub, tmp_path: Path) -> None:
    stub.refusal = ExportError("no such operation")
    evaluation = DeviceEvaluationCallback(["stub"], str(tmp_path), timing=QUICK, calibration_batches=0)
    with pytest.raises(
        ExportError, match=r"of 2 networks and files 1 could not be made: stub fp32\. Why is told above"
    ):
        trainer(evaluation, max_epochs=1).fit(Classifier(), TRAINING, VALIDATION)
    assert (tmp_path / "report.md").exists()

    lenient = DeviceEvaluationCallback(["stub"], str(tmp_path), timing=QUICK, calibration_batches=0, strict=False)
    with warnings.catch_warnings(record=True) as caught:
        trainer(lenient, max_epochs=1).fit(Classifier(), TRAINING, VALIDATION)
    assert not [str(warning.message) for warning in caught if "no such operation" in str(warning.message)]
    assert "no such operation" in (tmp_path / "report.md").read_text()


def test_a_file_over_its_budget_is_kept_told_and_no_failure(stub: Stub, tmp_path: Path) -> None:
    budget = Budget(size_bytes=0, accuracy_drop=1.0)
    evaluation = DeviceEvaluationCallback(["stub"], str(tmp_path), timing=QUICK, calibration_batches=0, budget=budget)
    with pytest.warns(UserWarning, match=r"stub fp32 is over its budget: size_bytes 1 is 1 above 0"):
        trainer(evaluation, max_epochs=1).fit(Classifier(), TRAINING, VALIDATION)
    assert evaluation.report is not None
    assert evaluation.report.failures == []
    assert "stub fp32 is over its budget: size_bytes 1 is 1 above 0" in evaluation.report.warnings
    assert evaluation.report.metrics()["edge/stub/fp32_within_budget"] == 0.0
    (entry,) = Manifest.read(tmp_path).files
    assert entry.budget == evaluation.report.rows[-1].budget
    with pytest.raises(BudgetError, match="Make the network smaller, or state another budget"):
        raise_over_budget(evaluation.report)


def test_a_target_that_falls_back_more_than_allowed_is_a_row_with_the_error(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Placements.of("the runtime", [("conv", "cpu", 9), ("linear", "delegate", 1)])
    monkeypatch.setattr(type(sys.modules["stub_target"].TARGET), "placements", lambda self, path: told)
    (failed,) = evaluate(tmp_path, max_fallback=0.5).failures
    assert "90.0% of the multiply-accumulates run outside the delegate" in str(failed.error)
    assert "1 x conv (9 MACs)" in str(failed.error)
    with pytest.warns(ExportWarning, match="90.0%"):
        report = evaluate(tmp_path, max_fallback=0.95)
    assert report.metrics()["edge/stub/fp32_fallback_share"] == 0.9
    with pytest.raises(ValueError, match="max_fallback=2 is not allowed"):
        DeviceEvaluationCallback(["stub"], max_fallback=2)


def test_training_that_fails_is_not_evaluated(stub: Stub, tmp_path: Path) -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            raise RuntimeError("no luck")

    evaluation = DeviceEvaluationCallback(["stub"], str(tmp_path), timing=QUICK)
    with pytest.raises(RuntimeError, match="no luck"):
        trainer(evaluation).fit(Failing(), TRAINING, VALIDATION)
    assert evaluation.report is None
    assert list(tmp_path.iterdir()) == []


def test_random_numbers_go_on_as_without_the_evaluation(stub: Stub, tmp_path: Path) -> None:
    drawn = []
    for callbacks in ((), (DeviceEvaluationCallback(["stub"], str(tmp_path), timing=QUICK),)):
        L.seed_everything(5)
        trainer(*callbacks, max_epochs=1).fit(Classifier(), TRAINING, VALIDATION)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_evaluations_during_training_leave_it_bitwise_as_it_is_without(stub: Stub, tmp_path: Path) -> None:
    found = []
    for name, every_n_epochs in (("without", None), ("with", 1)):
        L.seed_everything(5)
        folder = tmp_path / name
        evaluation = DeviceEvaluationCallback(
            ["stub"], str(folder), timing=QUICK, calibration_batches=1, every_n_epochs=every_n_epochs
        )
        shuffled = DataLoader(
            TRAINING.dataset, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(7), num_workers=0
        )
        logger = CSVLogger(str(folder), name="logs", version=0)
        compression = EdgeCompressionCallback([Quantize(start=0.4)])
        fit = trainer(compression, evaluation, max_epochs=3, logger=logger, log_every_n_steps=1)
        fit.fit(Classifier(), shuffled, VALIDATION)
        found.append((fit.lightning_module.state_dict(), fit.optimizers[0].state_dict()["state"]))
    (weights, optimizer), (other_weights, other_optimizer) = found
    torch.testing.assert_close(weights, other_weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizer, other_optimizer, rtol=0, atol=0)
    assert [path.name for path in sorted((tmp_path / "with").glob("epoch-*"))] == ["epoch-0001", "epoch-0002"]
    first, second = (read_report(tmp_path / "with" / name).report for name in ("epoch-0001", "epoch-0002"))
    assert [row.label for row in first.rows][-1] == "stub int8 (quantized after training)"
    assert [row.label for row in second.rows][-1] == "stub int8 (quantized in training)"
    assert not [row for row in second.rows if row.target == "stub" and row.precision == "fp32"]
    rows = [*csv.DictReader((tmp_path / "with" / "logs" / "version_0" / "metrics.csv").open())]
    timed = {row["step"]: float(row["edge/evaluation_s"]) for row in rows if row["edge/evaluation_s"]}
    assert [*timed] == ["5", "10"]
    assert all(0 < seconds < 600 for seconds in timed.values())


def test_what_fails_during_training_does_not_end_it(stub: Stub, tmp_path: Path) -> None:
    stub.refusal = ExportError("no such operation")
    evaluation = DeviceEvaluationCallback(
        ["stub"], str(tmp_path), timing=QUICK, calibration_batches=1, strict=False, every_n_epochs=1
    )
    with pytest.warns(
        UserWarning, match=r"After epoch 1, stub int8 \(quantized after training\) failed: no such operation"
    ):
        trainer(evaluation, max_epochs=2).fit(Classifier(), TRAINING, VALIDATION)
    (tmp_path / "epoch-0001" / "report.json").unlink()
    stub.refusal = None
    (tmp_path / "other").write_text("")
    evaluation = DeviceEvaluationCallback(["stub"], str(tmp_path / "two"), timing=QUICK, every_n_epochs=1)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "epoch-0001").write_text("")
    with pytest.warns(UserWarning, match="The evaluation after epoch 1 failed: "):
        trainer(evaluation, max_epochs=2).fit(Classifier(), TRAINING, VALIDATION)
    assert evaluation.report is not None
    with pytest.raises(ValueError, match="every_n_epochs=0 is not allowed; give 1 or more"):
        DeviceEvaluationCallback(["stub"], every_n_epochs=0)


class Upload(EvaluationHook):
    def __init__(self, fails: bool = False) -> None:
        self.fails, self.told = fails, list[tuple[str, bool]]()

    def on_artifact(self, row: Row, path: Path) -> None:
        if self.fails:
            raise OSError("the store is full")
        self.told.append((row.label, path.is_file() and row.sha256 == digest(path)))

    def on_report(self, report: Report, folder: Path) -> None:
        self.told.append((report.model, (folder / "manifest.json").is_file()))


def test_hooks_get_files_and_report_and_what_they_raise_is_a_warning(stub: Stub, tmp_path: Path) -> None:
    first, last = Upload(fails=True), Upload()
    evaluation = DeviceEvaluationCallback(
        ["stub"], str(tmp_path), timing=QUICK, calibration_batches=0, hooks=[first, last]
    )
    with pytest.warns(UserWarning, match=r"Upload failed \(OSError: the store is full\); the report and the files are"):
        trainer(evaluation, max_epochs=1).fit(Classifier(), TRAINING, VALIDATION)
    assert last.told == [("stub fp32", True), ("Classifier", True)]
    assert first.told == []


def test_test_split_comes_from_the_data_module(stub: Stub, tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        def setup(self, stage: str) -> None:
            self.stages = [*getattr(self, "stages", []), stage]

        def train_dataloader(self) -> DataLoader[Any]:
            return TRAINING

        def test_dataloader(self) -> DataLoader[Any]:
            assert "test" in self.stages
            return data(40, 2)

    class Tested(Classifier):
        test_step = Classifier.validation_step

    evaluation = DeviceEvaluationCallback(
        ["stub"], str(tmp_path), split="test", timing=QUICK, calibration_batches=0, module="net"
    )
    trainer(evaluation, max_epochs=1).fit(Tested(), datamodule=Data())
    assert evaluation.report is not None
    assert (evaluation.report.split, evaluation.report.rows[1].samples) == ("test", 40)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"limit_val_batches": 0}, "leaves nothing to evaluate on"), ({}, "given no val_dataloader")],
)
def test_nothing_to_evaluate_on_is_told_before_training(
    stub: Stub, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    class Untouched(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            pytest.fail("training began")

    evaluation = DeviceEvaluationCallback(["stub"], str(tmp_path))
    with pytest.raises(ValueError, match=says):
        trainer(evaluation, **options).fit(Untouched(), TRAINING, VALIDATION if options else None)


def test_folder_that_cannot_be_written_is_told_before_training(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeError, match=r"dirpath=.*cannot be written to"):
        trainer(DeviceEvaluationCallback(["stub"], str(tmp_path / "file"))).fit(Classifier(), TRAINING, VALIDATION)


def test_root_in_the_folder_is_that_of_the_trainer(stub: Stub, tmp_path: Path) -> None:
    callback = DeviceEvaluationCallback(["stub"], "{root}/float", calibration_batches=0, timing=QUICK)
    root = tmp_path / "task"
    trainer(callback, default_root_dir=root, max_epochs=1).fit(Classifier(), TRAINING, VALIDATION)
    assert (root / "float" / "report.json").is_file()


@pytest.mark.parametrize("strict", [True, False])
def test_missing_extra_is_told_before_training(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    monkeypatch.setattr(type(sys.modules["stub_target"].TARGET), "needs", ("stub_runtime",))
    monkeypatch.setattr(type(sys.modules["stub_target"].TARGET), "extra", "stubs")

    class Untouched(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            raise KeyboardInterrupt("training began")

    says = r"'stub_runtime' is not installed\. Install it with: pip install 'lightning-edge\[stubs\]'"
    run = trainer(DeviceEvaluationCallback(["stub"], str(tmp_path), strict=strict))
    if strict:
        with pytest.raises(MissingExtraError, match=rf"{says}, or leave 'stub' out"):
            run.fit(Untouched(), TRAINING, VALIDATION)
    else:
        with pytest.warns(UserWarning, match=rf"no file for 'stub': {says}"), pytest.raises(SystemExit):
            run.fit(Untouched(), TRAINING, VALIDATION)


def test_weights_that_are_no_numbers_are_an_error_and_not_some_int8(stub: Stub, tmp_path: Path) -> None:
    module = Classifier()
    module.net[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"'0\.weight' holds values that are not finite"):
        evaluate(tmp_path, module, calibration=calibration)
    assert list(tmp_path.iterdir()) == []


def test_float_files_are_made_where_post_training_quantization_fails(stub: Stub, tmp_path: Path) -> None:
    def refuse() -> list[Inputs]:
        raise EdgeError("no batch of the training data")

    report = evaluate(tmp_path, calibration=refuse)
    assert [(row.label, row.error) for row in report.rows] == [
        ("torch fp32", None),
        ("torch int8 (quantized after training)", "no batch of the training data"),
        ("stub fp32", None),
    ]
    assert (tmp_path / "report.md").is_file()


def test_options_of_int8_files_are_not_those_of_the_float_baseline() -> None:
    options = {"tflite": {"io": "int8", "scheme": "fp16"}}
    assert options_of("tflite", "int8", options) == {"io": "int8"}
    assert options_of("tflite", "fp32", options) == {"scheme": "fp16"}
    assert options_of("coreml", "fp32", options) == {}


def test_two_names_for_the_network_are_refused(stub: Stub, tmp_path: Path) -> None:
    compression = EdgeCompressionCallback([Quantize(start=0)], module="net")
    evaluation = DeviceEvaluationCallback(["stub"], str(tmp_path), module="accuracy")
    with pytest.raises(ValueError, match=r"'accuracy'.*'net'.*name different networks"):
        trainer(compression, evaluation).fit(Classifier(), TRAINING, VALIDATION)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"targets": ["tvm"]}, r"'tvm' is not one of 'executorch', 'coreml', 'tflite', 'onnx'"),
        ({"targets": []}, "give a list of one or more"),
        ({"targets": "tflite"}, "give a list"),
        ({"targets": ["tflite", "tflite"]}, "twice"),
        ({"targets": ["tflite"], "options": {"coreml": {}}}, "options are given for 'coreml'"),
        (
            {"targets": ["tflite"], "options": {"tflite": {"float_io": True}}},
            "no option 'float_io'; it has io, integer_only, scheme",
        ),
        ({"targets": ["tflite"], "options": {"tflite": {"io": "int4"}}}, "io='int4' is not one of"),
        (
            {"targets": ["coreml"], "options": {"coreml": {"minimum_ios": "18"}}},
            "minimum_ios='18' is not a whole number",
        ),
        ({"targets": ["tflite"], "split": "train"}, "split='train'"),
        ({"targets": ["tflite"], "calibration_batches": -1}, "calibration_batches=-1"),
        ({"targets": ["tflite"], "metric": "quality"}, "does not tell where it is better"),
        ({"targets": ["tflite"], "metric": "quality", "mode": "up"}, "mode='up'"),
        ({"targets": ["tflite"], "mode": "max"}, "without metric"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DeviceEvaluationCallback(**arguments)


def test_settings_build_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=L.Callback)
    arguments = {
        "targets": ["tflite"],
        "tolerance": {"max_steps": 2.0},
        "timing": {"repeats": 7},
        "options": {"tflite": {"io": "float"}},
        "metrics": {
            "accuracy": {
                "class_path": "torchmetrics.classification.MulticlassAccuracy",
                "init_args": {"num_classes": 4},
            }
        },
    }
    config = parser.parse_object(
        {"callback": {"class_path": "lightning_edge.DeviceEvaluationCallback", "init_args": arguments}}
    )
    built = parser.instantiate(config).callback
    assert isinstance(built, DeviceEvaluationCallback)
    settings = built.settings
    assert (settings.tolerance.max_steps, settings.timing.repeats, settings.timing.warmup) == (2.0, 7, 10)
    assert built.metrics is not None
    assert list(built.metrics) == ["accuracy"]


_TWO_PROCESSES = """
import subprocess
import sys
sys.path.insert(0, {tests!r})
import lightning as L
from test_evaluation import QUICK, TRAINING, VALIDATION, Classifier
from lightning_edge import DeviceEvaluationCallback

if __name__ == "__main__":
    evaluation = DeviceEvaluationCallback(["executorch"], {folder!r}, timing=QUICK, calibration_batches=0)
    L.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", callbacks=[evaluation], logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    ).fit(Classifier(), TRAINING, VALIDATION)
"""


@pytest.mark.slow
def test_first_of_two_processes_evaluates_on_the_whole_set(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    script = tmp_path / "fit.py"
    script.write_text(_TWO_PROCESSES.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "files")))
    subprocess.run([sys.executable, str(script)], check=True, timeout=300, capture_output=True)
    rows = json.loads((tmp_path / "files" / "report.json").read_text())["rows"]
    assert rows[-1]["samples"] == 72
