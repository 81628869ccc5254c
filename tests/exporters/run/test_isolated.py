"""A runtime's crash, hang or noise is one clear error, and its process is gone with the artifact."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_target
import lightning as L
import pytest
import torch
from deployables import batches, network
from faulty_target import Doubled
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge.errors import MissingExtraError, RunnerError
from lightning_edge.evaluation.evaluate import evaluate_module
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.validation import Validation
from lightning_edge.exporters import TARGETS, Artifact, export, load, target
from lightning_edge.exporters.run import isolated
from lightning_edge.exporters.run.isolated import Isolated
from lightning_edge.exporters.run.missing import missing_operation
from lightning_edge.measure import Timing

ISOLATED = True
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what it looks at is told by Linux only")


@pytest.fixture(autouse=True, scope="module")
def faulty() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, "faulty", "faulty_target")
        yield


def file(folder: Path, loading: str = "") -> Path:
    path = folder / "net.faulty"
    path.write_text(loading)
    return path


def sample(code: float = 1.0) -> torch.Tensor:
    return torch.tensor([[code, 2.0, 3.0]])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A file for all tests after which its process is still there."""
    return load(file(tmp_path_factory.mktemp("loaded")))


def process(artifact: Artifact) -> int:
    assert isinstance(artifact.runner, Isolated)
    return artifact.runner._child.process.pid


