"""Fronts and conditions, what is read of reports, and the files of the chosen trial."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweep_files import CONFIG, GRID, engine, report_of

from lightning_edge.cli.front import main, table
from lightning_edge.condition import read_condition
from lightning_edge.errors import SweepError
from lightning_edge.sweeps.fit import Fit
from lightning_edge.sweeps.front import Front, TrialRecord, read_front, with_front
from lightning_edge.sweeps.objectives import (
    Figure,
    NoSuchFigureError,
    TrialFailedError,
    measure,
    read_report,
    row_to_ship,
)
from lightning_edge.sweeps.page import write_page

OBJECTIVES: dict[str, Any] = {"val_acc": "max", "tflite.size_bytes": "min"}


def record(number: int, accuracy: float, size: float, feasible: bool = True) -> TrialRecord:
    values = {"val_acc": accuracy, "tflite.size_bytes": size}
    folder = f"trial-{number:04d}"
    return TrialRecord(number, "complete", {"width": number}, values, None, feasible, False, folder, None, 1.0)


def test_the_front_is_that_of_optuna() -> None:
    optuna = pytest.importorskip("optuna")
    chance = random.Random(0)
    study = optuna.create_study(directions=["maximize", "minimize"])
    records = []
    for number in range(60):
        values = [chance.randint(0, 12), chance.randint(0, 12)]  # with ties
        trial = study.ask()
        limit = chance.choice([-1.0, 0.0, 1.0])
        trial.set_constraint("limit", limit)
        study.tell(trial, values)
        records.append(record(number, *values, feasible=limit <= 0))
    found = [trial.number for trial in with_front(records, OBJECTIVES) if trial.front]
    assert found == sorted(trial.number for trial in study.best_trials)
    assert 1 < len(found) < 60


def test_the_best_under_a_condition() -> None:
    trials = with_front([record(0, 0.9, 50), record(1, 0.8, 30), record(2, 0.95, 40, feasible=False)], OBJECTIVES)
    front = Front("study", OBJECTIVES, {}, "base.yaml", trials)
    assert [trial.number for trial in front.front] == [0, 1]
    assert front.best().number == 0
    assert front.best(read_condition("tflite.size_bytes < 50")).number == 1
    assert front.best(read_condition("tflite.size_bytes<=5e1")).number == 0
    assert front.best(read_condition(" val_acc > .85 ")).number == 0
    with pytest.raises(SweepError, match=r"no feasible trial has tflite.size_bytes < 30; .* is 30 to 50"):
        front.best(read_condition("tflite.size_bytes < 30"))
    with pytest.raises(SweepError, match=r"'size' is no objective of this sweep; allowed: val_acc, tflite.size_bytes"):
        front.best(read_condition("size < 30"))
    with pytest.raises(SweepError, match="no trial of study is complete"):
        Front("study", OBJECTIVES, {}, "base.yaml", []).best()


@pytest.mark.parametrize(
    "text", ["", "a < b", "a == 3", "a < 3 < 4", "a 3", "< 3", "a < 1e999", "a < nan", "__import__('os') < 1 and a < 2"]
)
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(ValueError, match=r"given .*allowed: a name, one of < <= > >=, a number"):
        read_condition(text)


def test_front_json_keeps_to_its_form(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    front = engine(tmp_path / "sweep").run().front
    written = json.loads((tmp_path / "sweep" / "front.json").read_text())
    assert list(written) == ["study", "objectives", "constraints", "base", "trials"]
    assert written["study"] == "study"
    assert written["objectives"] == OBJECTIVES
    assert written["constraints"] == {"tflite.p95_ms": 3.5}
    assert list(written["trials"][0]) == [
        *(
            "number",
            "status",
            "settings",
            "values",
            "spread",
            "feasible",
            "front",
            "folder",
            "reason",
            "seconds",
            "url",
            "limited",
        )
    ]
    assert read_front(tmp_path / "sweep") == front


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"trials": 3}',
        '{"study": "a", "objectives": {"a": "max"}, "constraints": {}, "base": "b", "trials": [{}]}',
    ],
)
def test_what_is_no_front(tmp_path: Path, text: str) -> None:
    (tmp_path / "front.json").write_text(text)
    with pytest.raises(SweepError, match="is not what lightning-edge sweep writes"):
        read_front(tmp_path)


def test_a_folder_outside_of_the_sweep_is_not_followed(tmp_path: Path) -> None:
    given = json.loads(Front("s", OBJECTIVES, {}, "b", [record(0, 1, 1)]).write(tmp_path).read_text())
    given["trials"][0]["folder"] = "../elsewhere"
    (tmp_path / "front.json").write_text(json.dumps(given))
    with pytest.raises(SweepError, match="is none of a trial"):
        read_front(tmp_path)


ROW: dict[str, Any] = {
    "target": "tflite",
    "precision": "int8",
    "error": None,
    "size_bytes": 7,
    "metrics": {"val_acc": 0.5},
}
FLOAT = {**ROW, "precision": "fp32", "size_bytes": 28}
SIZE, ACCURACY = Figure("tflite.size_bytes", "tflite", "size_bytes"), Figure("val_acc", "tflite", "val_acc")


def test_the_file_to_ship_is_the_int8_one() -> None:
    trained = {**ROW, "size_bytes": 6}
    assert measure({"rows": [{**ROW, "target": "torch"}, ROW, FLOAT, trained]}, [SIZE, ACCURACY]) == {
        "tflite.size_bytes": 6.0,
        "val_acc": 0.5,
    }
    assert row_to_ship({"rows": [FLOAT]}, "tflite") == FLOAT
    assert row_to_ship({"rows": [FLOAT, {**FLOAT, "scheme": "int4"}]}, "tflite")["scheme"] == "int4"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "the report has no file of tflite"),
        ([{**ROW, "target": "onnx"}], "the report has no file of tflite"),
        ([FLOAT, {**ROW, "error": "refused\nin full"}], "the file of tflite failed: refused"),
        ([FLOAT, {**ROW, "target": "torch", "error": "no data"}], "there is no int8 network: no data"),
        ([{**ROW, "size_bytes": None}], "tflite.size_bytes: the report has no number there, but None"),
    ],
)
def test_a_file_that_is_missing_fails_its_trial(rows: list[Any], told: str) -> None:
    with pytest.raises(TrialFailedError, match=told):
        measure({"rows": rows}, [SIZE])


def test_what_no_trial_can_measure() -> None:
    with pytest.raises(NoSuchFigureError, match="has no val_f1; it has: val_acc, size_bytes"):
        measure({"rows": [ROW]}, [Figure("val_f1", "tflite", "val_f1")])
    simulated = {**ROW, "p95_ms": 1.0, "is_reference": True, "runtime": "MIL in torch"}
    with pytest.raises(NoSuchFigureError, match=r"cannot be measured on this machine .MIL in torch is a reference"):
        measure({"rows": [simulated]}, [Figure("tflite.p95_ms", "tflite", "p95_ms")])
    assert measure({"rows": [simulated]}, [SIZE]) == {"tflite.size_bytes": 7.0}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 3}'])
def test_a_report_that_cannot_be_used_fails_its_trial(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(TrialFailedError, match="its report"):
        read_report(tmp_path / "report.json")
    with pytest.raises(TrialFailedError, match="it wrote no report"):
        read_report(tmp_path / "none.json")


def writes_files(fit: Fit) -> dict[str, Any]:
    fit.report_path.parent.mkdir(parents=True)
    report = report_of(fit.config)
    fit.report_path.write_text(json.dumps(report))
    (fit.report_path.parent / "model-int8.tflite").write_text(str(fit.config["seed_everything"]))
    (fit.folder / "config.yaml").write_text(yaml.safe_dump(fit.config))
    (fit.folder / "last.ckpt").write_text("")
    return report


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_best_files_are_copied_with_a_configuration_to_train_on(
    tmp_path: Path, seeds: int, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    engine(tmp_path / "sweep", f"{GRID}\nseeds: {seeds}\n", writes_files).run()
    folder, to = str(tmp_path / "sweep"), tmp_path / "new" / "best"
    assert main([folder]) == 0
    assert "5 on the front" in capsys.readouterr().out
    assert main([folder, "--best", "tflite.size_bytes < 5000", "--to", str(to)]) == 0
    told = capsys.readouterr().out
    assert f"lightning-edge fit --config {to / 'config.yaml'} --ckpt_path " in told
    assert sorted(path.name for path in to.iterdir()) == ["config.yaml", "model-int8.tflite", "report.json"]
    assert json.loads((to / "report.json").read_text())["rows"][-1]["size_bytes"] == 4000
    # More accurate with the larger seed, as the tests' trainings are.
    assert (to / "model-int8.tflite").read_text() == str(CONFIG["seed_everything"] + seeds - 1)
    config = yaml.safe_load((to / "config.yaml").read_text())
    assert config["trainer"]["callbacks"][1]["init_args"]["dirpath"] == str(to / "training" / "artifacts")

    assert main([folder, "--best", "tflite.size_bytes < 5000", "--to", str(to)]) == 2
    assert "exists already; give a new folder" in capsys.readouterr().err


def test_mistakes_have_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "has no front.json; give the folder of a sweep" in capsys.readouterr().err
    Front("s", OBJECTIVES, {}, "b", [record(0, 1, 1)]).write(tmp_path)
    assert main([str(tmp_path), "--to", "x"]) == 2
    assert "--to: which trial? Give a --best" in capsys.readouterr().err
    assert main([str(tmp_path), "--best", "val_acc >= 0", "--to", str(tmp_path / "x")]) == 2
    assert "the machine that trained the trial has its files" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_table_marks_what_breaks_a_constraint() -> None:
    from rich.console import Console

    slow = replace(record(2, 0.95, 40, feasible=False), limited={"tflite.p95_ms": 4.25})
    stopped = replace(record(3, 0, 0), status="stopped", values={}, feasible=False)
    trials = with_front([record(0, 0.9, 50), slow, stopped], OBJECTIVES)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table(Front("s", OBJECTIVES, {"tflite.p95_ms": 3.5}, "b", trials)))
    text = console.export_text()
    assert "s: 2 complete, 0 failed, 1 stopped, 1 on the front" in text
    assert "tflite.p95_ms 4.25 > 3.5" in text
    console.print(table(Front("s", OBJECTIVES, {}, "b", trials[:1])))
    assert "breaks" not in console.export_text(clear=True).replace(text, "")


def test_the_table_shows_text_as_it_is() -> None:
    from rich.console import Console

    trial = TrialRecord(
        0,
        "complete",
        {"a": "[bold]x", "b": None},
        {"val_acc": 0.5},
        {"val_acc": 0.01},
        True,
        True,
        "trial-0000",
        None,
        1.0,
    )
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(Front("s", {"val_acc": "max"}, {}, "b", [trial])))
    text = console.export_text()
    assert "[bold]x" in text
    assert "0.5 ± 0.01" in text


def test_the_page_and_the_picture_lie_beside_the_trials(tmp_path: Path) -> None:
    trials = [
        TrialRecord(
            0,
            "complete",
            {"a": 1},
            {"val_acc": 0.9, "tflite.size_bytes": 10.0},
            None,
            True,
            True,
            "trial-0000",
            None,
            9.0,
        ),
        TrialRecord(1, "failed", {"a": 2}, {}, None, False, False, "trial-0001", "it diverged", 3.0),
    ]
    front = Front("sweep", {"val_acc": "max", "tflite.size_bytes": "min"}, {}, "base.yaml", trials)
    page = write_page(front, tmp_path)
    assert page == tmp_path / "report.html"
    text = page.read_text()
    assert "it diverged" in text
    assert "./trial-0000/artifacts/report.html" in text
    assert (tmp_path / "front.svg").read_text().startswith("<svg")


def test_nothing_to_draw_is_no_picture_and_a_page_all_the_same(tmp_path: Path) -> None:
    failed = TrialRecord(0, "failed", {"a": 2}, {}, None, False, False, "trial-0000", "it diverged", 3.0)
    write_page(Front("sweep", {"val_acc": "max"}, {}, "base.yaml", [failed]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_broken_file_is_a_failed_trial() -> None:
    row = {"target": "tflite", "precision": "int8", "verdict": "broken", "verdict_reason": "values are not finite"}
    with pytest.raises(TrialFailedError, match="the file of tflite is broken: values are not finite"):
        row_to_ship({"rows": [row]}, "tflite")
    assert row_to_ship({"rows": [{**row, "verdict": "differs"}]}, "tflite")["verdict"] == "differs"
