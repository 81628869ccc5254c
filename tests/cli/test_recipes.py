"""Every recipe that ships: found, commented with its command, parsed, and run for a few steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_edge.cli.config_files import recipe_names, recipe_path
from lightning_edge.cli.main import main

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
# Twelve batches in one epoch: the last is beyond 0.9 of training, where the latest of the recipes quantizes.
SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=12",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def test_there_are_recipes() -> None:
    assert {"quickstart", "digits-pruned-int8", "cifar10-resnet8-int8"} <= set(recipe_names())
    assert [recipe_path(name) for name in recipe_names()] == RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_first_comment_is_the_command(path: Path) -> None:
    assert path.read_text().splitlines()[0] == f"# lightning-edge fit --config recipe:{path.stem}"
    assert yaml.safe_load(path.read_text())["seed_everything"] == 0


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem == "digits-pruned-int8" else pytest.mark.slow) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_recipe_trains_quantizes_and_exports(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", f"recipe:{path.stem}", *SHORT]
    if "cifar10" in path.stem:
        random = np.random.default_rng(0)
        for split in ("train", "test"):
            images, labels = random.integers(0, 256, (32, 32, 32, 3), np.uint8), np.arange(32) % 10
            np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
        arguments += [f"--data.folder={tmp_path}", "--data.validation_size=8", "--data.batch_size=2"]
    if path.stem != "quickstart":
        # The quickstart writes the float files; a second time they only take time.
        arguments.append("--trainer.callbacks.fp32_files=false")
    monkeypatch.setattr(sys, "argv", ["lightning-edge", *arguments])
    main()
    capfd.readouterr()
    report = json.loads((tmp_path / "artifacts" / path.stem / "report.json").read_text())
    rows = {(row["target"], row["precision"], row["source"]): row for row in report["rows"]}
    for target in ("executorch", "coreml", "tflite"):
        row = rows[target, "int8", "trained"]
        assert row["error"] is None
        assert row["int8_weight_share"] == 1.0
        assert (tmp_path / "artifacts" / path.stem / row["path"]).exists()
