"""Many loads leave nothing behind; a signal in the middle of an export does not either; two runs do not mix."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from deployables import batches, network

from lightning_edge.errors import EdgeError
from lightning_edge.exporters import TARGETS, export, load
from lightning_edge.one_run import only_run
from lightning_edge.reporting.verification import verify

TESTS = Path(__file__).parents[2]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what it looks at is told by Linux only")


@pytest.fixture(autouse=True)
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "faulty", "faulty_target")


def children() -> set[str]:
    return {
        pid
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
        if task.exists()
    }


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def cycles(path: Path, sample: torch.Tensor, count: int) -> None:
    for _ in range(count):
        load(path)(sample)
        gc.collect()


@LINUX
@pytest.mark.parametrize(
    ("warm_up", "count", "most_bytes"),
    [(1, 1, 2**24), pytest.param(20, 200, 2**24, marks=pytest.mark.slow)],
    ids=["twice", "200 times"],
)
def test_load_cycles_leave_no_process_descriptor_or_memory(
    tmp_path: Path, warm_up: int, count: int, most_bytes: int
) -> None:
    path = tmp_path / "net.faulty"
    path.write_text("")
    sample = torch.tensor([[1.0, 2.0, 3.0]])
    cycles(path, sample, warm_up)
    before = sorted(os.listdir("/proc/self/fd")), children(), resident_bytes()
    cycles(path, sample, count)
    assert sorted(os.listdir("/proc/self/fd")) == before[0]
    assert children() == before[1]
    assert resident_bytes() - before[2] < most_bytes


@LINUX
@pytest.mark.slow
def test_200_load_cycles_of_a_real_file_leave_nothing(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    path = tmp_path / "net.tflite"
    export(network("pooled", "int8"), "tflite", path, batches=batches("pooled"))
    sample = torch.zeros(2, 2, 5, 4)
    cycles(path, sample, 20)
    before = sorted(os.listdir("/proc/self/fd")), children(), resident_bytes()
    cycles(path, sample, 200)
    assert sorted(os.listdir("/proc/self/fd")) == before[0]
    assert children() == before[1]
    assert resident_bytes() - before[2] < 2**25


EXPORT = """
import signal, sys
import torch
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run behind a shell, which has it ignored there
from faulty_target import Doubled
from lightning_edge.exporters import TARGETS, export

TARGETS["faulty"] = "faulty_target"
print("ready", flush=True)
export(Doubled(), "faulty", Path(sys.argv[1]) / "new" / "net.faulty", inputs=torch.ones(1, 3), loading="hang")
"""


@LINUX
@pytest.mark.parametrize(
    "signals",
    [
        pytest.param((signal.SIGTERM,), marks=pytest.mark.slow),
        (signal.SIGINT, signal.SIGTERM),
        pytest.param((signal.SIGINT, signal.SIGINT), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_signal_in_the_middle_of_an_export_leaves_nothing(tmp_path: Path, signals: tuple[int, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(TESTS)])}
    command = [sys.executable, "-P", "-c", EXPORT, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    worker = worker_of(process)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.002)
    _, told = process.communicate(timeout=60)
    # A KeyboardInterrupt that nobody catches ends a script by the signal, or with a traceback and status 1.
    ended = {-number for number in signals} | ({1} if signal.SIGINT in signals else set())
    assert process.returncode in ended, told
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 20
    while (status := Path(f"/proc/{worker}/status")).exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, f"process {worker} is still there"
        time.sleep(0.05)


def worker_of(process: subprocess.Popen[str]) -> str:
    """Wait until the process of the runtime is there, in which the file hangs."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            if found := (task / "children").read_text().split():
                return found[0]
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no process was started: {process.communicate()}")


EVALUATE = """
import sys
import lightning as L
import torch
from faulty_target import Doubled
from torch.utils.data import DataLoader, TensorDataset
from lightning_edge.errors import EdgeError
from lightning_edge.evaluation.evaluate import evaluate_module
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.validation import Validation
from lightning_edge.exporters import TARGETS
from lightning_edge.measure import Timing

TARGETS["faulty"] = "faulty_target"
folder, loading = sys.argv[1:]

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Doubled()

values = torch.tensor([[1.0, 2.0, 3.0]] * 4)
validation = Validation(Module(), DataLoader(TensorDataset(values, values)), "net", metrics={})
options = {"faulty": {"loading": loading}}
settings = EvaluationSettings(["faulty"], folder, options=options, timing=Timing(warmup=0, repeats=1))
print("ready", flush=True)
sys.stdin.readline()
try:
    report = evaluate_module(validation, settings)
except EdgeError as error:
    print(error)
    sys.exit(3)
sys.exit(bool(report.failures))
"""


@pytest.mark.slow
def test_of_two_evaluations_at_once_in_one_folder_one_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(TESTS)])}
    runs = []
    for text in ("first", "the second"):
        command = [sys.executable, "-P", "-c", EVALUATE, str(tmp_path / "out"), text]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        runs.append(subprocess.Popen(command, env=environment, text=True, **pipes))  # type: ignore[call-overload]
    for run in runs:
        assert run.stdout.readline() == "ready\n", run.communicate()
    for run in runs:  # both at the same moment
        run.stdin.write("go\n")
        run.stdin.flush()
    told = [run.communicate(timeout=120) for run in runs]
    ended = [run.returncode for run in runs]
    assert sorted(ended) == [0, 3], told
    assert f"another run exports into '{tmp_path / 'out'}'" in told[ended.index(3)][0]
    # The target tells nothing of inputs and outputs.
    assert {finding.check for finding in verify(tmp_path / "out")} <= {"contents", "runs"}
    files = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert (tmp_path / "out" / "model-fp32.faulty").read_text() == ("first", "the second")[ended.index(0)]
    assert [file["path"] for file in files] == ["model-fp32.faulty"]
    names = {"manifest.json", "model-fp32.faulty", "report.json", "report.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} >= names
    assert not any(path.name.startswith(".") for path in (tmp_path / "out").iterdir())


def test_an_evaluation_into_a_folder_at_work_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    from lightning_edge.evaluation.evaluate import evaluate_module
    from lightning_edge.evaluation.settings import EvaluationSettings

    with only_run(tmp_path), pytest.raises(EdgeError, match="another run exports into"):
        evaluate_module(None, EvaluationSettings(["faulty"], tmp_path))  # type: ignore[arg-type]
