"""Every recipe that ships: found, commented with its command, parsed, listed and copied, and run for a few steps."""

from __future__ import annotations

import json
import sys
import wave
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import yaml

from lightning_edge.cli import recipes
from lightning_edge.cli.main import main
from lightning_edge.cli.recipe_files import describe, recipe_names, recipe_path
from lightning_edge.cli.sweep_base import CommandLineChecker

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
NAMES = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in RECIPES]
COMPRESSIONS = [name for name in NAMES if name.startswith("compression/")]
TASKS = ["image-classification", "keyword-spotting", "visual-wake-words", "anomaly-detection"]
# Those that are whole by themselves, with int8 files.
WHOLE = ["quickstart", "digits-pruned-int8", "cifar10-resnet8-int8"]
# Twelve batches in one epoch: the last is beyond 0.9 of training, where the latest of the recipes quantizes.
SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=12",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def test_there_are_recipes() -> None:
    assert {*WHOLE, *TASKS, "compression/int8"} <= set(recipe_names())
    assert sorted(recipe_path(name).resolve() for name in recipe_names()) == RECIPES


@pytest.mark.parametrize("name", NAMES)
def test_first_comments_are_the_command_and_a_sentence(name: str) -> None:
    recipe = describe(name)
    if name in COMPRESSIONS:
        assert recipe.command == f"lightning-edge fit --config recipe:keyword-spotting --config recipe:{name}"
    else:
        assert recipe.command.startswith(f"lightning-edge fit --config recipe:{name}")
        assert yaml.safe_load(recipe_path(name).read_text())["seed_everything"] == 0
    assert 20 < len(recipe.summary) < 110


def test_every_recipe_parses_alone_and_with_every_compression(tmp_path: Path) -> None:
    checker = CommandLineChecker()
    (tmp_path / "folder.yaml").write_text(f"data: {{init_args: {{folder: {tmp_path}}}}}\n")
    for name in {*NAMES} - {*COMPRESSIONS}:
        given = [] if name in ("quickstart", "digits-pruned-int8") else [str(tmp_path / "folder.yaml")]
        trainer = checker.resolve(f"recipe:{name}", *given)["trainer"]
        assert trainer["max_epochs"] > 1
        # So that two tasks in one folder do not write to the same places.
        assert trainer["default_root_dir"] == f"artifacts/{name}"
    for name in COMPRESSIONS:
        config = checker.resolve("recipe:anomaly-detection", str(tmp_path / "folder.yaml"), f"recipe:{name}")
        *phases, evaluation = config["trainer"]["callbacks"]
        assert evaluation["init_args"]["dirpath"] == f"{{root}}/{name.removeprefix('compression/')}"
        # The parser keeps settings of a callback of the same class at the same place of the list before.
        assert evaluation["init_args"]["calibration_batches"] == 32
        assert len(phases) == (0 if name.endswith("ptq") else 1)
        assert config["model"]["class_path"] == "lightning_edge.zoo.anomaly.AnomalyDetector"


def test_the_command_lists_shows_and_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main([]) == 0
    listed = capsys.readouterr().out
    assert all(any(line.startswith(f"{name} ") for line in listed.splitlines()) for name in NAMES)
    assert recipes.main(["show", "recipe:compression/int8"]) == 0
    assert capsys.readouterr().out == (FOLDER / "compression/int8.yaml").read_text()
    folder = tmp_path / "mine"
    assert recipes.main(["copy", "keyword-spotting", "compression/int8", str(folder)]) == 0
    assert capsys.readouterr().out == (
        f"lightning-edge fit --config {folder}/keyword-spotting.yaml --config {folder}/int8.yaml\n"
    )
    assert (folder / "int8.yaml").read_text() == (FOLDER / "compression/int8.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["show", "int8"], "there is no recipe 'int8'. "),
        (["show", "../pyproject"], "there is no recipe '../pyproject'. Recipes: "),
        (
            ["copy", "compression/int8", "quickstat", "there"],
            "there is no recipe 'quickstat'. Did you mean quickstart?",
        ),
        (["copy", "compression/ptq", "quickstart", "there"], "quickstart.yaml is there already; remove it"),
    ],
)
def test_the_command_refuses_and_writes_nothing(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "quickstart.yaml").write_text("mine")
    assert recipes.main(arguments) == 2
    assert told in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in (tmp_path / "there").iterdir()] == [("quickstart.yaml", "mine")]


def _sound(path: Path, seconds: float, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).integers(-3000, 3000, int(16_000 * seconds), np.int16)
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(samples.tobytes())


