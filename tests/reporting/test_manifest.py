"""The manifest, read back strictly, and folders held against it: whole, tampered with, swapped, incomplete."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from deployables import batches, network

from lightning_edge.cli import verify as verify_command
from lightning_edge.contents import Endpoint, Placement, Placements
from lightning_edge.errors import EdgeError, ManifestError
from lightning_edge.exporters import export, target
from lightning_edge.interface import Interface, Pixels
from lightning_edge.reporting import verification
from lightning_edge.reporting.budget import Excess, Verdict
from lightning_edge.reporting.devices import About, DeviceRow
from lightning_edge.reporting.manifest import NAME, SCHEMA, FileEntry, Manifest, check_path
from lightning_edge.reporting.provenance import Commit, commit_of
from lightning_edge.reporting.report import Report, Row
from lightning_edge.reporting.rows import of_artifact, write_manifest
from lightning_edge.reporting.verification import unlisted, verify

SMALL = "difference"

INTERFACE = Interface(inputs=("image",), layout="nhwc", pixels=Pixels((0.5,), (0.25,)), labels=("a", "b"))

ROW = Row(
    "tflite",
    "int8",
    "trained",
    path="model-int8.tflite",
    sha256="0" * 64,
    metrics={"val_acc": 0.9, "val_loss": math.nan},
    size_bytes=100,
    compressed_bytes=80,
    load_ms=3.5,
    p95_ms=0.75,
    samples=10,
    top1=1.0,
    max_steps=math.inf,
    inputs=(Endpoint("args_0", (1, 640), "int8", 0.1, -128),),
    outputs=(Endpoint(None, (1, 4), "float32"),),
    sample=(Endpoint(None, (1, 640), "float32"),),
    placements=Placements("the runtime", (Placement("FULLY_CONNECTED", "delegate", 1, 2560),)),
    budget=Verdict("exceeded", (Excess("size_bytes", 50, 100),), ("peak_memory_bytes",)),
    interface=INTERFACE,
    runtime="LiteRT",
)
ON_DEVICE = DeviceRow(
    "pi4",
    "tflite",
    "int8",
    "trained",
    path="model-int8.tflite",
    about=About("aarch64"),
    runtime="LiteRT",
    metrics={"val_acc": 0.875},
    change_to_host={"val_acc": -0.025},
    p50_ms=0.75,
    verdict="close",
)
MANIFEST = Manifest.of(
    Report(
        "Net",
        "validate",
        [ROW, Row("torch", "fp32", "float"), replace(ROW, path=None, error="no")],
        devices=[ON_DEVICE, replace(ON_DEVICE, device="off", path="model-fp32.tflite")],
    ),
    Commit("c" * 40, True),
    "model: Net\n",
)

DEVICE = MANIFEST.files[0].devices[0]


def changed(**changes: Any) -> dict[str, Any]:
    return {**json.loads(MANIFEST.to_json()), **changes}


def entry(**changes: Any) -> dict[str, Any]:
    plain = json.loads(MANIFEST.to_json())
    return {**plain, "files": [{**plain["files"][0], **changes}]}


# The form


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = MANIFEST.write(tmp_path / "new")
    assert path.name == NAME
    back = Manifest.read(path)
    assert back == Manifest.read(tmp_path / "new")
    (file,) = back.files  # of finished files only
    assert file == replace(
        MANIFEST.files[0],
        metrics={"val_acc": 0.9, "val_loss": None},
        agreement={"samples": 10, "top1": 1.0, "max_steps": None},
    )
    (device,) = file.devices  # of this file only
    assert (device.device, device.about, device.runtime, device.verdict) == ("pi4", "aarch64", "LiteRT", "close")
    assert device.figures == {"latency_p50_ms": 0.75, "val_acc": 0.875, "val_acc_change_to_host": -0.025}
    assert back.git == Commit("c" * 40, True)
    assert back.recipe == "model: Net\n"
    assert [entry.name for entry in path.parent.iterdir()] == [NAME]


def test_the_speed_of_a_reference_interpreter_is_left_out() -> None:
    assert FileEntry.of(replace(ROW, is_reference=True)).latency == {}


def test_a_row_without_a_file_has_no_entry() -> None:
    with pytest.raises(ValueError, match=r"torch fp32 is no finished file"):
        FileEntry.of(Row("torch", "fp32", "float"))


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ([], "it is \\[\\] and not an object"),
        (changed(schema=SCHEMA + 1), f"its schema is {SCHEMA + 1} and this version reads {SCHEMA}: a newer lightning"),
        (changed(schema=0), "its schema is 0 .* there is none such"),
        (changed(schema="1"), "its schema is '1' and not a number"),
        (changed(more=1), "it has 'more', which a manifest of this schema has not"),
        ({"schema": SCHEMA, "model": "Net"}, "it lacks 'files', 'versions', 'git', 'recipe'"),
        (changed(files={}), "files is {} and not a list"),
        (changed(git={"commit": "c"}), "git lacks 'dirty'"),
        (changed(git={"commit": "c", "dirty": 1}), "git.dirty is 1 and not true or false"),
        (changed(versions={"torch": 2}), "versions.torch is 2 and not a text"),
        (entry(interface={}), r"files\[0\].interface lacks 'inputs', 'outputs', 'layout', 'pixels'"),
        (
            entry(interface={**asdict(INTERFACE), "inputs": 1}),
            r"Interface\(inputs=1\): give a list",
        ),
        (entry(size_bytes=-1), r"files\[0\].size_bytes is -1 and not a whole number of 0 or more"),
        (entry(size_bytes=True), r"files\[0\].size_bytes is True"),
        (entry(sha256="00"), r"files\[0\].sha256 is '00' and not 64 hexadecimal digits"),
        (entry(precision="int4"), r"precision is 'int4' and not 'fp32' or 'int8'"),
        (entry(inputs=[{"name": None}]), r"files\[0\].inputs\[0\] lacks 'shape'"),
        (entry(metrics={"val_acc": "0.9"}), r"files\[0\].metrics.val_acc is '0.9' and not a finite number"),
        (entry(path="../model.tflite"), "leaves the folder"),
        (entry(devices=[{"device": "pi4"}]), r"files\[0\].devices\[0\] lacks 'about', 'runtime', 'verdict', 'error'"),
        (entry(devices=[{**asdict(DEVICE), "figures": {"x": "1"}}]), r"devices\[0\].figures.x is '1' and not a finite"),
        (entry(not_run=True), r"files\[0\].not_run is True and not a text"),
        (changed(files=entry()["files"] * 2), "'model-int8.tflite' is named twice"),
    ],
)
def test_what_is_no_manifest_is_refused_with_its_place(tmp_path: Path, plain: Any, message: str) -> None:
    (tmp_path / NAME).write_text(json.dumps(plain))
    with pytest.raises(ManifestError, match=message):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MANIFEST.to_json()[:-100], "no manifest that can be used"),
        ("", "no manifest that can be used"),
        ('{"schema": NaN}', "NaN is no number that JSON has"),
        ('{"schema": 1, "schema": 1}', "'schema' is given twice"),
        (MANIFEST.to_json().replace('"scale": 0.1', '"scale": 1e999'), "scale is inf and not a finite number"),
        ("[" * 100_000, "no manifest"),
    ],
)
def test_a_text_that_is_cut_or_no_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ManifestError, match=message):
        Manifest.read(tmp_path)


def test_a_folder_without_a_manifest_says_who_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"there is no .*Give a folder that lightning-edge export or evaluate"):
        Manifest.read(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match="cannot be read"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("path", ["", "/etc/passwd", "..", "a/../../b", "a//b", "./a", "a\\b", "C:a", "a\0b"])
def test_a_path_stays_in_its_folder(path: str) -> None:
    with pytest.raises(ValueError, match="leaves the folder or is not plain"):
        check_path(path)


def test_nothing_is_left_where_a_manifest_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeError, match="cannot write"):
        MANIFEST.write(tmp_path / "file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


# The commit


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_folder_and_tells_of_changes(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert commit_of(tmp_path) is None  # no commit yet
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    (tmp_path / "model.tflite").write_text("not tracked")
    assert commit_of(tmp_path) == Commit(git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "code.py").write_text("2")
    assert commit_of(tmp_path) == Commit(git(tmp_path, "rev-parse", "HEAD"), True)


def test_there_is_no_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(tmp_path) is None


# Folders


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of one small network, of every target, and their manifest."""
    for module in ("litert_torch", "executorch", "coremltools"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("made")
    rows = []
    for name, precision in (("tflite", "int8"), ("tflite", "fp32"), ("executorch", "int8"), ("coreml", "int8")):
        finished = network(SMALL, precision)  # type: ignore[arg-type]
        path = folder / f"model-{precision}{target(name).suffix}"
        rows.append(of_artifact(export(finished, name, path, batches=batches(SMALL))))
    write_manifest(Report("Difference", "validate", rows), folder, None)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it to do harm to."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def entry_of(folder: Path, name: str) -> FileEntry:
    return next(file for file in Manifest.read(folder).files if file.path == name)


def rewrite(folder: Path, name: str, **changes: Any) -> None:
    manifest = Manifest.read(folder)
    files = tuple(replace(file, **changes) if file.path == name else file for file in manifest.files)
    replace(manifest, files=files).write(folder)


def test_a_folder_as_it_was_made_has_no_findings(made: Path) -> None:
    assert verify(made) == []
    assert unlisted(made) == []


def test_the_manifest_tells_inputs_and_outputs_as_each_file_has_them(made: Path) -> None:
    tflite = entry_of(made, "model-int8.tflite")
    assert [(end.name, end.shape, end.dtype) for end in tflite.inputs] == [
        ("ape", (1, 6), "int8"),
        ("zebra", (1, 6), "int8"),
    ]
    assert all(end.scale and end.zero_point is not None for end in (*tflite.inputs, *tflite.outputs))
    assert [end.dtype for end in tflite.sample] == ["float32", "float32"]
    package = entry_of(made, "model-int8.mlpackage")
    assert [end.name for end in package.inputs] == ["ape", "zebra"]
    assert {end.name for end in package.outputs} == {"whole", "first"}
    program = entry_of(made, "model-int8.pte")
    assert [(end.name, end.shape, end.dtype) for end in program.inputs] == [
        ("ape", (1, 6), "float32"),
        ("zebra", (1, 6), "float32"),
    ]
    for file in (tflite, package, program):
        assert file.agreement["samples"] == 16
        assert file.placements is not None
        assert file.placements.macs == 2 * 6 * 4


@pytest.mark.parametrize("value", [70, None])
def test_a_manifest_of_an_earlier_version_with_the_field_floor_bytes_is_read(value: int | None, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(entry(floor_bytes=value)))
    path_now = tmp_path / "now.json"
    path_now.write_text(MANIFEST.to_json())
    assert Manifest.read(path) == Manifest.read(path_now)


def test_a_tampered_byte_is_found_and_the_file_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} was run")

    monkeypatch.setattr(verification.exporters, "load", refuse)
    rest = [file for file in Manifest.read(folder).files if file.path == "model-int8.tflite"]
    replace(Manifest.read(folder), files=tuple(rest)).write(folder)
    path = folder / "model-int8.tflite"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    findings = verify(folder)
    assert findings[0].check == "digest"
    assert findings[0].expected == rest[0].sha256
    assert findings[0].found in str(findings[0])
    assert "Export it again" in findings[0].advice


