"""YAML from outside: plain values, each key once, no bombs, regular files only."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import yaml

from lightning_edge.yaml_files import MOST_BYTES, parse_yaml, read_yaml

ROOT = Path(__file__).parents[1]


def test_values_are_plain() -> None:
    text = "a: 1\nb: 1e-3\nc: 2020-01-01\nd: .5\ne: [true, null, '1']\nf: 1.5e3\ng: -.inf\nh: {i: -2}\n"
    found = {"a": 1, "b": 0.001, "c": "2020-01-01", "d": 0.5, "e": [True, None, "1"], "f": 1500.0, "g": -math.inf}
    assert parse_yaml(text, "text") == {**found, "h": {"i": -2}}
    assert parse_yaml("", "text") is None


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_read_as_with_a_plain_loader(path: Path) -> None:
    assert read_yaml(path) == yaml.safe_load(path.read_text())


def test_anchors_and_merges_are_taken() -> None:
    assert parse_yaml("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  c: 3\n", "text")["d"] == {"b": 1, "c": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "text: line 3, column 1: 'a' is given twice, first in line 1"),
        ("a: {b: 1, b: 1}", "text: line 1, column 11: 'b' is given twice"),
        ("1: a\n1.0: b\n", "text: line 2, column 1: 1.0 is given twice"),
        ("a: &a [1, *a]", "text: line 1, column 4: a value holds itself"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("a: [1", "text: line 1, column 6: "),
        ("a: !!python/object/apply:os.getcwd []", "text: line 1, column 4: the tag .* names no plain value"),
        ("a: !!set {a, b}", "names no plain value"),
        ("a: !!int ''", "text: line 1, column 1: a value is not of the type"),
        ("a: " + "9" * 5000, "a value is not of the type"),
        ("? [a]\n: b", "a key is a list or a mapping"),
        ("[" * 10_000, "text is nested too deeply"),
        ("a: \0", "unacceptable character"),
    ],
)
def test_what_would_be_misread_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text, "text")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("merge", [False, True], ids=["lists", "merges"])
def test_a_bomb_of_aliases_is_refused(merge: bool) -> None:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    for level in range(1, 20):
        aliases = f"*a{level - 1}, *a{level - 1}"
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{aliases}]}}" if merge else f"[{aliases}]"))
    with pytest.raises(ValueError, match=r"more than 100,000 values with the aliases filled in"):
        parse_yaml("\n".join(lines), "text")


def test_only_regular_files_of_some_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    with (tmp_path / "sparse.yaml").open("wb") as stream:
        stream.truncate(2**31)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    for name, message in (
        ("pipe.yaml", "is a named pipe and not a file"),
        ("zero.yaml", "is a device and not a file"),
        ("sparse.yaml", f"2,147,483,648 bytes or more; {MOST_BYTES:,} are allowed"),
        ("latin.yaml", "no text in UTF-8"),
        (".", "is a folder and not a file"),
        ("none.yaml", "there is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_yaml(tmp_path / name)
    (tmp_path / "link.yaml").symlink_to("real.yaml")
    (tmp_path / "real.yaml").write_text("a: 1")
    assert read_yaml(tmp_path / "link.yaml") == {"a": 1}
