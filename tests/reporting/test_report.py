"""The report's forms, and that its files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_edge.contents import Placement, Placements
from lightning_edge.errors import EdgeError
from lightning_edge.reporting.budget import Excess, Verdict
from lightning_edge.reporting.monitor import Monitor, choose, direction
from lightning_edge.reporting.report import Report, Row, digest, installed_versions
from lightning_edge.reporting.rows import without_gain

ROWS = (
    Row("torch", "fp32", "float", metrics={"val_loss": 0.5, "val_acc": 0.9}, size_bytes=4000, p50_ms=1.25),
    Row("torch", "int8", "post-training", metrics={"val_loss": 0.6, "val_acc": 0.8}, is_reference=True),
    Row("torch", "int8", "trained", metrics={"val_loss": 0.5, "val_acc": 0.89}, is_reference=True),
    Row(
        "tflite",
        "int8",
        "trained",
        path="model-int8.tflite",
        metrics={"val_loss": 0.5, "val_acc": 0.88},
        size_bytes=98_496,
        compressed_bytes=70_000,
        load_ms=3.5,
        p50_ms=0.5,
        p95_ms=0.75,
        p99_ms=1.0,
        throughput=1800.0,
        peak_memory_bytes=856_064,
        samples=1000,
        top1=0.995,
        max_steps=2.0,
        mean_steps=0.25,
        int8_weight_share=1.0,
        float_ops=("softmax", "softmax"),
        runtime="LiteRT",
        placements=Placements(
            "the runtime",
            (Placement("CONV_2D", "delegate", 9, 12_000), Placement("SOFTMAX", "cpu", 1, 0)),
        ),
        budget=Verdict("exceeded", (Excess("size_bytes", 98_000, 98_496),), ("peak_memory_bytes",)),
        verdict="close",
        verdict_reason="0.25 quantization steps off on average",
    ),
    Row("coreml", "int8", "trained", error="coreml: no such | operation", metrics={"val_acc": 0.1}),
)
REPORT = Report(
    model="Digits",
    split="validate",
    rows=ROWS,
    monitor="val_acc",
    warmup=3,
    repeats=20,
    calibration_batches=7,
    seed=1,
    warnings=("look here",),
    notes=("done so",),
    versions={"torch": "2.13.0"},
)


def test_metrics_are_flat_by_target() -> None:
    found = REPORT.metrics()
    assert found["edge/tflite/val_acc"] == 0.88
    assert found["edge/tflite/size_bytes"] == 98_496
    assert found["edge/tflite/latency_p99_ms"] == 1.0
    assert found["edge/tflite/top1_agreement"] == 0.995
    assert found["edge/tflite/peak_memory_bytes"] == 856_064
    assert found["edge/tflite/fallback_share"] == 0.0
    assert found["edge/tflite/within_budget"] == 0.0
    assert found["edge/torch/fp32_val_acc"] == 0.9
    assert found["edge/torch/post_training_val_acc"] == 0.8
    assert found["edge/torch/val_acc"] == 0.89
    assert all(isinstance(value, float) for value in found.values())


def test_metrics_hold_of_what_failed_the_verdict_alone_and_not_what_is_not_known() -> None:
    found = REPORT.metrics()
    assert {name: value for name, value in found.items() if name.startswith("edge/coreml")} == {
        "edge/coreml/verdict": -1.0
    }
    assert found["edge/tflite/verdict"] == 2.0
    assert "edge/torch/load_ms" not in found


def test_post_training_is_the_int8_network_where_none_was_trained() -> None:
    assert replace(REPORT, rows=ROWS[:2]).metrics()["edge/torch/val_acc"] == 0.8


def test_json_holds_everything() -> None:
    found = json.loads(REPORT.to_json())
    assert found["rows"][3]["metrics"] == {"val_loss": 0.5, "val_acc": 0.88}
    assert found["rows"][3]["float_ops"] == ["softmax", "softmax"]
    assert found["rows"][4]["error"] == "coreml: no such | operation"
    assert (found["warmup"], found["repeats"], found["threads"], found["seed"]) == (3, 20, 1, 1)


def test_json_is_json_also_with_numbers_that_are_not_finite() -> None:
    row = replace(ROWS[0], metrics={"val_loss": math.nan}, max_relative=math.inf)
    found = json.loads(replace(REPORT, rows=(row,)).to_json(), parse_constant=lambda name: pytest.fail(name))
    assert found["rows"][0]["metrics"]["val_loss"] is None


def test_markdown_is_a_table_with_a_cell_for_every_column() -> None:
    text = REPORT.to_markdown()
    table = [line for line in text.splitlines() if line.startswith("|")]
    first = table[: len(ROWS) + 2]
    assert {line.replace("\\|", "").count("|") for line in first} == {first[0].count("|")}
    assert first[0].startswith("| Candidate | Verdict | val_acc | val_loss | Size |")
    cells = (
        "close",
        "0.8800",
        "0.5000",
        "98,496",
        "70,000",
        "0.500",
        "0.750",
        "1.000",
        "1800.0",
        "3.5",
        "856,064",
        "-",
    )
    assert f"| tflite int8 (quantized in training) | {' | '.join(cells)} |" in first
    assert "- tflite int8 (quantized in training) close: 0.25 quantization steps off on average" in text.splitlines()
    assert first[-1].startswith("| coreml int8 (quantized in training) | no file |")


def test_markdown_shows_no_latency_of_a_reference_and_says_why() -> None:
    text = replace(REPORT, rows=(replace(ROWS[3], is_reference=True),)).to_markdown()
    assert "| -\\* |" in text
    assert "says nothing about the target" in text
    assert "says nothing about the target" not in replace(REPORT, rows=(ROWS[0], ROWS[3])).to_markdown()


def test_a_file_that_was_not_run_says_so_in_place_of_numbers() -> None:
    row = Row("executorch", "int8", "trained", size_bytes=100, planned_memory_bytes=64, not_run="there is no | GPU")
    report = replace(REPORT, rows=(*ROWS[:3], row))
    lines = report.to_markdown().splitlines()
    first, second = [line for line in lines if line.startswith("| executorch int8 (quantized in training)")]
    head = next(line for line in lines if line.startswith("| Candidate"))
    assert first.count("|") == head.count("|")
    assert first.split(" | ")[1:4] == ["not run"] * 3  # its verdict and metrics
    assert first.endswith("| 100 | - |" + " not run |" * 6 + " 64 |")
    assert second.startswith("| executorch int8 (quantized in training) |" + " not run |" * 5 + " - |")
    assert "- executorch int8 (quantized in training): there is no | GPU" in lines[lines.index("## Not run here") :]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(report.table())
    assert "executorch int8 (quantized in training) NOT RUN here: there is no | GPU" in captured.get()
    assert report.failures == []


def test_markdown_says_what_failed_and_how_it_was_measured() -> None:
    text = REPORT.to_markdown()
    for part in (
        "coreml int8 (quantized in training): coreml: no such | operation",
        "look here",
        "done so",
        "seed 1",
        "torch 2.13.0",
    ):
        assert part in text
    assert "3 warm-up calls, 20 timed, 1 thread" in text
    assert "agreement over 1,000 samples" in text


def test_markdown_says_what_runs_where_and_which_limit_is_not_kept() -> None:
    text = REPORT.to_markdown()
    assert (
        "| tflite int8 (quantized in training) | 12,000 | 0.00% | 9 x CONV_2D | 1 x SOFTMAX | the runtime |" in text
    ), text
    assert (
        "tflite int8 (quantized in training): size_bytes 98,496 is 496 above 98,000; "
        "not measurable here: peak_memory_bytes" in text
    )


def test_over_budget_are_the_files_to_ship() -> None:
    exceeded = Verdict("exceeded", (Excess("size_bytes", 1, 2),))
    float_file = Row("tflite", "fp32", "float", budget=exceeded)
    assert [row.label for row in REPORT.over_budget] == ["tflite int8 (quantized in training)"]
    assert replace(REPORT, rows=(*ROWS, float_file)).over_budget == [ROWS[3]]
    assert replace(REPORT, rows=(ROWS[0], float_file)).over_budget == [float_file]
    scheme = replace(float_file, scheme="int8_dynamic")
    assert replace(REPORT, rows=(ROWS[0], float_file, scheme)).over_budget == [scheme]
    assert replace(REPORT, rows=(replace(ROWS[3], error="no"),)).over_budget == []
    assert (
        "edge/tflite/within_budget"
        not in replace(REPORT, rows=(replace(ROWS[3], budget=Verdict("not measurable", (), ("load_ms",))),)).metrics()
    )


@pytest.mark.parametrize(
    ("int8", "told"),
    [
        ({}, []),
        ({"p50_ms": 1.09}, []),
        (
            {"p50_ms": 1.2},
            ["tflite int8 (quantized in training) is slower than tflite fp32 on this machine: p50 1.2 ms against 1."],
        ),
        ({"p50_ms": 1.2, "is_reference": True}, []),
        ({"p50_ms": None}, []),
        (
            {"size_bytes": 1000},
            ["tflite int8 (quantized in training) is no smaller than tflite fp32: 1,000 bytes against 1,000."],
        ),
        ({"p50_ms": 1.2, "error": "it was discarded"}, []),
        ({"p50_ms": 1.2, "target": "onnx"}, []),
    ],
)
def test_an_int8_file_that_gains_nothing_is_told(int8: dict[str, Any], told: list[str]) -> None:
    before = Row("tflite", "fp32", "float", size_bytes=1000, p50_ms=1.0)
    torch_row = Row("torch", "int8", "trained", size_bytes=5000, p50_ms=9.0)
    row = replace(Row("tflite", "int8", "trained", size_bytes=300, p50_ms=0.5), **int8)
    found = without_gain([torch_row, before, row])
    assert [line.partition(" Measure")[0] for line in found] == told


def drawn(report: Report, width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(report.table())
    return captured.get().splitlines()


def tables(lines: list[str]) -> int:
    return sum(line.strip().startswith("─") for line in lines)


def test_terminal_tables_fit_80_columns_with_every_metric_and_no_broken_number() -> None:
    lines = drawn(REPORT, 80)
    text = "\n".join(lines)
    for part in ("0.8800", "0.5000", "98,496", "70,000", "no", "99.50%", "0.500", "1.000", "1800", "856,064", "-*"):
        assert part in text.split(), part
    assert "coreml int8 (quantized in training) FAILED: coreml: no such | operation" in lines
    assert "…" not in text
    assert max(map(len, lines)) <= 80
    assert tables(lines) == 2


def test_a_wide_terminal_gets_one_table() -> None:
    assert tables(drawn(REPORT, 220)) == 1


def test_many_metrics_with_long_names_are_all_there() -> None:
    metrics = {f"val_a_metric_with_a_long_name_{index}": index + 0.25 for index in range(9)}
    text = "\n".join(drawn(replace(REPORT, rows=(replace(ROWS[0], metrics=metrics),)), 80))
    assert all(name in text for name in metrics)
    assert all(f"{value:.4f}" in text for value in metrics.values())


def test_text_of_others_is_no_markup() -> None:
    row = replace(ROWS[4], error="[/red] [bold]", metrics={"[/x]": 1.0})
    lines = drawn(replace(REPORT, model="[/blue]", rows=(row,)), 120)
    assert any("[/red] [bold]" in line for line in lines)
    assert any("[/x]" in line for line in lines)
    assert lines[0].startswith("[/blue]")


def test_files_are_written_and_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    names = ["report.json", "report.md", "report.html"]
    assert REPORT.write(tmp_path) == [tmp_path / name for name in names]
    assert json.loads((tmp_path / "report.json").read_text())["model"] == "Digits"
    assert (tmp_path / "report.md").read_text() == REPORT.to_markdown()
    assert (tmp_path / "report.html").read_text() == REPORT.to_html()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_old_report_stays_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_edge.files.os.replace", full)
    with pytest.raises(EdgeError, match=r"cannot write .*report.json: the disk is full.*The old report.json is as"):
        REPORT.write(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.json", "old")]


def test_folder_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeError, match="a part of its path is a file; choose another folder"):
        REPORT.write(tmp_path / "file")


def test_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    assert digest(tmp_path / "a") == hashlib.sha256(b"weights").hexdigest()


def test_digest_of_a_folder_changes_with_contents_and_names(tmp_path: Path) -> None:
    file = tmp_path / "package" / "data" / "weights"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1")
    first = digest(tmp_path / "package")
    file.write_bytes(b"2")
    second = digest(tmp_path / "package")
    file.rename(file.with_name("other"))
    assert len({first, second, digest(tmp_path / "package")}) == 3


def test_versions_name_what_is_installed() -> None:
    assert {"python", "platform", "torch", "lightning"} <= set(installed_versions())


def test_report_needs_no_torch() -> None:
    code = "import sys, lightning_edge.report; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("val_acc", "max"),
        ("valAccuracy", "max"),
        ("val/f1", "max"),
        ("test_auroc/dataloader_idx_0", "max"),
        ("val_loss", "min"),
        ("val_error", "min"),
        ("top1_error", "min"),
        ("MAE", "min"),
        ("val_lossless_quality", None),
        ("epoch", None),
    ],
)
def test_direction_is_told_by_the_name(name: str, mode: str | None) -> None:
    assert direction(name) == mode


def test_metric_that_training_watches_is_chosen_first() -> None:
    names = ["val_loss", "val_acc"]
    assert choose(names) == Monitor("val_acc", "max")
    assert choose(names, [Monitor("train_loss", "min"), Monitor("val_loss", "min")]) == Monitor("val_loss", "min")
    assert choose(["quality"], []) is None


def test_worse_follows_the_mode() -> None:
    assert Monitor("a", "max").worse(0.8, than=0.9)
    assert not Monitor("a", "max").worse(0.9, than=0.9)
    assert Monitor("a", "min").worse(0.9, than=0.8)
    assert Monitor("a", "min").worse(math.nan, than=0.8)
    assert not Monitor("a", "min").worse(0.8, than=math.nan)


def test_mode_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="mode='up'"):
        Monitor("a", "up")  # type: ignore[arg-type]