def is_running(number: int) -> bool:
    """Whether there is such a process, a zombie included."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.filterwarnings("ignore::lightning_edge.exporters.ExportWarning")
@pytest.mark.parametrize(
    ("name", "package"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in (("tflite", "ai_edge_litert"), ("executorch",) * 2)],
)
def test_outputs_are_those_of_the_same_file_in_this_process(name: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    inputs = batches("tokens")[0]
    path = tmp_path / f"net{target(name).suffix}"
    here = export(network("tokens", "fp32"), name, path, isolated=False)
    apart = load(path)
    assert isinstance(apart.runner, Isolated)
    assert not isinstance(here.runner, Isolated)
    assert (apart.runner.inputs, apart.runner.runtime) == (here.runner.inputs, here.runner.runtime)
    assert apart.load_ms > 0
    for one, other in zip(apart(*inputs.args), here(*inputs.args), strict=True):
        assert torch.equal(one, other)


def test_a_crash_names_file_runtime_signal_and_last_words(tmp_path: Path) -> None:
    artifact = load(file(tmp_path))
    number = process(artifact)
    says = (
        r"net\.faulty: the process of Faulty 1\.0 was ended by SIGABRT \(double free or corruption \(!prev\)\) while "
        r"it ran a sample"
    )
    with pytest.raises(RunnerError, match=says):
        artifact(sample(faulty_target.ABORT))
    assert not is_running(number)
    with pytest.raises(RunnerError, match=r"ended by SIGABRT .*\. Load it again"):
        artifact(sample())


@pytest.mark.parametrize(
    ("said", "operation"),
    [
        ("Didn't find op for builtin opcode 'STABLEHLO_SORT' version '1'. An older", "STABLEHLO_SORT"),
        ("Encountered unresolved custom op: Foo.\nSee instructions", "Foo"),
        ("NOT_IMPLEMENTED : Could not find an implementation for GridSample(16) node with name 'n'", "GridSample"),
        ("[method.cpp:819] Missing operator: [0] aten::sort.values\n[method.cpp", "aten::sort.values"),
        ("version 7 is not known", None),
    ],
)
def test_an_operation_without_a_kernel_is_found_in_a_runtimes_words(said: str, operation: str | None) -> None:
    assert missing_operation(said) == operation


def test_a_file_just_written_is_not_to_be_exported_again(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"version 7 is not known\. The converter has just written it so") as error:
        export(Doubled(), "faulty", tmp_path / "net.faulty", inputs=torch.zeros(1, 3), loading="refuse")
    assert "again" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("loading", "says"),
    [
        ("segfault", r"net\.faulty: the process of faulty_target was ended by SIGSEGV while it loaded the file"),
        pytest.param(
            "hang",
            r"net\.faulty: faulty_target did not answer within time_limit_s=0\.5 while it loaded .* a larger time_",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "refuse",
            r"net\.faulty does not load: version 7 is not known\. Export it again",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "lacking",
            r"0x:14 \(operation aten::sort\.values\)\. The runtime has no kernel for aten::sort\.values: replace",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_file_that_does_not_load_is_one_error(tmp_path: Path, loading: str, says: str) -> None:
    with pytest.raises(RunnerError, match=says):
        load(file(tmp_path, loading), time_limit_s=0.5)


def test_a_hang_is_ended_at_the_limit(tmp_path: Path) -> None:
    artifact = load(file(tmp_path), time_limit_s=0.5)
    number = process(artifact)
    assert torch.equal(artifact(sample())[0], 2 * sample())
    with pytest.raises(RunnerError, match=r"Faulty 1\.0 did not answer within time_limit_s=0\.5 while it ran a sample"):
        artifact(sample(faulty_target.HANG))
    assert not is_running(number)


def test_a_process_that_dies_between_calls_is_told_at_the_next(tmp_path: Path) -> None:
    artifact = load(file(tmp_path))
    os.kill(process(artifact), signal.SIGKILL)
    with pytest.raises(RunnerError, match=r"was ended by SIGKILL \(the system may have been out of memory\)"):
        artifact(sample())


def test_an_interrupted_call_leaves_no_answer_for_the_next(tmp_path: Path) -> None:
    artifact = load(file(tmp_path))
    number = process(artifact)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            artifact(sample(faulty_target.HANG))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not is_running(number)
    with pytest.raises(RunnerError, match=r"a call was interrupted.*Load it again"):
        artifact(sample())


@LINUX
def test_process_and_files_are_gone_with_the_artifact(tmp_path: Path) -> None:
    gc.collect()  # what earlier tests left
    before = sorted(os.listdir("/proc/self/fd"))
    artifact = load(file(tmp_path))
    number = process(artifact)
    with pytest.raises(RunnerError, match="ended with status 3"):
        artifact(sample(faulty_target.EXIT))
    artifact = load(file(tmp_path))
    number = process(artifact)
    assert is_running(number)
    del artifact
    gc.collect()
    assert not is_running(number)
    assert sorted(os.listdir("/proc/self/fd")) == before


@LINUX
def test_a_script_without_a_main_guard_runs_once_and_its_process_ends_with_it(tmp_path: Path) -> None:
    # multiprocessing would import the script again in the process, and train once more.
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, torch\nfrom lightning_edge.exporters import TARGETS, load\n"
        f"sys.path.append({str(Path(__file__).parents[2])!r})\nTARGETS['faulty'] = 'faulty_target'\n"
        f"artifact = load({str(file(tmp_path))!r})\n"
        "print(type(artifact.runner).__name__, artifact(torch.ones(1, 3))[0].tolist())\n"
        "print(artifact.runner._child.process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "json.py").write_text("raise SystemExit('the folder of the script is not that of the process')")
    found = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert found.returncode == -signal.SIGKILL, found.stderr
    answered, number = found.stdout.splitlines()
    assert answered == "Isolated [[2.0, 2.0, 2.0]]"
    status = Path(f"/proc/{int(number)}/status")
    for _ in range(100):
        # Where nobody waits for orphans it stays as a zombie.
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"process {number} is still there")


# All of these on one process.


def test_what_a_runtime_prints_goes_nowhere(loaded: Artifact, capfd: pytest.CaptureFixture[str]) -> None:
    assert isinstance(loaded.runner, Isolated)
    for _ in range(3):
        assert torch.equal(loaded(sample(faulty_target.CHATTER))[0], 2 * sample(faulty_target.CHATTER))
    assert capfd.readouterr() == ("", "")
    assert os.fstat(loaded.runner._child.words.fileno()).st_size == 0  # and does not fill the disk


def test_what_a_runtime_raises_ends_nothing(loaded: Artifact) -> None:
    with pytest.raises(RunnerError, match=r"^net\.faulty failed in Faulty 1\.0: no kernel for this$"):
        loaded(sample(faulty_target.RAISE))
    assert torch.equal(loaded(sample())[0], 2 * sample())


def test_time_is_that_of_the_runtime(loaded: Artifact) -> None:
    slow = loaded.timed_call([sample(faulty_target.SLEEP)])
    assert slow() >= 50e6
    assert slow() >= 50e6
    quick = loaded.timed_call([sample().double()])  # converted on the way
    assert quick() > 0
    with pytest.raises(RunnerError, match="but takes"):
        loaded.timed_call([sample()[:, :2]])


@LINUX
def test_peak_memory_is_what_was_held_at_once(loaded: Artifact) -> None:
    before = loaded.runner.peak_memory_bytes()
    loaded(sample(faulty_target.ALLOCATE))
    after = loaded.runner.peak_memory_bytes()
    assert before is not None
    assert after is not None
    # A little less than what was allocated is right: libraries' code that came into memory meanwhile counts against it.
    assert 0.95 * 2**25 <= after < 1.5 * 2**25
    assert before < 0.95 * 2**25


def test_samples_are_sent_together_and_run_one_by_one(loaded: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.rand(300, 3) + 1
    asked: list[dict[str, Any]] = []
    ask = Isolated._ask

    def counted(self: Isolated, when: str, message: dict[str, Any], *others: Any) -> Any:
        asked.append(message)
        return ask(self, when, message, *others)

    monkeypatch.setattr(Isolated, "_ask", counted)
    assert torch.equal(loaded(batch)[0], 2 * batch)
    # Those whose memory counts, one by one; then more and more at once.
    assert [message["do"] for message in asked[:10]] == ["run"] * 8 + ["memory", "run_all"]
    assert sum(message.get("count", 1) for message in asked if message["do"] != "memory") == 300
    assert len(asked) < 30
    known = loaded.runner.peak_memory_bytes()
    loaded(torch.cat([batch[:9], sample(faulty_target.ALLOCATE)]))
    assert loaded.runner.peak_memory_bytes() == known
    with pytest.raises(RunnerError, match=r"^net\.faulty failed in Faulty 1\.0: no kernel for this$"):
        loaded(torch.cat([batch, sample(faulty_target.RAISE), batch]))
    assert torch.equal(loaded(batch[:5])[0], 2 * batch[:5])


def test_calls_of_several_threads_take_turns(loaded: Artifact) -> None:
    wrong = []

    def call(value: float) -> None:
        for _ in range(50):
            if not torch.equal(loaded(sample(value))[0], 2 * sample(value)):
                wrong.append(value)

    threads = [threading.Thread(target=call, args=(float(value),)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forked_process_is_told_to_load_for_itself(loaded: Artifact) -> None:
    number = os.fork()
    if number == 0:
        status = 1
        try:
            loaded(sample())
        except RunnerError as error:
            status = 0 if "loaded in another process; load it again in this one" in str(error) else 2
        finally:
            loaded.runner._finish()  # type: ignore[attr-defined]  # as when it is collected there
            os._exit(status)
    assert os.waitpid(number, 0)[1] == 0
    assert torch.equal(loaded(sample())[0], 2 * sample())


# Where processes cannot be, and where they are not wanted.


def test_a_process_that_cannot_be_started_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(RunnerError, match=r"cannot start a process to run net\.faulty in: .*Give isolated=False"):
        load(file(tmp_path))
    assert torch.equal(load(file(tmp_path), isolated=False)(sample())[0], 2 * sample())


_BARE_TARGET = """
from faulty_target import Faulty