def _data(name: str, folder: Path) -> list[str]:
    """Write a little data for a recipe, and give the options that make it read that."""
    random = np.random.default_rng(0)
    if name in ("image-classification", "cifar10-resnet8-int8", "cifar10-resnet56"):
        for split in ("train", "test"):
            images, labels = random.integers(0, 256, (32, 32, 32, 3), np.uint8), np.arange(32) % 10
            np.savez(folder / f"{split}.npz", images=images, labels=labels)
        return [f"--data.folder={folder}", "--data.validation_size=8", "--data.batch_size=2"]
    if name.startswith("keyword"):
        for word in ("no", "yes", "tree"):
            for number in range(12):
                _sound(folder / word / f"{number:08x}_nohash_0.wav", 0.8, number)
        (folder / "validation_list.txt").write_text("no/00000000_nohash_0.wav\nyes/00000000_nohash_0.wav\n")
        (folder / "testing_list.txt").write_text("no/00000001_nohash_0.wav\n")
        classes = ["--model.num_classes=4", "--model.network.num_classes=4"]
        return [f"--data.folder={folder}", '--data.words=["no", "yes"]', *classes, "--data.batch_size=2"]
    if name == "anomaly-detection":
        for number in range(3):
            _sound(folder / "train" / f"normal_id_01_{number}.wav", 1.0, number)
        return [f"--data.folder={folder}", "--data.batch_size=4"]
    if name in ("visual-wake-words", "images-transformers"):
        from PIL import Image

        for number in range(26):
            path = folder / ("person" if number % 2 else "other") / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(random.integers(0, 256, (40, 30, 3), np.uint8)).save(path)
        return [f"--data.folder={folder}", "--data.batch_size=2"]
    return []


def _fit(names: list[str], options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [part for name in names for part in ("--config", f"recipe:{name}")]
    monkeypatch.setattr(sys, "argv", ["lightning-edge", "fit", *configs, *SHORT, *options])
    main()


@pytest.mark.parametrize("name", [*TASKS, "keyword-spotting-waveform", "cifar10-resnet56"])
def test_task_trains_a_few_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its files, which the slow tests write."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    seen: list[float] = []
    monkeypatch.setattr(L.LightningModule, "on_train_end", lambda module: seen.append(module.trainer.global_step))
    options = [*_data(name, tmp_path / "data"), "--trainer.callbacks=null", "--trainer.limit_train_batches=2"]
    _fit([name], [*options, "--trainer.limit_val_batches=1", "--trainer.logger=false"], monkeypatch)
    assert seen == [2]


def test_a_backbone_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit):
        _fit(["images-timm"], _data("visual-wake-words", tmp_path), monkeypatch)
    told = capsys.readouterr().err
    assert told.startswith("error: TimmBackbone: 'timm' cannot be imported")
    assert "Install it with: pip install timm" in told


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        pytest.param(["digits-pruned-int8"], ["tflite"], id="digits-pruned-int8+one target"),
        *(
            pytest.param(names, ["executorch", "coreml", "tflite"], marks=pytest.mark.slow, id="+".join(names))
            for names in [
                *([name] for name in WHOLE),
                ["image-classification", "compression/pruned-int8"],
                ["keyword-spotting", "compression/pruned-distilled-int8"],
                ["visual-wake-words", "compression/int8"],
                ["anomaly-detection", "compression/ptq"],
                ["anomaly-detection", "compression/pruned-distilled-int8"],
            ]
        ),
    ],
)
def test_recipe_trains_quantizes_and_exports(
    names: list[str],
    targets: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    options = _data(names[0], tmp_path / "data")
    if names != ["quickstart"]:
        # The quickstart writes the float files; a second time they only take time.
        options.append("--trainer.callbacks.fp32_files=false")
    if len(targets) == 1:
        options += [f"--trainer.callbacks.targets={json.dumps(targets)}", "--trainer.limit_val_batches=1"]
    _fit(names, options, monkeypatch)
    capfd.readouterr()
    folder = tmp_path / "artifacts" / names[-1].removeprefix("compression/")
    report = json.loads((folder / "report.json").read_text())
    rows = {(row["target"], row["precision"], row["source"]): row for row in report["rows"]}
    assert {row["target"] for row in report["rows"]} == {"torch", *targets}
    for target in targets:
        row = rows[target, "int8", "post-training" if names[-1].endswith("ptq") else "trained"]
        assert row["error"] is None
        assert row["int8_weight_share"] == 1.0
        assert (folder / row["path"]).exists()
