"""Files written side by side, in processes of their own: the same bytes, the same errors, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deployables import network

from lightning_edge.errors import ExportError
from lightning_edge.exporters import TARGETS, jobs, stage
from lightning_edge.exporters.jobs import Writers, check_jobs, default_jobs
from lightning_edge.network import Deployable


@pytest.fixture(autouse=True, scope="module")
def faulty() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, "faulty", "faulty_target")
        yield


def small(precision: str = "fp32") -> Deployable:
    return network("pooled", precision)  # type: ignore[arg-type]


def test_files_are_those_of_this_process_and_another_targets_failure_stops_nothing(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    lines: list[str] = []
    with Writers(2, lines.append) as writers:
        begun = [
            writers.begin(small("fp32"), "faulty", tmp_path / "a" / "net.faulty", label="faulty", writing="segfault"),
            writers.begin(small("int8"), "onnx", tmp_path / "a" / "net.onnx", label="onnx"),
            writers.begin(small("int8"), "onnx", tmp_path / "a" / "half.onnx", label="no", weights="half"),
        ]
        with pytest.raises(ExportError, match=r"faulty: the process that writes net\.faulty was ended by SIGSEGV"):
            begun[0].staged()
        begun[1].staged().accept()
        with pytest.raises(ValueError, match="'half'"):
            begun[2].staged()
    told = [line.split(", after")[0] for line in lines]
    assert [line for line in told if line.startswith("onnx")] == [
        f"onnx: {step}" for step in ("loading the network", "converting", "reading the file back", "written")
    ]
    assert [line for line in told if line.startswith("FAILED: faulty, there is no such file: ")]
    assert begun[0].announced
    here = tmp_path / "net.onnx"
    with stage(small("int8"), "onnx", here) as staged:
        staged.accept()
    assert (tmp_path / "a" / "net.onnx").read_bytes() == here.read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["net.onnx"]


def test_a_hang_and_an_error_are_those_of_the_target(tmp_path: Path) -> None:
    with Writers(1, print) as writers:
        refused = writers.begin(small(), "faulty", tmp_path / "r.faulty", label="refused", writing="refuse")
        with pytest.raises(ExportError, match=r"^faulty refuses the network$"):
            refused.staged()
        writers._limit_s = 3
        hangs = writers.begin(small(), "faulty", tmp_path / "h.faulty", label="hangs", writing="hang")
        with pytest.raises(ExportError, match=r"faulty: .* did not end within 3 s, and was ended"):
            hangs.staged()
    assert not list(tmp_path.iterdir())


def test_what_is_under_way_ends_with_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.tempfile, "tempdir", str(tmp_path))
    with contextlib.suppress(KeyboardInterrupt), Writers(1, print) as writers:
        for name in ("a.faulty", "b.faulty"):
            writers.begin(small(), "faulty", tmp_path / "new" / name, label=name, writing="hang")
        folders = [path for path in tmp_path.iterdir() if path.name.startswith("lightning-edge-")]
        assert [path.stat().st_mode & 0o777 for path in folders] == [0o700]
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_a_process_cannot_load_is_written_in_this_one(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    lines: list[str] = []

    class Own(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            twice: torch.Tensor = torch.ops.edge_tests.twice(x)
            return twice

    with torch.library._scoped_library("edge_tests", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        with Writers(1, lines.append) as writers:
            file = writers.begin(Own(), "onnx", tmp_path / "n.onnx", label="own", inputs=torch.ones(1, 2))
            with pytest.raises(ExportError, match=r"^onnx: .*edge_tests"):
                file.staged()
    assert not any("FAILED" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_jobs_are_a_whole_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="jobs="):
            check_jobs(wrong)  # type: ignore[arg-type]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert (default_jobs(2), default_jobs(4)) == (2, 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert default_jobs(4) == 0


TERMINATED = """
import sys
from pathlib import Path
import torch
from lightning_edge.exporters import TARGETS
from lightning_edge.exporters.jobs import Writers
from lightning_edge.interrupts import unwinding
TARGETS["faulty"] = "faulty_target"

def tell(line):
    if "converting" in line:
        print(*(child.process.pid for child in writers._running), flush=True)

with unwinding(), Writers(1, tell) as writers:
    pending = writers.begin(
        torch.nn.Linear(2, 2), "faulty", "out/n.faulty", label="n", inputs=torch.ones(1, 2), writing="hang"
    )
    pending.staged()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sigterm_while_a_file_is_written_leaves_no_folder_and_no_process(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    asked = subprocess.Popen(
        [sys.executable, "-P", "-c", TERMINATED],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path / "work",
        env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path / "temporary")},
    )
    ended = threading.Timer(120, asked.kill)
    ended.start()
    try:
        assert asked.stdout is not None
        writers = [int(number) for number in asked.stdout.readline().split()]
        assert len(writers) == 1
        assert [path.name[:9] for path in (tmp_path / "work" / "out").iterdir()] == [".staging-"]
        asked.send_signal(signal.SIGTERM)
        assert asked.wait(30) == -signal.SIGTERM
    finally:
        ended.cancel()
        asked.kill()
    assert not list((tmp_path / "work").iterdir())
    assert not list((tmp_path / "temporary").iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(writers[0], 0)


SCRIPT = """
import sys
from lightning_edge.exporters.jobs import Writers
import torch
ends = {"onnx": ".onnx", "tflite": ".tflite", "coreml": ".mlpackage", "executorch": ".pte"}
with Writers(2, print) as writers:
    files = [writers.begin(torch.nn.Linear(2, 2), name, f"n{end}", label=name, inputs=torch.ones(1, 2))
             for name, end in ends.items()]
    for file in files:
        artifact = file.staged().accept()
        print(artifact.target, [list(output.shape) for output in artifact(torch.ones(3, 2))])
converters = {"coremltools", "litert_torch", "onnx", "onnxscript", "executorch", "tensorflow", "jax"}
print("imported:", sorted(converters & set(sys.modules)))
"""


@pytest.mark.slow
def test_the_users_process_imports_no_converter(tmp_path: Path) -> None:
    for name in ("onnxscript", "litert_torch", "coremltools", "executorch"):
        pytest.importorskip(name)
    found = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "imported: []", found.stdout
    assert all(f"{name} [[3, 2]]" in found.stdout for name in ("onnx", "tflite", "coreml", "executorch"))