class Bare(Faulty):
    runtime_modules = ("no_such_runtime",)

TARGET = Bare()
"""


def test_a_missing_runtime_is_told_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bare_target.py").write_text(_BARE_TARGET)
    monkeypatch.syspath_prepend(tmp_path)  # the process looks where this one does
    monkeypatch.setitem(TARGETS, "faulty", "bare_target")
    with pytest.raises(MissingExtraError, match=r"'no_such_runtime' .*pip install 'lightning-edge\[faulty\]'"):
        load(file(tmp_path))


def test_a_process_that_does_not_start_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_START_LIMIT_S", 0.01)
    with pytest.raises(RunnerError, match=r"did not answer within 0\.01 s while it started"):
        load(file(tmp_path))


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_that_is_none_is_refused(tmp_path: Path, limit: float) -> None:
    with pytest.raises(ValueError, match=r"time_limit_s=.* is not allowed; give more than 0 seconds"):
        load(file(tmp_path), time_limit_s=limit)


# The report and export are safe without being asked.


def test_export_of_a_file_that_crashes_leaves_the_old_one(tmp_path: Path) -> None:
    path = file(tmp_path, "old")
    with pytest.raises(RunnerError, match=r"net\.faulty: the process of faulty_target was ended by SIGSEGV"):
        export(Doubled(), "faulty", path, inputs=sample(), loading="segfault")
    with pytest.raises(RunnerError, match=r"net\.faulty: the process of Faulty 1\.0 was ended by SIGABRT"):
        export(Doubled(), "faulty", path, inputs=sample(), batches=[sample(faulty_target.ABORT)])
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("net.faulty", "old")]


def test_a_crash_is_a_row_of_the_report_and_not_the_end(tmp_path: Path) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Doubled()

    def report(values: torch.Tensor, **options: Any) -> Any:
        data = DataLoader(TensorDataset(values, values), batch_size=2)
        timing = Timing(warmup=1, repeats=2)
        validation = Validation(Module(), data, "net", metrics={})
        settings = EvaluationSettings(["faulty"], tmp_path, timing=timing, options={"faulty": options})
        return evaluate_module(validation, settings)

    bad = report(torch.cat([sample(), sample(faulty_target.SEGFAULT)]))
    assert "ended by SIGSEGV while it ran a sample" in str(bad.rows[1].error)
    assert (bad.rows[1].path, bad.rows[1].p50_ms) == (None, None)
    assert bad.rows[0].p50_ms is not None
    # Two samples are validated well, and the third call, which is one of the timing, is one too many.
    tired = report(torch.cat([sample(), sample()]), loading="tired")
    assert str(tired.rows[1].error).startswith("while it was timed: model-fp32.faulty: the process of Faulty 1.0 was")
    assert tired.rows[1].p50_ms is None
    assert tired.rows[0].p50_ms is not None
    assert (tmp_path / "report.json").is_file()
