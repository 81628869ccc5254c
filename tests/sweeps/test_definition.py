"""Sweep files: what they say, and every mistake as one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from sweep_files import CONFIG, GRID, FixedChecker, sweep_of

from lightning_edge.errors import SweepError
from lightning_edge.sweeps.base import Base, in_folder
from lightning_edge.sweeps.definition import bind, parse_definition, read_definition
from lightning_edge.sweeps.space import Choices, Range


def changed(old: str, new: str) -> str:
    assert old in GRID
    return GRID.replace(old, new)


MISTAKES = {
    "no mapping": ("- a\n- b\n", "allowed: a YAML file with the keys base, space"),
    "empty": ("", "it is empty; allowed: a YAML file"),
    "no YAML": ("base: [", "line 1, column 8: expected the node content"),
    "a tab": ("base: a\n\tspace: b", "cannot start any token"),
    "duplicate key": (GRID + "base: other.yaml\n", "line 8, column 1: 'base' is given twice"),
    "duplicate key inside": (changed("val_acc: max", "val_acc: max, val_acc: min"), "'val_acc' is given twice"),
    "a Python object": (changed("[4, 8]", "!!python/object/apply:os.getcwd []"), "names no plain value"),
    "unknown top-level key": (GRID + "trails: 3\n", "trails: there is no such key .* Did you mean trials"),
    "no base": (changed("base: base.yaml", ""), "base: it is missing; a sweep file needs base, space, objectives"),
    "base of another type": (changed("base.yaml", "[1]"), r"base: given \[1\]; allowed: recipe:<name>"),
    "empty space": ("base: b\nspace: {}\nobjectives: {tflite.size_bytes: min}", "space: it is empty"),
    "space of another type": (
        "base: b\nspace: 3\nobjectives: {tflite.size_bytes: min}",
        "space: given 3; allowed: settings",
    ),
    "empty list": (changed("[4, 8]", "[]"), "space: model.init_args.width: the list is empty"),
    "a value twice": (changed("[4, 8]", "[4, 4.0]"), "space: model.init_args.width: 4.0 is there twice"),
    "a date": (changed("[4, 8]", "[2026-01-01]"), "width: given '2026-01-01'; allowed: int"),
    "a value in the place of a list": (changed("[4, 8]", "4"), "given 4; allowed: a list of values, or {low"),
    "low above high": (changed("[4, 8]", "{low: 8, high: 4}"), "low=8 is not below high=4; give them in order"),
    "low as high": (changed("[4, 8]", "{low: 8, high: 8}"), "low=8 is not below high=8"),
    "no high": (changed("[4, 8]", "{low: 8}"), "width: high is missing"),
    "log of zero": (changed("[4, 8]", "{low: 0, high: 4, log: true}"), "low=0 has no logarithm"),
    "log of another type": (
        changed("[4, 8]", "{low: 1, high: 4, log: 3}"),
        "width.log: given 3; allowed: true or false",
    ),
    "low of another type": (changed("[4, 8]", "{low: small, high: 4}"), "width.low: given 'small'; allowed: a number"),
    "an infinite high": (changed("[4, 8]", "{low: 1, high: .inf}"), "width.high: given inf; allowed: a number"),
    "a step with log": (changed("[4, 8]", "{low: 1, high: 4, log: true, step: 1}"), "not together with log"),
    "unknown key of a range": (changed("[4, 8]", "{low: 1, hihg: 4}"), "width.hihg: there is no such key here"),
    "no objectives": (
        changed("{val_acc: max, tflite.size_bytes: min}", "{}"),
        "objectives: given {}; allowed: figures",
    ),
    "a direction": (changed("val_acc: max", "val_acc: up"), "objectives: val_acc: given 'up'; allowed: max, min"),
    "a limit": (changed("3.5", "small"), "constraints: tflite.p95_ms: given 'small'; allowed: a number"),
    "trials 0": (GRID + "trials: 0\n", "trials: given 0; allowed: a whole number from 1 on"),
    "trials negative": (GRID + "trials: -3\n", "trials: given -3"),
    "trials of another type": (GRID + "trials: many\n", "trials: given 'many'"),
    "seeds": (GRID + "seeds: 1.5\n", "seeds: given 1.5; allowed: a whole number from 1 on"),
    "sampler": (GRID + "sampler: best\n", "sampler: given 'best'; allowed: grid, random, tpe, gp, nsga2"),
    "a grid that is larger": (GRID + "sampler: grid\ntrials: 4\n", "the grid has 6 settings, and trials: 4"),
    "a grid of a range": (changed("[4, 8]", "{low: 1, high: 2}") + "sampler: grid\n", "a grid needs a list of values"),
    # What only the base tells.
    "phase not in the base": (
        changed("prune.macs", "sparsify.sparsity"),
        r"base.yaml has no Sparsify phase, which the space varies. Add it to the phases of its EdgeCompressionCallback:"
        r"\n    phases:\n      - class_path: lightning_edge.Sparsify\n        init_args: {sparsity: 0.5}",
    ),
    "phase misspelled": (changed("prune.macs", "prun.macs"), "Did you mean prune"),
    "phase without argument": (changed("prune.macs", "prune"), "name the argument too, such as prune.start"),
    "a number in the place of a key": (changed("prune.macs", "3"), "given the key 3; allowed: the name of a setting"),
    "the same key twice": (
        changed("model.init_args.width", "trainer.callbacks.0.init_args.phases.0.init_args.macs"),
        "set the same key; give one of them",
    ),
    "a key within a key": (
        changed("model.init_args.width: [4, 8]", "model: [{}]\n  model.init_args.width: [4]"),
        "same key",
    ),
    "what the sweep sets": (
        changed("prune.macs", "trainer.default_root_dir"),
        "a sweep sets the folder of a trial itself",
    ),
    "seed and seeds": (
        changed("prune.macs", "seed_everything") + "seeds: 2",
        "a sweep sets the seeds of a trial itself",
    ),
    "a place beyond the list": (
        changed("prune.macs", "trainer.callbacks.9.init_args.x"),
        "there is no 9 at that place",
    ),
    "a value of another type": (
        changed("[4, 8]", "[4, wide]"),
        "width: 'wide' is not allowed: .*given 'wide'; allowed: int",
    ),
    "a target the base does not export": (
        changed("tflite.size", "coreml.size"),
        "no target 'coreml'; it exports to tflite, exec",
    ),
    "an unknown target": (changed("tflite.size_bytes: min", "tflit.size_bytes: min"), "no target 'tflit'"),
    "a number no report has": (changed("tflite.size_bytes: min", "tflite.sha256: min"), "no report has that number"),
    "a number misspelled": (
        changed("tflite.size_bytes: min", "tflite.size_byte: min"),
        "Did you mean tflite.size_bytes",
    ),
    "a metric of no target": (
        changed(", tflite.size_bytes: min", ""),
        "of which target.*Write, for example, tflite.val_acc",
    ),
    "a metric of two targets": (
        changed("tflite.size_bytes: min", "tflite.p50_ms: min, executorch.p50_ms: min"),
        "of which target",
    ),
    "a figure twice": (
        changed("val_acc: max", "size_bytes: min"),
        "size_bytes and tflite.size_bytes are the same figure",
    ),
}


@pytest.mark.parametrize(("text", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_clear_error(text: str, told: str) -> None:
    with pytest.raises(SweepError, match=f"(?s){told}"):
        sweep_of(text)


def test_a_base_without_callback_is_told_the_lines_to_add() -> None:
    bare = {
        **CONFIG,
        "trainer": {"callbacks": [c for c in CONFIG["trainer"]["callbacks"] if "Compression" not in str(c)]},
    }
    with pytest.raises(SweepError) as told:
        Base("base.yaml", bare).place("prune.params")
    said = str(told.value)
    assert "base.yaml has no Prune phase, which the space varies. Add to the callbacks of its trainer:" in said
    (added,) = yaml.safe_load(said.partition("trainer:\n")[2])
    assert added["class_path"] == "lightning_edge.EdgeCompressionCallback"
    assert added["init_args"]["phases"] == [{"class_path": "lightning_edge.Prune", "init_args": {"params": 0.5}}]


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="there is no file"):
        read_definition(tmp_path / "none.yaml")
    with pytest.raises(SweepError, match="is a folder and not a file"):
        read_definition(tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8")
    with pytest.raises(SweepError, match="is no text in UTF-8"):
        read_definition(tmp_path / "image.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(SweepError, match="1,000,001 bytes"):
        read_definition(tmp_path / "large.yaml")


def test_a_base_without_evaluation_is_refused() -> None:
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": CONFIG["trainer"]["callbacks"][:1]}}
    with pytest.raises(SweepError, match="has no DeviceEvaluationCallback; a sweep compares"):
        bind(parse_definition(GRID, Path("study.yaml")), FixedChecker(config))


def test_a_base_may_be_several_configurations(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").touch()
    text = GRID.replace("base: base.yaml", "base: [task.yaml, 'recipe:compression/int8']")
    definition = parse_definition(text, tmp_path / "study.yaml")
    assert definition.configs == (str(tmp_path / "task.yaml"), "recipe:compression/int8")
    for wrong in ("[]", "[1]", "{a: b}"):
        with pytest.raises(SweepError, match=r"base: given .* or a list of them"):
            parse_definition(GRID.replace("base: base.yaml", f"base: {wrong}"), tmp_path / "study.yaml")


def test_metrics_that_the_base_lists_are_all_there_are() -> None:
    checker = FixedChecker()
    checker.config["trainer"]["callbacks"][1]["init_args"]["metrics"] = {"accuracy": {"class_path": "x.Accuracy"}}
    with pytest.raises(SweepError, match=r"no report has that number.*Allowed: .*accuracy"):
        bind(parse_definition(GRID, Path("study.yaml")), checker)
    definition = parse_definition(GRID.replace("val_acc", "accuracy"), Path("study.yaml"))
    assert bind(definition, checker).objectives[0].figure.field == "accuracy"


def test_a_base_beside_the_file_comes_first(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("")
    assert parse_definition(GRID, tmp_path / "study.yaml").base == str(tmp_path / "base.yaml")
    assert parse_definition(GRID, Path("elsewhere/study.yaml")).base == "base.yaml"
    assert parse_definition(GRID.replace("base.yaml", "recipe:a"), tmp_path / "study.yaml").base == "recipe:a"


@pytest.mark.parametrize(("given", "chosen"), [("", "grid"), ("trials: 6", "grid"), ("trials: 5", "tpe")])
def test_a_grid_is_the_default_where_it_fits(given: str, chosen: str) -> None:
    assert parse_definition(f"{GRID}\n{given}", Path("study.yaml")).sampler == chosen


def test_numbers_are_numbers_and_ranges_keep_their_type() -> None:
    text = GRID.replace("[4, 8]", "{low: 1e-4, high: 1e-2, log: true}").replace(
        "[1.0, 0.75, 0.5]", "{choices: [1e-3, on, null]}"
    )
    definition = parse_definition(text, Path("study.yaml"))
    assert definition.space["model.init_args.width"] == Range(0.0001, 0.01, log=True)
    assert definition.space["prune.macs"] == Choices((0.001, True, None))
    assert definition.sampler == "tpe"
    assert definition.trials == 24
    assert Range(1, 9).whole
    assert not Range(1, 9, step=0.5).whole


def test_names_of_budgets_and_loggers_are_known() -> None:
    sweep = sweep_of(GRID.replace("tflite.p95_ms", "tflite.latency_p95_ms"))
    assert [(figure.name, figure.target, figure.field) for figure in sweep.figures] == [
        ("val_acc", "tflite", "val_acc"),
        ("tflite.size_bytes", "tflite", "size_bytes"),
        ("tflite.latency_p95_ms", "tflite", "p95_ms"),
    ]


def phases(config: dict[str, Any]) -> list[str]:
    return [phase["class_path"] for phase in config["trainer"]["callbacks"][0]["init_args"]["phases"]]


def test_settings_go_where_they_belong() -> None:
    base = Base("base.yaml", CONFIG)
    before = str(CONFIG)
    config = base.configuration({"prune.macs": 0.75, "quantize.precisions": {"*": "int8"}, "model.init_args.width": 4})
    listed = config["trainer"]["callbacks"][0]["init_args"]["phases"]
    assert [phase["init_args"] for phase in listed] == [
        {"macs": 0.75, "start": 0.1},
        {"start": 0.5, "precisions": {"*": "int8"}},
    ]
    assert config["model"]["init_args"] == {"learning_rate": 0.01, "width": 4}
    assert base.configuration({"data.init_args.size": 3})["data"] == {"init_args": {"size": 3}}
    assert str(CONFIG) == before


@pytest.mark.parametrize(("key", "off"), [("macs", 1.0), ("macs", 1), ("params", 1.0), ("size", 1.0)])
def test_a_value_that_keeps_everything_leaves_the_phase_out(key: str, off: float) -> None:
    base = Base("base.yaml", CONFIG)
    assert phases(base.configuration({f"prune.{key}": off, "prune.start": 0.3})) == ["lightning_edge.Quantize"]
    assert len(phases(base.configuration({"prune.start": 1.0}))) == 2


def test_a_callback_without_phases_is_left_out() -> None:
    checker = FixedChecker()
    del checker.config["trainer"]["callbacks"][0]["init_args"]["phases"][1]
    callbacks = Base("base.yaml", checker.config).configuration({"prune.macs": 1.0})["trainer"]["callbacks"]
    assert [callback["class_path"].rpartition(".")[2] for callback in callbacks] == [
        "DeviceEvaluationCallback",
        "ModelCheckpoint",
    ]


def test_everything_is_written_into_the_folder_of_the_trial() -> None:
    config = {
        **CONFIG,
        "trainer": {**CONFIG["trainer"], "logger": [{"class_path": "a.CSVLogger", "init_args": {"save_dir": "/logs"}}]},
    }
    placed = in_folder(config, Path("/sweep/trial-0001"), 7)
    assert placed["trainer"]["default_root_dir"] == "/sweep/trial-0001"
    assert placed["trainer"]["callbacks"][1]["init_args"]["dirpath"] == "/sweep/trial-0001/artifacts"
    assert placed["trainer"]["callbacks"][2]["init_args"]["dirpath"] == "/sweep/trial-0001/checkpoints"
    assert placed["trainer"]["logger"][0]["init_args"]["save_dir"] == "/sweep/trial-0001/logs"
    assert placed["seed_everything"] == 7
    assert in_folder(config, Path("x"))["seed_everything"] == 5
    assert config["trainer"]["default_root_dir"] is None
