"""``lightning-edge report``: where pages are written, and that a mistake is one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pages import INT8, REPORT, front, trial, words

from lightning_edge.cli.main import main as lightning_edge
from lightning_edge.cli.reports import main, names_of
from lightning_edge.reporting.html import sweep_page
from lightning_edge.reporting.manifest import Manifest


@pytest.fixture
def before(tmp_path: Path) -> Path:
    folder = tmp_path / "before"
    REPORT.write(folder)
    return folder


@pytest.fixture
def after(tmp_path: Path) -> Path:
    folder = tmp_path / "after"
    replace(REPORT, rows=(*REPORT.rows[:2], replace(INT8, size_bytes=8_000))).write(folder)
    return folder


def test_one_report_gets_its_page_again(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Manifest("Digits", (), recipe="seed_everything: 7").write(before)
    page = before / "report.html"
    page.unlink()
    with pytest.raises(SystemExit, match="0"):
        lightning_edge(["report", str(before)])
    assert page.read_text() == REPORT.to_html("seed_everything: 7")
    assert capsys.readouterr().out == f"{page}\n"


def test_one_report_goes_where_it_is_asked_to(before: Path, tmp_path: Path) -> None:
    assert main([str(before / "report.json"), "--to", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").read_text() == (before / "report.html").read_text()


def test_several_are_side_by_side(
    before: Path, after: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["before", "after/report.json"]) == 0
    assert capsys.readouterr().out == "compare.html\n"
    found = words((tmp_path / "compare.html").read_text())
    assert "before , after . Differences are against before." in found
    assert "8,000 -50.0%" in found


def test_folder_of_a_sweep_gets_its_page(tmp_path: Path) -> None:
    sweep = front(trial(0), trial(1))
    (tmp_path / "front.json").write_text(json.dumps(sweep))
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == sweep_page(sweep)
    assert main([str(tmp_path / "front.json"), "--to", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").is_file()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["nothing"], "error: there is no nothing. Give a report.json that lightning-edge has written"),
        (["before", "nothing"], "error: there is no nothing. Give"),
        (["before", "--to", "page.txt"], "error: --to page.txt is no name of a page; give one that ends in .html"),
        (["before", "--to", "before"], "error: --to before is no name of a page; give one that ends in .html"),
        (["before"] * 7, "error: 7 reports are given; 6 at most can be read side by side"),
        (["."], "error: front.json is no sweep that can be used: it lacks 'objectives', 'trials'"),
        (["before", "."], "error: there is no report.json"),
        (["before", "--to", "before/report.json/x.html"], "error: cannot write"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    before: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "front.json").write_text('{"study": "x"}')
    old = sorted(path for path in tmp_path.rglob("*"))
    assert main(given) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith(told)
    assert written.err.count("\n") == 1
    assert sorted(path for path in tmp_path.rglob("*")) == old


def test_what_a_report_has_beyond_this_version_is_said(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = json.loads(REPORT.to_json())
    (before / "report.json").write_text(json.dumps({**plain, "mood": "good"}))
    assert main([str(before)]) == 0
    assert capsys.readouterr().err.startswith("note: ")


def test_reports_are_named_by_what_tells_their_folders_apart() -> None:
    assert names_of([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert names_of([Path("/a/x/files"), Path("/a/y/files")]) == ["x/files", "y/files"]
    assert names_of([Path("/a/x"), Path("/a/x")]) == ["1: x", "2: x"]
