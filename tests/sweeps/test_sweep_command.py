"""`lightning-edge sweep` as a command: what it refuses, what it trains, how it is stopped and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml

from lightning_edge.cli.main import main
from lightning_edge.cli.sweep_base import CommandLineChecker
from lightning_edge.errors import SweepError
from lightning_edge.sweeps.fit import Fit, InterruptedFitError, run_address, run_fit, why_it_failed
from lightning_edge.sweeps.front import Front, TrialRecord
from lightning_edge.sweeps.locks import take
from lightning_edge.sweeps.objectives import TrialFailedError

pytest.importorskip("optuna")

BASE: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "lightning_edge.EdgeCompressionCallback",
                "init_args": {
                    "phases": [
                        {"class_path": "lightning_edge.Prune", "init_args": {"macs": 0.5, "start": 0.2}},
                        {"class_path": "lightning_edge.Quantize", "init_args": {"start": 0.5}},
                    ]
                },
            },
            {
                "class_path": "lightning_edge.DeviceEvaluationCallback",
                "init_args": {
                    "targets": ["tflite"],
                    "calibration_batches": 0,
                    "fp32_files": False,
                    "timing": {"warmup": 1, "repeats": 5},
                },
            },
        ],
    },
    "model": {
        "class_path": "lightning_edge.zoo.task.Classifier",
        "init_args": {"network": "lightning_edge.zoo.networks.DigitsCNN", "learning_rate": 0.01},
    },
    "data": {"class_path": "lightning_edge.zoo.digits.DigitsDataModule"},
}
SWEEP = """
base: base.yaml
space:
  prune.macs: [1.0, 0.5]
  model.init_args.learning_rate: [1e-2]
objectives: {val_acc: max, tflite.size_bytes: min, tflite.p95_ms: min}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(yaml.safe_dump(BASE))
    Path("sweep.yaml").write_text(SWEEP)
    return tmp_path


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main([*arguments])
    return int(exit_info.value.code or 0)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("prune.macs", "prune.mac", "trainer.callbacks.phases.mac: lightning_edge.Prune has no such setting"),
        ("[1.0, 0.5]", "[1.0, 2.5]", "space: prune.macs: 2.5 is not allowed: Prune: macs=2.5 is no target"),
        ("[1e-2]", "[fast]", "learning_rate: 'fast' is not allowed"),
        ("init_args.learning_rate", "init_args.rate", "lightning_edge.zoo.task.Classifier has no such setting"),
        ("model.init_args.learning_rate", "trainer.max_epoch", "max_epoch: there is no such key"),
        (
            "prune.macs: [1.0, 0.5]",
            "quantize.precisions: [int8, mixde]",
            "'mixde' is not allowed: .*precisions: given 'mixde'.*'mixed'",
        ),
        ("base.yaml", "recipe:nothing", "base: there is no recipe 'nothing'. Recipes: anomaly"),
        ("base.yaml", "nothing.yaml", "base: there is no file 'nothing.yaml'"),
        ("base.yaml", "sweep.yaml", "base: sweep.yaml: space: there is no such key"),
    ],
)
def test_a_mistake_has_status_2_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, told: str
) -> None:
    import re

    Path("sweep.yaml").write_text(SWEEP.replace(old, new))
    assert status("sweep", "sweep.yaml") == 2
    captured = capsys.readouterr()
    assert re.search(told, captured.err.replace("\n", " ")), captured.err
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert sorted(path.name for path in folder.iterdir()) == ["base.yaml", "sweep.yaml"]


def test_arguments_that_are_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("sweep", "sweep.yaml", "--workers", "0") == 2
    assert "given '0'; allowed: a whole number from 1 on" in capsys.readouterr().err
    assert status("sweep", "none.yaml") == 2
    assert "there is no file none.yaml; give a sweep file" in capsys.readouterr().err
    assert status("sweep", "sweep.yaml", "--storage", "sqlite:////nowhere/at/all.db") == 2
    assert "--storage sqlite:////nowhere/at/all.db: it cannot be used" in capsys.readouterr().err
    assert status("sweep", "sweep.yaml", "--settings", "{}") == 2
    assert "allowed: a JSON object with the keys prune.macs" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["base.yaml", "sweep.yaml"]


