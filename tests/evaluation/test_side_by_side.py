"""Files run at the same time, each pass gets its own file's outputs, and an error is that of its file."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_edge.contents import Contents
from lightning_edge.errors import RunnerError
from lightning_edge.evaluation import side_by_side as side_by_side_module
from lightning_edge.evaluation.side_by_side import SideBySide
from lightning_edge.exporters import Artifact, Runner, TensorSpec

BATCHES = [torch.full((2, 3), float(number)) for number in range(4)]
LIMIT_S = 20


class Times(Runner):
    """Multiplies; waits until as many files as ``together`` has parties run at the same time, if that is given."""

    runtime = "times"
    inputs = (TensorSpec((1, 3), torch.float32),)

    def __init__(self, factor: float, together: threading.Barrier | None = None, fails_at: float | None = None) -> None:
        self.factor, self.together, self.fails_at = factor, together, fails_at
        self.calls = 0
        self.closed = False

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        self.calls += 1
        if self.together is not None:
            self.together.wait(LIMIT_S)
        if self.fails_at is not None and float(tensors[0][0, 0]) == self.fails_at:
            raise RuntimeError("no kernel for this")
        return [self.factor * tensors[0]]

    def close(self) -> None:
        self.closed = True


def file(runner: Times, tmp_path: Any) -> Artifact:
    return Artifact("stub", tmp_path / "net.stub", 0, 0, Contents(0, 4, {"mul": 1}), runner, load_ms=None)


def run(files: SideBySide, artifact: Artifact, batches: list[Tensor] = BATCHES) -> list[Tensor]:
    answer = files.answers(artifact)
    return [answer(batch)[0] for batch in batches]


def test_files_run_at_the_same_time_and_once(tmp_path: Any) -> None:
    together = threading.Barrier(2)
    runners = Times(2.0, together), Times(3.0, together)
    first, second = (file(runner, tmp_path) for runner in runners)
    with SideBySide([first, second], 2) as files:
        for artifact, factor in ((first, 2.0), (second, 3.0)):
            for found, batch in zip(run(files, artifact), BATCHES, strict=True):
                assert torch.equal(found, factor * batch)
    assert [runner.calls for runner in runners] == [8, 8]
    assert not any(runner.closed for runner in runners)


def test_a_pass_that_is_fed_something_else_runs_its_file(tmp_path: Any) -> None:
    runners = Times(2.0), Times(3.0), Times(4.0)
    artifacts = [file(runner, tmp_path) for runner in runners]
    with SideBySide(artifacts, 2) as files:
        run(files, artifacts[0], BATCHES[:2])
        others = [batch + 1 for batch in BATCHES]
        for artifact, factor in zip(artifacts[1:], (3.0, 4.0), strict=True):
            for found, batch in zip(run(files, artifact, others), others, strict=True):
                assert torch.equal(found, factor * batch)
    # From the first difference on, no file runs ahead of its pass.
    assert [runner.calls for runner in runners] == [4, 4 + 8, 4 + 8]


def test_an_error_is_that_of_its_files_own_pass(tmp_path: Any) -> None:
    runners = Times(2.0), Times(3.0, fails_at=1.0)
    first, second = (file(runner, tmp_path) for runner in runners)
    with SideBySide([first, second], 2) as files:
        assert len(run(files, first)) == 4
        with pytest.raises(RunnerError, match=r"net\.stub failed in times: no kernel for this"):
            run(files, second)


@pytest.mark.parametrize(("at_once", "kept_bytes"), [(1, 2**20), (2, 0)])
def test_each_runs_in_its_own_pass(at_once: int, kept_bytes: int, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(side_by_side_module, "_KEPT_BYTES", kept_bytes)
    runners = Times(2.0), Times(3.0)
    first, second = (file(runner, tmp_path) for runner in runners)
    with SideBySide([first, second], at_once) as files:
        run(files, first)
        assert [runner.calls for runner in runners] == [8, 0]
        assert torch.equal(run(files, second)[3], 3 * BATCHES[3])


def test_an_error_on_its_way_ends_what_is_running(tmp_path: Any) -> None:
    runner = Times(2.0)
    artifact = replace(file(runner, tmp_path), target="other")
    with pytest.raises(KeyboardInterrupt), SideBySide([artifact], 2):
        raise KeyboardInterrupt
    assert runner.closed
