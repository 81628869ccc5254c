"""Benchmark programs of a device: a script stands for each, and says what the real one is known to say."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from boards import Server
from test_adb import phone

from lightning_edge.devices import Adb, Device, Local, Ssh
from lightning_edge.devices import native as native_module
from lightning_edge.devices.native import time_by_program
from lightning_edge.devices.programs import NativeFigures
from lightning_edge.errors import RunnerError
from lightning_edge.measure import Timing

TIMING = Timing(warmup=2, repeats=50, threads=3)
LITERT = """INFO: STARTING!
INFO: Loaded model model.tflite
INFO: count=1 curr=1357602 p5=1357602 median=1357602 p95=1357602

INFO: count=50 first=1249 curr=1240 min=1238 max=1252 avg=1.25e+03 std=2565 p5=1238 median=1239 p95=1247.5

INFO: Inference timings in us: Init: 5579, First inference: 13576, Warmup (avg): 1.3576e+06, Inference (avg): 1250
INFO: Memory footprint delta from the start of the tool (MB): init=6.36328 overall=109.832
"""
TENSORRT = """[01/01/2026-00:00:00] [I] === Performance summary ===
[01/01/2026-00:00:00] [I] Throughput: 31.8446 qps
[01/01/2026-00:00:00] [I] Latency: min = 41.1 ms, max = 41.3 ms, mean = 41.2 ms, median = 41.25 ms, \
percentile(90%) = 41.28 ms, percentile(95%) = 41.29 ms, percentile(99%) = 41.3 ms
[01/01/2026-00:00:00] [I] GPU Compute Time: min = 31 ms, max = 32 ms, mean = 31 ms, median = 31 ms
"""
EXECUTORCH = """I 00:00:00.000100 executorch:executor_runner.cpp:168] Model file model.pte is loaded.
I 00:00:00.123456 executorch:executor_runner.cpp:336] Model executed successfully {calls} time(s) in {ms} ms.
"""


def program(folder: Path, name: str, says: str, before: str = "") -> str:
    """A program that keeps what it is given beside it, and the file that it is told of."""
    path = folder / name
    path.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/arguments\ncp model.* {folder}/\npwd > {folder}/place\n'
        f"{before}\ncat <<'END'\n{says}END\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model of mine.tflite"
    path.write_bytes(bytes(range(256)) * 300)
    return path


def test_litert_on_every_kind_of_device(tmp_path: Path, model: Path, place: Path, server: Server) -> None:
    command = program(tmp_path, "linux_aarch64_benchmark_model", LITERT)
    programs = {"tflite": [command, "--use_xnnpack=false", "--num_threads=2"]}
    devices: list[Device] = [
        Local(folder=str(place), programs=programs),
        server.device(programs=programs),
        phone(tmp_path, place).device(programs=programs),
    ]
    for device in devices:
        runtime, figures = time_by_program("board", device, "tflite", model, TIMING)
        assert runtime == "linux_aarch64_benchmark_model, a program of the device, which gives times only"
        assert figures == NativeFigures(13.576, 1.239, 1.2475, None, 2.565, 5.579, 800.0, 50)
        given = ["--use_xnnpack=false", "--num_threads=2", "--graph=model.tflite", "--warmup_runs=2", "--num_runs=50"]
        assert (tmp_path / "arguments").read_text().splitlines() == given
        assert (tmp_path / "model.tflite").read_bytes() == model.read_bytes()
        (tmp_path / "model.tflite").unlink()
        assert Path((tmp_path / "place").read_text().strip()).parent == place
        assert list(place.glob("lightning-edge-*")) == []


@pytest.mark.parametrize(
    ("target", "name", "says", "figures"),
    [
        ("onnx", "trtexec", TENSORRT, NativeFigures(None, 41.25, 41.29, 41.3, throughput=31.8446)),
        (
            "executorch",
            "executor_runner",
            EXECUTORCH.format(calls=20, ms="8.0"),
            NativeFigures(throughput=2500.0, repeats=20),
        ),
        ("executorch", "executor_runner", EXECUTORCH.format(calls=1, ms="3.5"), NativeFigures(first_ms=3.5)),
    ],
)
def test_what_other_programs_say(
    tmp_path: Path, model: Path, place: Path, target: str, name: str, says: str, figures: NativeFigures
) -> None:
    device = Local(folder=str(place), programs={target: [program(tmp_path, name, says)]})
    assert time_by_program("board", device, target, model, TIMING)[1] == figures


def test_an_old_benchmark_tells_no_median(tmp_path: Path, model: Path, place: Path) -> None:
    old = LITERT.replace(" p5=1238 median=1239 p95=1247.5", "")
    device = Local(folder=str(place), programs={"tflite": [program(tmp_path, "benchmark_model", old)]})
    found = time_by_program("board", device, "tflite", model, TIMING)[1]
    assert found == NativeFigures(first_ms=13.576, jitter_ms=2.565, load_ms=5.579, throughput=800.0, repeats=50)


@pytest.mark.parametrize(
    ("says", "before", "message"),
    [
        ("nothing of use\n", "", "told no times that are known; it said at last: nothing of use"),
        ("", "echo no such op >&2; exit 7", "ended with status 7 and said at last: no such op"),
        ("", "kill -SEGV $$", "ended with status 139"),
        ("", "head -c 400000 /dev/zero | tr '\\\\0' x", "said more than 262144 bytes"),
    ],
)
def test_a_program_that_does_not_tell(
    tmp_path: Path, model: Path, place: Path, says: str, before: str, message: str
) -> None:
    device = Local(folder=str(place), programs={"tflite": [program(tmp_path, "benchmark_model", says, before)]})
    with pytest.raises(RunnerError) as error:
        time_by_program("board", device, "tflite", model, TIMING)
    assert message in str(error.value)
    assert str(error.value).startswith("board: ")
    wait_for_nothing_in(place)


def test_a_program_that_is_not_there(model: Path, place: Path) -> None:
    device = Local(folder=str(place), programs={"tflite": ["/none/benchmark_model"]})
    with pytest.raises(RunnerError, match=r"/none/benchmark_model cannot be started there .*Give its path"):
        time_by_program("board", device, "tflite", model, TIMING)


def test_a_program_that_hangs_is_killed(
    tmp_path: Path, model: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_module, "_LIMIT_S", 0.5)
    command = program(tmp_path, "benchmark_model", "", f"echo $$ > {tmp_path}/pid; exec sleep 60")
    device = Local(folder=str(place), programs={"tflite": [command]})
    with pytest.raises(RunnerError, match=r"benchmark_model said nothing for 0\.5 s, and was ended"):
        time_by_program("board", device, "tflite", model, TIMING)
    wait_for_nothing_in(place)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def wait_for_nothing_in(place: Path) -> None:
    until = time.monotonic() + 10
    while list(place.glob("lightning-edge-*")) and time.monotonic() < until:
        time.sleep(0.05)
    assert list(place.glob("lightning-edge-*")) == []


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        ({"tflite": "/x/benchmark_model"}, "give a list: a program on the device and its arguments"),
        ({"tflite": []}, "give a list"),
        ({"tflite": ["/x/my_benchmark"]}, "'/x/my_benchmark' is not known; allowed are benchmark_model"),
        ({"onnx": ["/x/benchmark_model"]}, "onnx='/x/benchmark_model' runs files of tflite"),
    ],
)
def test_programs_that_are_not_allowed(programs: dict[str, list[str]], message: str) -> None:
    for make in (Local, Adb, lambda **given: Ssh("board", **given)):
        with pytest.raises(ValueError, match=message):
            make(programs=programs)