def test_a_dry_run_prints_the_trials_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("sweep", "sweep.yaml", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "0: prune.macs=1.0, model.init_args.learning_rate=0.01\n" in told
    assert "2 trials x 1 seed = 2 fits" in told
    assert "cost: 2 epochs; the time is told after the first trial" in told
    Path("sweep.yaml").write_text(
        SWEEP.replace("prune.macs: [1.0, 0.5]", "quantize.precisions: {choices: [int8, mixed]}")
    )
    assert status("sweep", "sweep.yaml", "--dry-run") == 0
    assert "1: quantize.precisions=mixed, model.init_args.learning_rate=0.01\n" in capsys.readouterr().out
    Path("sweep.yaml").write_text(f"{SWEEP.replace('[1e-2]', '{low: 1e-3, high: 1e-2}')}\ntrials: 20\nseeds: 2\n")
    assert status("sweep", "sweep.yaml", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "9: prune.macs=" in told
    assert "Examples: tpe samples anew" in told
    assert "20 trials x 2 seeds = 40 fits" in told
    assert sorted(path.name for path in folder.iterdir()) == ["base.yaml", "sweep.yaml"]


def test_a_dry_run_tells_the_time_from_trials_that_are_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = folder / "sweeps" / "sweep"
    place.mkdir(parents=True)
    done = TrialRecord(0, "complete", {}, {}, None, False, False, "trial-0000", None, 120.0)
    Front("sweep", {"val_acc": "max"}, {}, "base.yaml", [done]).write(place)
    Path("sweep.yaml").write_text(f"{SWEEP.replace('[1e-2]', '{low: 1e-3, high: 1e-2}')}\ntrials: 20\nseeds: 2\n")
    assert status("sweep", "sweep.yaml", "--dry-run", "--workers", "2") == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "cost: 40 epochs; 2 min for each of the 1 done, so about 19 min for 19 more, 2 at once"


def test_a_configuration_for_wandb_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("sweep", "sweep.yaml", "--wandb-config") == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["metric"] == {"name": "edge/tflite/val_acc", "goal": "maximize"}
    assert config["command"][-1] == "${args_json}"


def test_the_checker_completes_what_it_checks(folder: Path) -> None:
    checker = CommandLineChecker()
    config = checker.resolve("base.yaml")
    assert config["trainer"]["callbacks"][0]["init_args"]["phases"][0]["init_args"]["criterion"] == "l2"
    checker.check(config)
    config["trainer"]["callbacks"][0]["init_args"]["phases"][1]["init_args"]["start"] = 0.1
    with pytest.raises(SweepError, match="Prune makes its last change at"):
        checker.check(config)
    assert checker.resolve("recipe:quickstart")["trainer"]["max_epochs"] == 20


@pytest.mark.slow
def test_a_training_that_cannot_begin_fails_with_what_it_says(tmp_path: Path) -> None:
    lock = take(tmp_path / "lock")
    assert lock is not None
    with pytest.raises(TrialFailedError, match=r"model: given 'no.such.Model', which cannot be imported"):
        run_fit(Fit({"model": {"class_path": "no.such.Model"}}, tmp_path, lock.fileno(), Event(), {}))
    assert "no.such.Model" in (tmp_path / "log.txt").read_text()
    # It is ended, and with it the lock that it had, too.
    lock.close()
    assert take(tmp_path / "lock") is not None


def test_a_training_that_is_stopped_is_ended_with_all_of_its_group(tmp_path: Path) -> None:
    lock, stop = take(tmp_path / "lock"), Event()
    assert lock is not None
    stop.set()
    with pytest.raises(InterruptedFitError):
        run_fit(Fit(BASE, tmp_path, lock.fileno(), stop, {}))
    lock.close()
    assert take(tmp_path / "lock") is not None


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        (1, "Epoch 1\nerror: the disk is full\n(JSONARGPARSE_DEBUG=true shows where)\n", "the disk is full"),
        (1, "Traceback:\n  File x\nValueError: \x1b[31mbad\x1b[0m shape\n", "ValueError: bad shape"),
        (-9, "Epoch 1\n", "ended by SIGKILL; often there was no memory left"),
        (-11, "", "ended by SIGSEGV"),
        (3, "", "it ended with status 3 and said nothing"),
    ],
)
def test_the_reason_of_a_failure_is_what_was_said_last(code: int, said: str, reason: str) -> None:
    assert why_it_failed(code, said) == reason


def test_the_address_of_a_run_is_found_in_the_output(tmp_path: Path) -> None:
    assert run_address(tmp_path) is None
    (tmp_path / "log.txt").write_text(
        "wandb: \x1b[33mView run\x1b[0m x at: \x1b[34mhttps://wandb.ai/me/p/runs/ab12\x1b[0m\nEpoch 1"
    )
    assert run_address(tmp_path) == "https://wandb.ai/me/p/runs/ab12"


@pytest.mark.slow
def test_a_sweep_of_real_trainings_is_stopped_and_goes_on(folder: Path) -> None:
    command = [sys.executable, "-m", "lightning_edge.cli", "sweep", "sweep.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    second = folder / "sweeps" / "sweep" / "trial-0001" / "log.txt"
    given_up = time.monotonic() + 300
    while not (second.exists() and second.read_text()) and time.monotonic() < given_up:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert f"To go on: {'lightning-edge'} sweep sweep.yaml" in told
    front = json.loads((folder / "sweeps" / "sweep" / "front.json").read_text())
    assert [trial["status"] for trial in front["trials"]] == ["complete", "stopped"]
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(folder) not in left  # every training names its folder

    first = (folder / "sweeps" / "sweep" / "trial-0000" / "log.txt").stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert (folder / "sweeps" / "sweep" / "trial-0000" / "log.txt").stat().st_mtime_ns == first
    front = json.loads((folder / "sweeps" / "sweep" / "front.json").read_text())
    assert [trial["status"] for trial in front["trials"]] == ["complete"] * 2
    for trial in front["trials"]:
        report = json.loads((folder / "sweeps" / "sweep" / trial["folder"] / "artifacts" / "report.json").read_text())
        (row,) = [row for row in report["rows"] if row["target"] == "tflite"]
        assert trial["values"]["tflite.size_bytes"] == row["size_bytes"]
        assert trial["values"]["val_acc"] == row["metrics"]["val_acc"]
    assert front["trials"][1]["values"]["tflite.size_bytes"] < front["trials"][0]["values"]["tflite.size_bytes"]

    best = subprocess.run(
        [*command[:3], "front", "sweeps/sweep", "--best", "tflite.size_bytes > 0", "--to", "best"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert best.returncode == 0, best.stderr
    (line,) = [line for line in best.stdout.splitlines() if line.startswith("To train on from it: ")]
    words = line.removeprefix("To train on from it: lightning-edge ").replace("MORE", "2").split()
    on = subprocess.run([*command[:3], *words], capture_output=True, text=True, check=False)
    assert on.returncode == 0, on.stderr
    assert (folder / "best" / "training" / "artifacts" / "model-int8.tflite").is_file()
    assert os.path.getsize(folder / "best" / "report.json") > 0
