"""The command line: subcommands, recipes by name, and errors that start with the cause."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lightning_edge import CompressionError, DeviceEvaluationCallback, Prune, exporters
from lightning_edge.cli.config_errors import cause, explain
from lightning_edge.cli.main import main
from lightning_edge.cli.recipe_files import recipe_names, recipe_path
from lightning_edge.interface import Interface
from lightning_edge.reporting.manifest import Manifest
from lightning_edge.zoo.digits import DigitsDataModule
from lightning_edge.zoo.networks import DigitsCNN

Run = Callable[..., None]

SETTINGS = {
    "seed_everything": 0,
    "trainer": {
        "max_epochs": 1,
        "limit_train_batches": 6,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "lightning_edge.EdgeCompressionCallback",
                "init_args": {"phases": [{"class_path": "lightning_edge.Quantize", "init_args": {"start": 0.5}}]},
            },
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "checkpoints", "filename": "trained"},
            },
        ],
    },
    "model": {
        "class_path": "lightning_edge.zoo.task.Classifier",
        "init_args": {"network": {"class_path": "lightning_edge.zoo.networks.DigitsCNN"}},
    },
    "data": {"class_path": "lightning_edge.zoo.digits.DigitsDataModule", "init_args": {"batch_size": 16}},
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lightning-edge", *arguments])
        main()

    return call


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings above as a file, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where `lightning-edge fit` has run: config.yaml and checkpoints/trained.ckpt."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-edge", "fit", "--config", "settings.yaml"])
        main()
    shutil.copy(folder / "config.yaml", folder / "written.yaml")
    return folder


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (
            lambda: DeviceEvaluationCallback(["phone"]),
            "DeviceEvaluationCallback: targets=['phone']: 'phone' is not one",
        ),
        (lambda: Prune(macs=0.5, start=0.5, end=0.2), "Prune: end=0.2 comes before start=0.5"),
    ],
)
def test_a_refused_value_is_told_by_the_class_that_the_user_names(build: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match="=") as refused:
        build()
    assert cause(refused.value).startswith(told)


def test_fit_writes_a_checkpoint_of_a_quantized_network(trained: Path) -> None:
    state = torch.load(trained / "checkpoints" / "trained.ckpt", weights_only=True)
    assert state["lightning_edge"]["changes"][0]["phase"] == "quantize"


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_loops_take_the_checkpoint(
    trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], subcommand: str
) -> None:
    monkeypatch.chdir(trained)
    # A run saves its configuration where the training did, and does not overwrite it.
    (trained / "config.yaml").unlink(missing_ok=True)
    run(subcommand, "--config", "settings.yaml", "--ckpt_path", "checkpoints/trained.ckpt")
    if subcommand != "predict":
        assert f"{subcommand[:3] if subcommand == 'validate' else subcommand}_acc" in capfd.readouterr().out


def test_export_writes_int8_files(
    trained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(trained)
    run(
        *("export", "--config", "written.yaml", "--ckpt_path", "checkpoints/trained.ckpt"),  # as `fit` wrote it
        *("--targets", "[onnx]", "--dirpath", str(tmp_path / "out"), "--batches", "1", "--jobs", "1"),
        *("--interface.layout", "nhwc", "--interface.outputs", "[scores]"),
        *("--name", "digits"),
    )
    artifact = exporters.load(tmp_path / "out" / "digits-int8.onnx")
    assert artifact.precision == "int8"
    assert artifact(torch.zeros(2, 1, 8, 8))[0].shape == (2, 10)
    printed = capfd.readouterr()
    assert "digits-int8.onnx: int8, " in printed.out
    assert "onnx: converting, after " in printed.err  # in a process of its own
    manifest = Manifest.read(tmp_path / "out")
    assert [entry.path for entry in manifest.files] == ["digits-int8.onnx"]
    assert manifest.phases["quantize"]["start"] == 0.5
    assert manifest.files[0].agreement["samples"] == 16
    assert manifest.files[0].interface == Interface(("input",), ("scores",), layout="nhwc")
    assert [end.shape for end in manifest.files[0].inputs] == [(1, 8, 8, 1)]
    assert [end.shape for end in manifest.files[0].sample] == [(1, 1, 8, 8)]
    assert "lightning_edge.zoo.networks.DigitsCNN" in str(yaml.safe_load(str(manifest.recipe))["model"])


def test_verify_needs_no_configuration(tmp_path: Path, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    Manifest("Net", ()).write(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        run("verify", str(tmp_path))
    assert exit_info.value.code == 0
    with pytest.raises(SystemExit) as exit_info:
        run("verify", str(tmp_path / "nowhere"))
    assert exit_info.value.code == 2
    assert "Give a folder that lightning-edge export or evaluate has written to" in capfd.readouterr().err


def test_evaluate_fails_where_a_file_is_over_the_budget_of_the_configuration(
    trained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    given = {
        "targets": ["tflite"],
        "dirpath": str(tmp_path),
        "budget": {"size_bytes": 1000, "accuracy_drop": 0.5},
        "max_fallback": 0.0,
        "interface": {"inputs": ["digit"]},
        "calibration_batches": 0,
        "fp32_files": False,
        "timing": {"warmup": 0, "repeats": 1},
    }
    callback = {"class_path": "lightning_edge.DeviceEvaluationCallback", "init_args": given}
    callbacks = [*SETTINGS["trainer"]["callbacks"], callback]  # type: ignore[index]
    settings = {**SETTINGS, "trainer": {**SETTINGS["trainer"], "callbacks": callbacks}}  # type: ignore[dict-item]
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as exit_info:
        run("evaluate", "--config", str(tmp_path / "settings.yaml"), "--ckpt_path", "checkpoints/trained.ckpt")
    assert exit_info.value.code == 3
    error = capfd.readouterr().err
    assert "error: tflite int8 (quantized in training) is over its budget: size_bytes " in error
    assert "above 1,000" in error
    (entry,) = Manifest.read(tmp_path).files  # the file is kept, and said of it
    assert [end.name for end in entry.inputs] == ["digit"]
    assert entry.budget is not None
    assert [excess.name for excess in entry.budget.exceeded] == ["size_bytes"]


def test_fit_ends_with_a_status_of_its_own_where_a_file_is_over_its_budget(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    given = {
        "targets": ["onnx"],
        "dirpath": "files",
        "budget": {"size_bytes": 1000},
        "calibration_batches": 0,
        "fp32_files": False,
        "timing": {"warmup": 0, "repeats": 1},
    }
    callback = {"class_path": "lightning_edge.DeviceEvaluationCallback", "init_args": given}
    callbacks = [*SETTINGS["trainer"]["callbacks"], callback]  # type: ignore[index]
    settings = {**SETTINGS, "trainer": {**SETTINGS["trainer"], "callbacks": callbacks}}  # type: ignore[dict-item]
    Path("settings.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as exit_info, pytest.warns(UserWarning, match="is over its budget"):
        run("fit", "--config", "settings.yaml")
    assert exit_info.value.code == 3
    assert "error: onnx int8 (quantized in training) is over its budget: size_bytes " in capfd.readouterr().err
    assert Path("checkpoints/trained.ckpt").is_file()  # everything was saved before
    assert Path("files/report.html").is_file()
    (entry,) = Manifest.read(Path("files")).files
    assert Path("files", entry.path).is_file()


BENCH = {"bench": {"class_path": "lightning_edge.devices.Local"}}


def test_evaluate_writes_the_report_and_runs_on_the_devices_of_a_file(
    trained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(trained)
    (trained / "devices.yaml").write_text(yaml.safe_dump(BENCH))
    run(
        *("evaluate", "--config", "settings.yaml", "--ckpt_path", "checkpoints/trained.ckpt"),
        *("--targets", "[onnx]", "--dirpath", str(tmp_path), "--split", "test", "--devices", "[bench]"),
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["split"] == "test"
    rows = {(row["target"], row["precision"], row["source"]): row for row in report["rows"]}
    # The baseline is the network as it was before quantization, which the checkpoint keeps.
    network = DigitsCNN().eval()
    state = torch.load("checkpoints/trained.ckpt", weights_only=True)["lightning_edge"]["float_state"]
    network.load_state_dict(state)
    data = DigitsDataModule()
    data.setup("test")
    images, labels = data.test_dataloader().dataset[:]
    expected = (network(images).argmax(1) == labels).float().mean().item()
    assert rows["torch", "fp32", "float"]["metrics"]["test_acc"] == pytest.approx(expected, abs=1e-6)
    assert rows["onnx", "int8", "trained"]["top1"] > 0.98
    assert [(row["device"], row["precision"], row["error"]) for row in report["devices"]] == [
        ("bench", "fp32", None),
        ("bench", "int8", None),
    ]
    assert report["devices"][1]["metrics"] == report["rows"][-1]["metrics"]
    printed = capfd.readouterr().out
    assert "onnx int8" in printed
    assert "bench: onnx int8" in printed
    with pytest.raises(SystemExit) as exit_info:  # a switch, without a value
        run(
            *("evaluate", "--config", "settings.yaml", "--ckpt_path", "checkpoints/trained.ckpt"),
            *("--targets", "[onnx]", "--dirpath", str(tmp_path), "--resume", "--devices", "[bench]"),
        )
    assert exit_info.value.code == 1
    assert "error: there is nothing to resume" in capfd.readouterr().err


def test_evaluate_on_a_device_that_the_file_does_not_describe(
    trained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    (trained / "devices.yaml").write_text(yaml.safe_dump(BENCH))
    command = ("evaluate", "--config", "settings.yaml", "--ckpt_path", "checkpoints/trained.ckpt")
    with pytest.raises(SystemExit) as exit_info:
        run(*command, "--targets", "[onnx]", "--dirpath", str(tmp_path), "--devices", "[pi4]")
    assert exit_info.value.code == 1
    assert "error: devices.yaml describes no device 'pi4', but bench." in capfd.readouterr().err


def test_export_of_an_unknown_target_says_which_there_are(
    trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    with pytest.raises(SystemExit) as exit_info:
        run("export", "--config", "settings.yaml", "--ckpt_path", "checkpoints/trained.ckpt", "--targets", "[tvm]")
    assert exit_info.value.code == 2
    error = capfd.readouterr().err
    assert "'tvm' is not one of 'executorch', 'coreml', 'tflite', 'onnx'" in error


@pytest.mark.parametrize("content", [None, b"no checkpoint at all", b""])
def test_bad_checkpoint_is_refused_before_anything_runs(
    config: Path, run: Run, capfd: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    if content is not None:
        (config.parent / "bad.ckpt").write_bytes(content)
    with pytest.raises(SystemExit) as exit_info:
        run("export", "--config", str(config), "--ckpt_path", "bad.ckpt")
    assert exit_info.value.code == 2
    assert capfd.readouterr().err.startswith("error: ckpt_path: given 'bad.ckpt', ")


def test_export_asks_for_a_checkpoint(config: Path, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run("export", "--config", str(config))
    assert exit_info.value.code == 2
    assert "ckpt_path" in capfd.readouterr().err.splitlines()[0]


def test_recipe_is_a_config(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run("fit", "--config", "recipe:quickstart", "--trainer.max_epochs=7", "--print_config")
    assert exit_info.value.code == 0
    printed = yaml.safe_load(capfd.readouterr().out)
    assert printed["trainer"]["max_epochs"] == 7
    assert printed["data"]["class_path"] == "lightning_edge.zoo.digits.DigitsDataModule"


def test_later_config_appends_a_callback(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more.yaml").write_text(
        "trainer:\n  callbacks+:\n    class_path: lightning.pytorch.callbacks.EarlyStopping\n"
        "    init_args: {monitor: val_loss}\n"
    )
    with pytest.raises(SystemExit):
        run("fit", "--config", "recipe:quickstart", "--config", str(tmp_path / "more.yaml"), "--print_config")
    callbacks = yaml.safe_load(capfd.readouterr().out)["trainer"]["callbacks"]
    names = [callback["class_path"].rpartition(".")[2] for callback in callbacks]
    assert names == ["EdgeCompressionCallback", "DeviceEvaluationCallback", "EarlyStopping"]


def test_missing_recipe_lists_those_there_are(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run("fit", "--config", "recipe:quickstat")
    assert exit_info.value.code == 2
    assert capfd.readouterr().err.startswith(
        "error: there is no recipe 'quickstat'. Did you mean quickstart? Recipes: "
    )
    with pytest.raises(ValueError, match=r"there is no recipe '\.\./pyproject'"):
        recipe_path("../pyproject")
    assert all(recipe_path(name).is_file() for name in recipe_names())


# What is wrong in the settings, and the first lines that must be printed.
MISTAKES = {
    "setting of a phase": (
        ("start: 0.5", "strat: 0.5"),
        "trainer.callbacks.phases.strat: lightning_edge.Quantize has no such setting\n"
        "  did you mean: start\n  allowed: start, freeze_observers, ",
    ),
    "value of a phase": (
        ("start: 0.5", "start: late"),
        "trainer.callbacks.phases.start: given 'late'\n  allowed: int, float",
    ),
    "value a phase refuses": (
        ("start: 0.5", "start: 1.5"),
        "Quantize: start=1.5 is not a moment of training: give an epoch ",
    ),
    "phase": (
        ("lightning_edge.Quantize", "lightning_edge.Quantise"),
        "trainer.callbacks.phases: there is no lightning_edge.Quantise\n  did you mean: lightning_edge.Quantize\n",
    ),
    "not a phase": (
        ("lightning_edge.Quantize", "lightning_edge.zoo.networks.DigitsCNN"),
        "trainer.callbacks.phases: Import path lightning_edge.zoo.networks.DigitsCNN does not correspond to a subclass",
    ),
    "trainer key": (
        ("max_epochs", "max_epoch"),
        "trainer.max_epoch: there is no such key\n  did you mean: trainer.max_epochs\n  allowed: trainer.accelerator, ",
    ),
    "trainer value": (
        ("max_epochs: 1", "max_epochs: many"),
        "trainer.max_epochs: given 'many'\n  allowed: int, null",
    ),
    "top-level key": (
        ("model:", "modell:"),
        "modell: there is no such key\n  did you mean: model\n  allowed: ckpt_path, ",
    ),
    "network": (
        ("DigitsCNN", "DigitCNN"),
        "model.network: there is no lightning_edge.zoo.networks.DigitCNN\n"
        "  did you mean: lightning_edge.zoo.networks.DigitsCNN\n",
    ),
    "module": (
        ("zoo.digits.", "zoo.digit."),
        "data: there is no lightning_edge.zoo.digit\n",
    ),
    "key beside class_path": (
        (
            "      - class_path: lightning_edge.Quantize\n        init_args:",
            "      - class_path: lightning_edge.Quantize\n        init_argz:",
        ),
        "trainer.callbacks.phases: lightning_edge.schedule.Phase is only the base of what can stand here\n"
        "  allowed: class_path, init_args\n",
    ),
    "setting that is required": (
        ("    network:\n      class_path: lightning_edge.zoo.networks.DigitsCNN\n", "    num_classes: 10\n"),
        "model.network: not given, and lightning_edge.zoo.task.Classifier has no default for it\n",
    ),
    "no batch": (
        ("batch_size: 16", "batch_size: 0"),
        "DigitsDataModule: batch_size=0 is not allowed; give 1 or more\n",
    ),
    "trainer setting": (
        ("accelerator: cpu", "accelerator: cpuu"),
        "EdgeTrainer: You selected an invalid accelerator name: `accelerator='cpuu'`",
    ),
    "data setting": (
        ("batch_size", "batchsize"),
        "data.batchsize: lightning_edge.zoo.digits.DigitsDataModule has no such setting\n  did you mean: batch_size\n",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_answered_with_its_innermost_line(
    config: Path, run: Run, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    (right, wrong), expected = MISTAKES[name]
    text = config.read_text()
    assert right in text
    config.write_text(text.replace(right, wrong))
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run("fit", "--config", str(config))
    assert exit_info.value.code == 2
    error = capfd.readouterr().err.removeprefix("Seed set to 0\n")
    assert error.startswith(f"error: {expected}")
    assert "usage:" not in error


# Nine lists of nine: 9 ** 9 values where the aliases are filled in.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "--config: given an empty file\n  allowed: a YAML file of keys, "),
        ("- a\n- b\n", "--config: given '- a'\n  allowed: a YAML file of keys, "),
        ("trainer:\n\tmax_epochs: 1\n", "--config: {file}: line 2, column 1: found character"),
        ("trainer: {max_epochs: 1\n", "--config: {file}: line 2, column 1: expected ',' or '}}', but got"),
        ("trainer: {}\nmodel: a\ntrainer: {}\n", "--config: {file}: line 3, column 1: 'trainer' is given twice"),
        (BOMB, "--config: {file}: line 6, column 5: there are more than 100,000 values with the aliases filled in"),
        ("trainer: [1]\nmodel: lightning_edge.zoo.task.Classifier\n", ""),
    ],
    ids=["empty", "a list", "tabs", "open brace", "key twice", "aliases", "list for a group"],
)
def test_file_that_is_no_configuration_is_told(
    config: Path, run: Run, capfd: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    config.write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        run("fit", "--config", str(config))
    assert exit_info.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {expected.format(file=config)}")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("class_path: a\ninit_args: " + "[" * 20_000, "model: the value is nested too deeply"),
        ("[" * 20_000, "model: the value is nested too deeply"),
        (BOMB, "model: the value: line 6, column 5: there are more than 100,000 values"),
        ("class_path: a\nclass_path: b\n", "model: the value: line 2, column 1: 'class_path' is given twice"),
    ],
    ids=["deep", "brackets", "aliases", "key twice"],
)
def test_a_file_of_a_part_is_read_as_strictly(
    run: Run, config: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    config.with_name("part.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        run("fit", "--config", "config.yaml", "--model", "part.yaml")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {says}")


def test_a_pipe_is_no_configuration(config: Path, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe.yaml")
    with pytest.raises(SystemExit) as exit_info:
        run("fit", "--config", "pipe.yaml")
    assert exit_info.value.code == 2
    told = capfd.readouterr().err.splitlines()
    assert told == ["error: --config: pipe.yaml is a named pipe and not a file", told[-1]]
    assert told[-1].startswith("(JSONARGPARSE_DEBUG=true shows")


def change(config: Path, **trainer: object) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["trainer"].update(trainer)
    config.write_text(yaml.safe_dump(settings))


EVALUATION = {"class_path": "lightning_edge.DeviceEvaluationCallback", "init_args": {"targets": ["executorch"]}}


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        (
            {"callbacks": [EVALUATION], "limit_val_batches": 0},
            "error: split='validate' with Trainer(limit_val_batches=0)",
        ),
        ({"limit_train_batches": 1e9, "max_epochs": 0, "overfit_batches": -1}, "error: "),
    ],
    ids=["ours", "lightning's"],
)
def test_refusal_inside_fit_is_one_line_and_status(
    config: Path, run: Run, capfd: pytest.CaptureFixture[str], trainer: dict[str, object], expected: str
) -> None:
    change(config, **trainer)
    with pytest.raises(SystemExit) as exit_info:
        run("fit", "--config", str(config))
    assert exit_info.value.code in (1, 2)
    error = capfd.readouterr().err.removeprefix("Seed set to 0\n")
    assert error.startswith(expected)
    assert "Traceback" not in error


def test_mistake_in_the_users_own_code_keeps_its_traceback(
    config: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, batch: object, index: int) -> None:
        raise ValueError("in the user's own step")

    monkeypatch.setattr("lightning_edge.zoo.task.Classifier.validation_step", refuse)
    with pytest.raises(ValueError, match="in the user's own step"):
        run("fit", "--config", str(config))


def test_weights_of_another_network_are_told_with_what_to_do(
    trained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    settings = {**SETTINGS, "trainer": {**SETTINGS["trainer"], "callbacks": []}}  # type: ignore[dict-item]
    (tmp_path / "float.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as exit_info:
        run("validate", "--config", str(tmp_path / "float.yaml"), "--ckpt_path", "checkpoints/trained.ckpt")
    assert exit_info.value.code == 2
    told = capfd.readouterr().err
    assert "error: ckpt_path: checkpoints/trained.ckpt is of a compressed training (quantize), and its weights" in told
    # Of weights alone there is no record.
    state = torch.load("checkpoints/trained.ckpt", weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "lightning_edge"}, tmp_path / "weights.ckpt")
    with pytest.raises(SystemExit) as exit_info:
        run("validate", "--config", str(tmp_path / "float.yaml"), "--ckpt_path", str(tmp_path / "weights.ckpt"))
    assert exit_info.value.code == 1
    told = capfd.readouterr().err
    assert "error: ckpt_path: the weights do not fit the model: they were trained quantized; " in told
    assert "Unexpected key" not in told


def test_second_run_in_a_folder_is_no_error_and_a_validation_leaves_its_configuration(
    config: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(config, callbacks=[], limit_train_batches=1, limit_val_batches=1)
    mine, saved = config.read_text(), config.parent / "runs" / "config.yaml"
    run("fit", "--config", "config.yaml")
    assert config.read_text() == mine
    folder = ("--trainer.default_root_dir", "runs")
    run("fit", "--config", "config.yaml", *folder)
    before = saved.read_text()
    run("validate", "--config", "config.yaml", "--trainer.limit_val_batches=2", *folder)
    assert saved.read_text() == before
    run("fit", "--config", "config.yaml", "--trainer.max_epochs=2", *folder)
    assert yaml.safe_load(saved.read_text())["trainer"]["max_epochs"] == 2


@pytest.mark.slow
def test_evaluate_keeps_the_limit_of_batches(
    trained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    run(
        *("evaluate", "--config", "settings.yaml", "--ckpt_path", "checkpoints/trained.ckpt"),
        *("--targets", "[executorch]", "--dirpath", str(tmp_path), "--trainer.limit_val_batches", "2"),
    )
    assert {row["samples"] for row in json.loads((tmp_path / "report.json").read_text())["rows"]} == {None, 32}


def test_failure_of_ours_is_one_line_and_status_1(
    config: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"].append(settings["trainer"]["callbacks"][0])
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as exit_info:
        run("fit", "--config", str(config))
    assert exit_info.value.code == 1
    error = capfd.readouterr().err
    assert "error: the Trainer has 2 EdgeCompressionCallbacks" in error
    assert "Traceback" not in error
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(CompressionError):
        run("fit", "--config", str(config))


def test_message_without_structure_is_left_as_it_is() -> None:
    assert explain("something else went wrong") == "something else went wrong"


def test_help_names_the_subcommands(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run("--help")
    assert exit_info.value.code == 0
    out = capfd.readouterr().out
    for subcommand in ("fit", "validate", "test", "predict", "export", "evaluate"):
        assert subcommand in out
