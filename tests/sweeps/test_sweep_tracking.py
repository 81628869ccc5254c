"""Weights & Biases: runs of trials, the run of the sweep read back, and what an agent makes of our configuration."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml
from sweep_files import CONFIG, GRID, engine, report_of, sweep_of
from test_tracking import history, own_environment, records

from lightning_edge.cli import sweep as command
from lightning_edge.errors import SweepError
from lightning_edge.sweeps.agent_trial import run_settings
from lightning_edge.sweeps.fit import Fit
from lightning_edge.sweeps.page import write_page
from lightning_edge.sweeps.tracking import as_trial, log_front, logger_of, with_logger
from lightning_edge.sweeps.wandb_agent import logged_name, read_settings, wandb_config

wandb = pytest.importorskip("wandb")
pytest.importorskip("optuna")

__all__ = ["own_environment"]  # a fixture

SETTINGS = {"prune.macs": 0.75, "model.init_args.width": 4}


def with_loggers(*loggers: dict[str, Any]) -> dict[str, Any]:
    return {**CONFIG, "trainer": {**CONFIG["trainer"], "logger": list(loggers)}}


def test_a_trials_run_is_in_the_group_of_the_study_with_its_settings() -> None:
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}
    own = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "p", "config": {"a": 1}}}
    config = as_trial(with_loggers(csv, own), SETTINGS, "study", "trial-0003")
    logger = logger_of(config)
    assert logger is not None
    assert logger["init_args"] == {
        "project": "p",
        "config": {"a": 1, **SETTINGS},
        "name": "trial-0003",
        "group": "study",
        "job_type": "trial",
    }
    assert config["trainer"]["logger"][0] == csv
    assert own["init_args"] == {"project": "p", "config": {"a": 1}}
    assert as_trial(CONFIG, SETTINGS, "study", "trial-0003") == CONFIG


def test_a_logger_is_added_where_there_is_none() -> None:
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}
    for config, others in ((CONFIG, 0), (with_loggers(csv), 1), (with_loggers(), 0)):
        loggers = with_logger(config, "study")["trainer"]["logger"]
        assert len(loggers) == others + 1
        assert loggers[-1]["init_args"]["project"] == "study"
    once = with_logger(CONFIG, "study")
    assert with_logger(once, "other") == once


def test_the_run_of_the_sweep_has_the_table_and_the_charts(tmp_path: Path) -> None:
    front = engine(tmp_path / "sweep").run().front
    logger = {
        "class_path": "x.WandbLogger",
        "init_args": {"project": "digits", "offline": True, "save_dir": "elsewhere"},
    }
    page = write_page(front, tmp_path / "sweep")
    assert log_front(front, logger, tmp_path / "sweep", "0123") is None  # offline, so nowhere to look

    read = records(tmp_path / "sweep")
    (run,) = [record.run for record in read if record.HasField("run")]
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("digits", "study", "sweep", "study")
    tables = {
        path.name.partition("_")[0]: path for path in (tmp_path / "sweep").rglob("files/media/table/**/*.table.json")
    }
    content = json.loads(next(path for name, path in tables.items() if name.startswith("trials")).read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    assert [row["trial"] for row in rows] == list(range(6))
    assert rows[0]["tflite.size_bytes"] == front.trials[0].values["tflite.size_bytes"]
    assert rows[0]["prune.macs"] == 1.0
    assert [row["front"] for row in rows] == [trial.front for trial in front.trials]
    logged = history(tmp_path / "sweep")
    assert logged["sweep/trials/nrows"] == 6
    assert logged["sweep/val_acc over tflite size_bytes_table/nrows"] == 6
    (shown,) = (tmp_path / "sweep").rglob("files/media/html/**/*.html")
    assert shown.read_text() == page.read_text()


def test_a_run_that_fails_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    front = engine(tmp_path / "sweep").run().front
    monkeypatch.setattr(wandb, "Table", lambda **options: 1 / 0)
    logger = {"class_path": "x.WandbLogger", "init_args": {"offline": True}}
    with pytest.warns(UserWarning, match="wandb did not take the sweep .ZeroDivisionError"):
        assert log_front(front, logger, tmp_path / "sweep", "0123") is None


def test_the_configuration_for_agents_is_the_same_space() -> None:
    text = GRID.replace(
        "[4, 8]", "[[4], [8, 8]]\n  model.b: {low: 1e-4, high: 1e-2, log: true}\n  model.c: {low: 1, high: 9}"
    )
    text = text.replace("width: [[4], [8, 8]]", "layers: [[4], [8, 8]]") + "trials: 7\n"
    config = wandb_config(sweep_of(text), Path("my sweep.yaml"))
    assert yaml.safe_load(yaml.safe_dump(config)) == config
    assert config["method"] == "bayes"
    assert config["run_cap"] == 7
    assert config["metric"] == {"name": "edge/tflite/val_acc", "goal": "maximize"}
    assert config["parameters"] == {
        "prune.macs": {"values": [1.0, 0.75, 0.5]},
        "model.init_args.layers": {"values": ["[4]", "[8, 8]"]},
        "model.b": {"distribution": "log_uniform_values", "min": 0.0001, "max": 0.01},
        "model.c": {"distribution": "int_uniform", "min": 1, "max": 9},
    }
    assert wandb_config(sweep_of(), Path("s.yaml"))["method"] == "grid"
    assert "run_cap" not in wandb_config(sweep_of(), Path("s.yaml"))


def test_names_are_those_that_are_logged() -> None:
    from lightning_edge.reporting.report import Report, Row

    row = Row("tflite", "int8", "trained", metrics={"val_acc": 1.0}, size_bytes=1, p50_ms=1, p95_ms=1, p99_ms=1, top1=1)
    logged = Report("m", "validate", [row]).metrics()
    text = "base: b\nspace: {prune.macs: [0.5]}\nobjectives: {tflite.NAME: min}"
    for field in ("val_acc", "size_bytes", "p50_ms", "p95_ms", "p99_ms", "top1"):
        assert logged_name(sweep_of(text.replace("NAME", field)).objectives[0].figure) in logged


def agents_command(config: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Put a command together with W&B's own functions, as `wandb agent` does before it starts a run."""
    from wandb.sdk.launch.sweeps import utils

    macros = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in given.items()}})
    macros |= {"interpreter": ["python"], "program": [config["program"]], "env": ["/usr/bin/env"]}
    words: list[str] = []
    for word in utils.create_sweep_command(list(config["command"])):
        words += macros[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    return words


def test_an_agents_command_is_one_that_our_command_line_takes() -> None:
    sweep = sweep_of()
    words = agents_command(wandb_config(sweep, Path("my sweep.yaml")), SETTINGS)
    assert words[:5] == ["/usr/bin/env", "python", "-m", "lightning_edge.cli", "sweep"]
    given = command._parser().parse_args(words[5:])
    assert given.file == Path("my sweep.yaml")
    assert read_settings(sweep, given.settings) == SETTINGS


def test_lists_come_back_from_an_agent_as_lists() -> None:
    sweep = sweep_of(GRID.replace("width: [4, 8]", "layers: [[4], [8, 8]]"))
    words = agents_command(wandb_config(sweep, Path("s.yaml")), {"prune.macs": 1, "model.init_args.layers": "[8, 8]"})
    assert read_settings(sweep, words[-1]) == {"prune.macs": 1.0, "model.init_args.layers": [8, 8]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "which is no JSON"),
        ("[]", "allowed: a JSON object with the keys prune.macs, model.init_args.width"),
        ('{"prune.macs": 0.5}', "allowed: a JSON object with the keys prune.macs, model.init_args.width"),
        ('{"prune.macs": 0.6, "model.init_args.width": 4}', "prune.macs: given 0.6; allowed: {'choices': .1.0, 0.75"),
        ('{"prune.macs": [1], "model.init_args.width": 4}', r"prune.macs: given \[1\]"),
    ],
)
def test_settings_that_are_none(text: str, told: str) -> None:
    with pytest.raises(SweepError, match=told):
        read_settings(sweep_of(), text)


def test_an_agents_trial_is_logged_and_kept_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc/1")
    seen: list[Fit] = []

    def runner(fit: Fit) -> dict[str, Any]:
        seen.append(fit)
        return report_of(fit.config)

    values = run_settings(sweep_of(), SETTINGS, tmp_path, Event(), runner)
    assert values["tflite.size_bytes"] == 3000
    (fit,) = seen
    assert fit.folder == tmp_path / "agent" / "abc-1"
    logger = logger_of(fit.config)
    assert logger is not None
    assert logger["init_args"]["config"] == SETTINGS
    assert logger["init_args"]["save_dir"] == str(fit.folder)
    with pytest.raises(SweepError, match="cannot be made"):
        run_settings(sweep_of(), SETTINGS, tmp_path, Event(), runner)
    engine(tmp_path)  # a sweep of our own may go there, too
