"""Reports read back: the same as was written, and nothing that is none."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import FAILED, INT8, NOT_RUN, OVER, REPORT

from lightning_edge.contents import Endpoint
from lightning_edge.errors import EdgeError
from lightning_edge.interface import Interface, Pixels
from lightning_edge.reporting.manifest import Manifest
from lightning_edge.reporting.provenance import Commit
from lightning_edge.reporting.read import read_front, read_report
from lightning_edge.reporting.report import Report, without_infinities
from lightning_edge.reporting.typed import MOST_BYTES, built

FULL = replace(
    REPORT,
    channels={"stem": (16, 12)},
    rows=(
        *REPORT.rows,
        FAILED,
        NOT_RUN,
        replace(
            OVER,
            inputs=(Endpoint("image", (1, 3, 8, 8), "int8", 0.5, -3),),
            outputs=(Endpoint(None, (1, 10), "float32"),),
            interface=Interface(("image",), ("scores",), "nhwc", Pixels((0.5, 0.4, 0.3), (0.2,)), ("a", "b"), 4),
        ),
    ),
)


def changed(folder: Path, change: Any) -> Path:
    """Write a report of plain values that ``change`` has changed."""
    plain = json.loads(FULL.to_json())
    change(plain)
    path = folder / "report.json"
    path.write_text(json.dumps(plain))
    return path


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    FULL.write(tmp_path)
    for place in (tmp_path, tmp_path / "report.json", str(tmp_path)):
        found = read_report(place)
        assert found.report.to_json() == FULL.to_json()
        assert found.report.to_html() == FULL.to_html()
        assert (found.recipe, found.commit, found.remarks) == (None, None, ())
    assert found.report.rows[-1].interface == FULL.rows[-1].interface
    assert found.report.rows[-1].budget == FULL.rows[-1].budget


def test_numbers_that_were_not_finite_are_none_that_a_page_shows(tmp_path: Path) -> None:
    row = replace(INT8, metrics={"val_acc": math.nan, "val_loss": 0.5}, max_steps=math.inf)
    replace(REPORT, rows=(row,)).write(tmp_path)
    (read,) = read_report(tmp_path).report.rows
    assert dict(read.metrics) == {"val_loss": 0.5}
    assert read.max_steps is None


def test_configuration_comes_from_the_manifest_beside_it(tmp_path: Path) -> None:
    REPORT.write(tmp_path)
    Manifest("Digits", (), git=Commit("abc", True), recipe="seed: 1").write(tmp_path)
    found = read_report(tmp_path)
    assert (found.recipe, found.commit) == ("seed: 1", Commit("abc", True))
    (tmp_path / "manifest.json").write_text("{")
    found = read_report(tmp_path)
    assert found.recipe is None
    assert "the configuration is left out" in found.remarks[0]


def test_entries_of_a_later_version_are_left_out_with_a_word(tmp_path: Path) -> None:
    def later(plain: dict[str, Any]) -> None:
        plain["mood"] = "good"
        plain["rows"][0]["taste"] = 1
        plain["rows"][1]["taste"] = 2

    found = read_report(changed(tmp_path, later))
    assert found.report.to_json() == FULL.to_json()
    (remark,) = found.remarks
    assert remark.endswith("does not know and leaves out: mood, taste")


def test_reports_of_an_earlier_version_lack_what_has_a_default(tmp_path: Path) -> None:
    def earlier(plain: dict[str, Any]) -> None:
        del plain["notes"]
        for row in plain["rows"]:
            del row["interface"], row["not_run"]

    assert len(read_report(changed(tmp_path, earlier)).report.rows) == len(FULL.rows)


def put(name: str, value: Any) -> Any:
    return lambda plain: plain.update({name: value})


def put_in_row(name: str, value: Any) -> Any:
    return lambda plain: plain["rows"][2].update({name: value})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda plain: plain.pop("model"), "it lacks 'model'"),
        (put("rows", {}), "rows is {} and not a list"),
        (put("rows", [1]), "rows[0] is 1 and not an object"),
        (put("model", None), "model is None and not a text"),
        (put("seed", 1.5), "seed is 1.5 and not a whole number"),
        (put("threads", True), "threads is True and not a whole number"),
        (put("warnings", "text"), "warnings is 'text' and not a list"),
        (put("versions", {"torch": 2}), "versions.torch is 2 and not a text"),
        (put_in_row("precision", "fp16"), "rows[2].precision is 'fp16' and not one of 'fp32', 'int8'"),
        (put_in_row("size_bytes", "9"), "rows[2].size_bytes is '9' and not a whole number"),
        (put_in_row("size_bytes", 10**40), "0 and not a whole number"),
        (put_in_row("p50_ms", 10**40), "and not a finite number"),
        (put_in_row("metrics", {"a": "b"}), "rows[2].metrics.a is 'b' and not a finite number"),
        (put_in_row("metrics", {"\x1b[2J": "b"}), r"rows[2].metrics.'\x1b[2J' is 'b' and not a finite number"),
        (put_in_row("placements", {"told_by": "the file", "ops": [{}]}), "rows[2].placements.ops[0] lacks 'op'"),
        (put_in_row("interface", {"layout": "up"}), "rows[2].interface.layout is 'up' and not one of"),
        (put_in_row("interface", {"max_batch": 0}), "Interface(max_batch=0): give a whole number"),
        (lambda plain: plain.update(rows=plain["rows"] * 40), "has 240 rows; a report has 200 at most"),
    ],
)
def test_what_is_no_report_is_one_clear_error(tmp_path: Path, change: Any, told: str) -> None:
    path = changed(tmp_path, change)
    with pytest.raises(EdgeError, match=re.escape(told)) as caught:
        read_report(path)
    assert str(path) in str(caught.value)
    assert "Give a report.json that lightning-edge has written" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "Expecting value"),
        ("[]", "it is [] and not an object"),
        ('{"model": NaN}', "NaN is no number that JSON has"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"model": 1e999}', "lacks"),
        ("1" * 5000, "Exceeds the limit"),
        ("\udc80", "utf-8"),
    ],
)
def test_what_is_no_json_is_one_clear_error(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "report.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(EdgeError, match=f"is no report that can be used: .*{re.escape(told)}"):
        read_report(tmp_path)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=r"there is no .*nothing"):
        read_report(tmp_path / "nothing")
    (tmp_path / "report.json").mkdir()
    with pytest.raises(EdgeError, match="is a folder and not a file"):
        read_report(tmp_path)
    (tmp_path / "report.json").rmdir()
    os.mkfifo(tmp_path / "report.json")
    with pytest.raises(EdgeError, match="is a named pipe and not a file"):
        read_report(tmp_path)
    (tmp_path / "report.json").unlink()
    with (tmp_path / "report.json").open("wb") as large:
        large.truncate(MOST_BYTES + 1)
    with pytest.raises(EdgeError, match=r"16,777,217 bytes or more; 16,777,216 are allowed"):
        read_report(tmp_path)


def test_front_is_an_object(tmp_path: Path) -> None:
    place = tmp_path / "front.json"
    for text, told in (("[]", "holds a list and no sweep"), ("{", "none that can be used")):
        place.write_text(text)
        with pytest.raises(EdgeError, match=told):
            read_front(place)
    with pytest.raises(EdgeError, match="cannot be read: No such file"):
        read_front(tmp_path / "nothing")
    place.write_text('{"study": "x"}')
    assert read_front(place) == {"study": "x"}


def test_types_that_are_read() -> None:
    assert built(tuple[int, str], [1, "a"], "it") == (1, "a")
    assert built(int | str, "a", "it") == "a"
    assert built(float | str, 1.5, "it") == 1.5
    assert math.isnan(built(float, None, "it"))
    with pytest.raises(ValueError, match="it has 1 entries and not 2"):
        built(tuple[int, str], [1], "it")
    with pytest.raises(ValueError, match=r"it has 'b', which is not known"):
        built(Commit, {"commit": "a", "dirty": True, "b": 1}, "it")
    with pytest.raises(TypeError, match="which is not read"):
        built(bytes, b"", "it")
    plain = without_infinities(json.loads(REPORT.to_json()))
    assert isinstance(built(Report, plain, "it"), Report)