def test_a_file_that_is_missing_or_cut_is_named(folder: Path) -> None:
    (folder / "model-int8.pte").unlink()
    path = folder / "model-int8.tflite"
    path.write_bytes(path.read_bytes()[:100])
    findings = {(finding.path, finding.check) for finding in verify(folder)}
    assert findings == {
        ("model-int8.pte", "exists"),
        ("model-int8.tflite", "digest"),
        ("model-int8.tflite", "bytes"),
        ("model-int8.tflite", "contents"),
    }


def test_swapped_files_are_told_apart(folder: Path) -> None:
    one, two = folder / "model-int8.tflite", folder / "model-fp32.tflite"
    one.rename(folder / "other")
    two.rename(one)
    (folder / "other").rename(two)
    findings = [finding for finding in verify(folder) if finding.path == one.name]
    assert "that of model-fp32.tflite: the files were swapped" in findings[0].found
    assert any(finding.expected == "precision int8" and finding.found == "fp32" for finding in findings)
    assert any(finding.expected.startswith("inputs ape [1, 6] int8 (scale ") for finding in findings)


def test_a_byte_in_a_package_is_found(folder: Path) -> None:
    weights = folder / "model-int8.mlpackage" / "Data" / "com.apple.CoreML" / "model.mlmodel"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert {"digest", "bytes"} <= {finding.check for finding in verify(folder)}


