"""Folders of unknown origin: `verify` reads nothing outside, hangs on nothing, and ends in one line."""

from __future__ import annotations

import json
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest
from test_manifest import MANIFEST, changed, entry

from lightning_edge.cli import verify as verify_command
from lightning_edge.errors import ManifestError
from lightning_edge.exporters.artifact import MOST_PACKAGE_BYTES
from lightning_edge.reporting import verification
from lightning_edge.reporting.manifest import MOST_BYTES, NAME, Manifest
from lightning_edge.reporting.verification import UNCHECKED, not_run, unlisted, verify


def state(folder: Path, **changes: Any) -> Path:
    (folder / NAME).write_text(json.dumps(entry(**changes)))
    return folder / str(changes.get("path", "model-int8.tflite"))


ENDPOINT = {"name": "a", "shape": [], "dtype": "int8", "scale": 1, "zero_point": 0}


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (entry(size_bytes=10**400), r"size_bytes is 1000\d+\.\.\. and not a whole number"),
        (entry(metrics={"val_acc": 10**400}), r"metrics.val_acc is 1000\d+\.\.\. and not a finite number"),
        (
            entry(sample=[{"name": None, "shape": [2**63], "dtype": "float32", "scale": None, "zero_point": None}]),
            "shape",
        ),
        (
            entry(inputs=[{"name": "a", "shape": [], "dtype": "int8", "scale": 1, "zero_point": -(10**30)}]),
            "zero_point",
        ),
        (changed(schema=10**400), r"its schema is 1000\d+\.\.\. and this version reads"),
        (entry(path="a" * 300), "longer than a path is: 255 bytes for a name"),
        (entry(path="ä" * 130), "longer than a path is"),
        (entry(path="/".join(["a"] * 600)), "1024 characters in all"),
        (entry(path="\ud800.tflite"), r"'\\ud800' in it is half a character"),
        (changed(model="\udcff"), "half a character"),
        (changed(**{"\x1b[31m": 1}), r"it has '\\x1b\[31m', which"),
        (changed(**{name * 20: 1 for name in "abcdefghijklmnopqrstuvwxyz"}), r"\.\.\.\. Export again"),
        (entry(interface={**entry()["files"][0]["interface"], "pixels": {"mean": [10**400]}}), "too large"),
    ],
)
def test_a_hostile_manifest_ends_in_one_short_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: Any, message: str
) -> None:
    (tmp_path / NAME).write_text(json.dumps(plain))
    with pytest.raises(ManifestError, match=message):
        Manifest.read(tmp_path)
    assert verify_command.main([str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert told.removesuffix("\n").isprintable()
    assert len(told) < 1000


def test_numbers_of_thousands_of_digits_are_refused(tmp_path: Path) -> None:
    text = MANIFEST.to_json().replace('"size_bytes": 100', f'"size_bytes": {"9" * 10_000}')
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ManifestError, match="no manifest that can be used"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "sparse", "folder", "outside"])
def test_a_manifest_is_a_file_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    path = folder / NAME
    monkeypatch.chdir(folder)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(NAME)
    elif kind == "sparse":
        with path.open("wb") as stream:
            stream.truncate(MOST_BYTES + 1)
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "other.json").write_text(MANIFEST.to_json())
        path.symlink_to(tmp_path / "other.json")
    assert verify_command.main([str(folder)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_what_is_no_file_is_a_finding_and_hangs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = state(tmp_path)
    os.mkfifo(path)
    (finding,) = verify(tmp_path)
    assert (finding.check, finding.found) == ("exists", "a named pipe")
    assert not_run(tmp_path) == {}
    path.unlink()
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    (finding,) = verify(tmp_path)
    assert finding.found == "a socket"
    path.unlink()
    with path.open("wb") as stream:
        stream.truncate(2**31)
    (finding,) = verify(tmp_path)
    assert "2,147,483,648 bytes or more" in finding.found
    path.unlink()
    path.symlink_to(path.name)  # a link to itself
    (finding,) = verify(tmp_path)
    assert finding.check == "exists"


def test_a_file_that_is_larger_than_stated_is_not_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state(tmp_path).write_bytes(bytes(101))
    monkeypatch.setattr(verification, "digest", lambda path: pytest.fail("it was hashed"))
    checks = {finding.check: finding.found for finding in verify(tmp_path)}
    assert checks["digest"] == "another one, since it is larger than any file of the manifest"
    assert checks["bytes"] == "101"


@pytest.mark.parametrize("place", ["Manifest.json", "Data/com.apple.CoreML/weights", "Data/link"])
def test_no_member_of_a_package_leads_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    folder, outside = tmp_path / "f", tmp_path / "outside"
    (folder / "m.mlpackage" / "Data" / "com.apple.CoreML").mkdir(parents=True)
    outside.mkdir()
    (folder / "m.mlpackage" / place).symlink_to(outside if "Manifest" not in place else "/etc/hostname")
    state(folder, path="m.mlpackage", target="coreml")
    for name in ("digest", "size_bytes"):
        monkeypatch.setattr(verification, name, lambda path: pytest.fail("it was read"))
    monkeypatch.setattr(verification.exporters, "contents_of", lambda path: pytest.fail("it was read"))
    (finding,) = verify(folder)
    assert finding.found == f"the link {place} in it"
    assert not_run(folder) == {}


def test_a_file_below_a_link_to_another_folder_is_outside(tmp_path: Path) -> None:
    folder, outside = tmp_path / "f", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "m.tflite").write_bytes(b"")
    (folder / "sub").symlink_to(outside)
    state(folder, path="sub/m.tflite")
    (finding,) = verify(folder)
    assert finding.found == f"a link to {outside / 'm.tflite'}"
    assert not_run(folder) == {}


def test_a_package_has_a_size_that_devices_have_room_for(tmp_path: Path) -> None:
    (tmp_path / "m.mlpackage").mkdir()
    with (tmp_path / "m.mlpackage" / "weight.bin").open("wb") as stream:
        stream.truncate(MOST_PACKAGE_BYTES + 1)
    state(tmp_path, path="m.mlpackage", target="coreml", size_bytes=MOST_PACKAGE_BYTES + 1)
    (finding,) = verify(tmp_path)
    assert finding.check == "exists"
    assert "bytes or more" in finding.found


@pytest.mark.parametrize(
    ("target", "expected", "found"),
    [("executorch", "a .pte file, as executorch has", ".tflite"), ("tvm", "one of executorch, ", "the target 'tvm'")],
)
def test_the_target_fits_the_suffix(tmp_path: Path, target: str, expected: str, found: str) -> None:
    state(tmp_path, target=target).write_bytes(b"")
    (finding,) = verify(tmp_path)
    assert finding.check == "contents"
    assert finding.expected.startswith(expected)
    assert finding.found == found


def test_names_are_shown_and_not_acted_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "[").mkdir()
    state(tmp_path, path="[/red][bold]\x1b[31m\n\u202e.tflite").write_bytes(b"")
    (tmp_path / "\x07.pte").write_bytes(b"")
    assert verify_command.main([str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert r"[/red][bold]\x1b[31m\n\u202e.tflite" in printed.out
    assert r"not looked at: \x07.pte" in printed.out
    lines = printed.err.splitlines()
    assert all(line.isprintable() and line.startswith(r"[/red][bold]\x1b[31m\n\u202e.tflite: ") for line in lines)
    assert f"stated in the manifest, and not checked: {', '.join(UNCHECKED)}" in printed.out.replace("\n", " ")


def test_every_statement_is_checked_or_said_not_to_be() -> None:
    plain = json.loads(MANIFEST.to_json())
    checked = {
        "path",
        "target",
        "precision",
        "scheme",
        "sha256",
        "size_bytes",
        "inputs",
        "outputs",
        "sample",
        "interface",
    }
    assert {*plain["files"][0], *plain} - {"files", "schema"} == checked | {*UNCHECKED}


def test_a_sample_that_fills_the_memory_is_not_made(tmp_path: Path) -> None:
    (sample,) = MANIFEST.files[0].sample
    with pytest.raises(ValueError, match="has more than 268,435,456 numbers"):
        verification._sample(type(sample)(None, (2**20, 2**20), "float32"), MANIFEST.files[0].interface)


def values_of(plain: Any) -> list[tuple[Any, Any]]:
    """Every place in a manifest: its container and its key."""
    pairs = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    return [place for key, value in list(pairs) for place in ((plain, key), *values_of(value))]


def test_any_value_in_any_place_is_refused_in_one_line_or_taken(tmp_path: Path) -> None:
    strange = [None, True, -1, 2**64, 1e308, -0.5, "", "\x1b]0;a\x07", "[/red]", [], {}, [[]], {"": ""}, "a" * 10_000]
    numbers = random.Random(0)
    (tmp_path / "model-int8.tflite").write_bytes(b"\0\0\0\0TFL3" + bytes(92))
    ends = set()
    for seed in range(400):
        plain = entry()
        container, key = numbers.choice(values_of(plain))
        container[key] = numbers.choice(strange)
        (tmp_path / NAME).write_text(json.dumps(plain))
        try:
            told = [*map(str, verify(tmp_path)), *unlisted(tmp_path), *not_run(tmp_path)]
        except ManifestError as error:
            told = [str(error)]
        ends.add(len(told) > 1)
        assert all(line.isprintable() for line in told), (seed, key)
    assert ends == {True, False}
