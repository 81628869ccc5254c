"""The journal of what devices have measured: what is read back of it, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_edge.devices import Local
from lightning_edge.devices.settings import DeviceSettings, Sustained
from lightning_edge.errors import EdgeError
from lightning_edge.evaluation.journal import NAME, Journal, Progress
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.measure import Timing
from lightning_edge.reporting.devices import DeviceRow, Endurance, Point

ROW = DeviceRow("pi4", "onnx", "int8", "trained", path="model-int8.onnx")
BATCHES = [torch.full((2, 3), float(batch)) for batch in range(4)]


@pytest.fixture
def settings(tmp_path: Path) -> EvaluationSettings:
    return EvaluationSettings(["onnx"], tmp_path, devices=[Local()])


def doubled(asked: list[float]) -> Callable[..., list[Tensor]]:
    """A file that notes what it is asked."""

    def answer(batch: Tensor) -> list[Tensor]:
        asked.append(float(batch[0, 0]))
        return [batch * 2]

    return answer


def fed(progress: Progress, batches: list[Tensor], asked: list[float] | None = None) -> list[Tensor]:
    """Make a pass over batches."""
    answers = progress.answers(None if asked is None else doubled(asked))
    found = [answers(batch)[0] for batch in batches]
    answers.end()
    return found


def broken_off(settings: EvaluationSettings) -> DeviceRow:
    """A run that measured latency and two batches."""
    journal = Journal(settings)
    journal.begin()
    row = replace(ROW, p50_ms=0.1, sustained=Endurance.of([Point(1.0, 5, 0.1, 0.2)]))
    progress = journal.progress(ROW, "a" * 64)
    progress.add("latency", row)
    fed(progress, BATCHES[:2], [])
    return row


def test_what_was_measured_is_read_back_and_the_rest_is_asked_for(settings: EvaluationSettings) -> None:
    row = broken_off(settings)
    path = Path(settings.dirpath) / NAME
    with path.open("ab") as opened:
        opened.write(b"\x09\0\0\0\0\0\0\0{")  # a frame that was cut short
    for count, left in ((3, [2.0]), (4, [3.0]), (4, [])):
        journal = Journal(settings, resume=True)
        assert journal.has(ROW)
        assert not journal.has(replace(ROW, device="pi5"))
        progress = journal.progress(ROW, "a" * 64)
        assert progress.row == row
        assert progress.has("latency")
        assert not progress.has("accuracy")
        asked: list[float] = []
        assert all(map(torch.equal, fed(progress, BATCHES[:count], asked), [batch * 2 for batch in BATCHES]))
        assert asked == left
    assert all(map(torch.equal, fed(progress, BATCHES), [batch * 2 for batch in BATCHES]))


def test_other_samples_fewer_and_more_are_refused(settings: EvaluationSettings) -> None:
    broken_off(settings)
    progress = Journal(settings, resume=True).progress(ROW, "a" * 64)
    for batches in (BATCHES[1:3], [BATCHES[0].double(), BATCHES[1]], BATCHES[:1], BATCHES[:3]):
        with pytest.raises(EdgeError, match=r"^the samples are not those that ran before .* Leave resume out"):
            fed(progress, batches)


def test_another_file_and_other_settings_are_refused(settings: EvaluationSettings) -> None:
    broken_off(settings)
    with pytest.raises(EdgeError, match=r"^model-int8.onnx is another file .* is bbbbbbbbbbbb, and was aaaaaaaaaaaa"):
        Journal(settings, resume=True).progress(ROW, "b" * 64)
    changed = replace(settings, timing=Timing(repeats=7), on_devices=DeviceSettings(sustained=Sustained(3.0)))
    told = r"other settings \(repeats: then 100, now 7; sustained: then None, now \{'minutes': 3.0\}\)"
    with pytest.raises(EdgeError, match=told):
        Journal(changed, resume=True)
    Journal(replace(settings, timing=Timing(time_limit_s=7)), resume=True)  # a limit that was too low may be raised


def test_there_must_be_something_to_resume(settings: EvaluationSettings, tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=r"^there is nothing to resume: no evaluation into .* broke off on a device"):
        Journal(settings, resume=True)
    with pytest.raises(EdgeError, match=r"^resume goes on where a device was lost, and there is none"):
        Journal(replace(settings, devices=[]), resume=True)
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(EdgeError, match=r"is a named pipe and not a file. Leave resume out to measure anew$"):
        Journal(settings, resume=True)
    broken_off(settings)  # in its place
    assert Journal(settings, resume=True).has(ROW)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", "it is cut short"),
        (lambda data: b"\xff" * 64, "a message of 18446744073709551615 bytes"),
        (lambda data: data.replace(b'"journal": 1', b'"journal": 2'), "it is no journal of this version"),
        (lambda data: data.replace(b'"part": "latency"', b"\"part\": ['latency']"), "a message that is no JSON"),
        (lambda data: data.replace(b'"p50_ms": 0.1', b'"p50_ms": "a"'), "row.p50_ms is 'a' and not a finite number"),
        (lambda data: data.replace(b'"call": 1', b'"call":-1'), "call is -1 and not a whole number of 0 or more"),
        (lambda data: data.replace(b"[2, 3]", b"[2,-3]"), "an array of type and shape"),
    ],
)
def test_what_is_no_journal_is_refused(settings: EvaluationSettings, spoil: Callable[..., Any], message: str) -> None:
    broken_off(settings)
    path = Path(settings.dirpath) / NAME
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(EdgeError, match=rf"devices.journal cannot be used: {message}.*Leave resume out"):
        Journal(settings, resume=True)


def test_outputs_that_are_too_large_are_measured_again(
    settings: EvaluationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_edge.evaluation.journal._KEPT_BYTES", 2 * 3 * 4)  # of one batch
    broken_off(settings)
    asked: list[float] = []
    fed(Journal(settings, resume=True).progress(ROW, "a" * 64), BATCHES[:2], asked)
    assert asked == [1.0]


def test_a_folder_that_cannot_be_written_costs_no_measurement(settings: EvaluationSettings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"cannot be written .*: a run that breaks off cannot be resumed"):
        broken_off(replace(settings, dirpath=tmp_path / "file"))