def test_a_manifest_that_was_changed_does_not_fit_its_files(folder: Path) -> None:
    name = "model-int8.tflite"
    stated = entry_of(folder, name)
    rewrite(folder, name, inputs=(replace(stated.inputs[0], scale=1.0), stated.inputs[1]), size_bytes=1)
    assert [finding.check for finding in verify(folder)] == ["bytes", "contents"]
    rewrite(folder, name, inputs=stated.inputs, size_bytes=stated.size_bytes, sample=stated.sample[:1])
    (finding,) = verify(folder)
    assert finding.check == "runs"
    assert finding.expected == "to be called with [1, 6] float32"


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    path = folder / "model-int8.tflite"
    path.rename(tmp_path / "outside.tflite")
    path.symlink_to(tmp_path / "outside.tflite")
    (finding,) = verify(folder)
    assert finding.check == "exists"
    assert "a link to" in finding.found


def test_a_file_that_gives_no_numbers_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(folder, "model-int8.pte", outputs=())
    monkeypatch.setattr(verification, "_contents", lambda path, entry: iter(()))
    (finding,) = verify(folder)
    assert finding.expected == "outputs of shape []"


def test_files_beside_those_of_the_manifest_are_named(folder: Path) -> None:
    shutil.copy(folder / "model-int8.pte", folder / "other.pte")
    assert unlisted(folder) == ["other.pte"]


def test_command_draws_a_table_and_exits_by_what_it_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_command.main([str(folder)]) == 0
    assert "model-int8.mlpackage" in capsys.readouterr().out
    (folder / "model-int8.pte").write_bytes(b"no program")
    shutil.copy(folder / "model-int8.tflite", folder / "other.tflite")
    assert verify_command.main([str(folder)]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "not in the manifest, and not looked at: other.tflite" in printed.out
    assert "model-int8.pte: digest: expected " in printed.err
    (folder / NAME).write_text("{")
    assert verify_command.main([str(folder)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "name", ["tflite", *(pytest.param(name, marks=pytest.mark.slow) for name in ("executorch", "coreml"))]
)
def test_the_same_network_gives_the_same_bytes(made: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"model-int8{target(name).suffix}"
    again = of_artifact(export(network(SMALL, "int8"), name, path, batches=batches(SMALL)))
    assert again.sha256 == entry_of(made, path.name).sha256
