"""What a device may answer and what is refused: from a device that says what a test gives it."""

from __future__ import annotations

import ast
import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, final

import numpy
import pytest
import torch

from lightning_edge.contents import Contents, Endpoint
from lightning_edge.devices import Channel, Device, Farewell, runner, runtimes, sensors
from lightning_edge.devices.conversation import Conversation
from lightning_edge.devices.remote import RemoteRunner
from lightning_edge.errors import DeviceError, RunnerError

OUTPUT = Endpoint("scores", (1, 3), "int8", 0.5, -1)
CONTENTS = Contents(1, 0, {}, inputs=(Endpoint("image", (1, 2), "int8", 0.25, 3),), outputs=(OUTPUT,))
SAMPLE = [torch.tensor([[0.5, -0.3]])]
HELLO = runner.GREETING + runner.pack({"pids": [4, 5], "about": {"machine": "aarch64", "cores": 4}})
LOADED = runner.pack({}) + runner.pack({"runtime": "LiteRT 9", "load_ms": 2.5})


@final
class Scripted(Device, Channel):
    """Answers with these bytes, whatever it is asked."""

    def __init__(self, answers: bytes, farewell: Farewell | None = None) -> None:
        self.answers = io.BytesIO(answers)
        self.written: list[bytes] = []
        self.farewell = farewell or Farewell(0)
        self.pids: list[int] = []

    @property
    def label(self) -> str:
        return "scripted"

    def start(self, command: Sequence[str]) -> Channel:
        return self

    def write(self, data: bytes, limit_s: float) -> None:
        self.written.append(data)

    def read(self, count: int, limit_s: float) -> bytes:
        assert count < 2**24, "room was made for what nobody believes"
        found = self.answers.read(count)
        if len(found) < count:
            raise EOFError
        return found

    def close(self, pids: Sequence[int] = ()) -> Farewell:
        self.pids = list(pids)
        return self.farewell


def frame(header: Any, rest: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "m.tflite").write_bytes(b"file")
    return tmp_path / "m.tflite"


def opened(answers: bytes, path: Path) -> RemoteRunner:
    return RemoteRunner("board", Scripted(HELLO + LOADED + answers), "tflite", path, CONTENTS, 1, 5.0)


def test_an_answer_is_made_real_by_the_scales_of_the_file(path: Path) -> None:
    device = Scripted(HELLO + LOADED + runner.pack({"ns": 1500}, [numpy.array([[1, -1, 5]], "int8")]))
    (scores,) = RemoteRunner("board", device, "tflite", path, CONTENTS, 1, 5.0)(SAMPLE)
    assert scores.tolist() == [[1.0, 0.0, 3.0]]
    message, (sent,) = runner.unpack(io.BytesIO(device.written[-1]).read, 100)
    assert message == {"do": "run"}
    assert sent.tolist() == [[5, 2]]
    assert sent.dtype == numpy.int8


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            runner.pack({}, [numpy.zeros((1, 2), "int8")]),
            r"an output int8\[1, 2\], where the file declares int8\[1, 3\]",
        ),
        (runner.pack({}, [numpy.zeros((3,), "int8")]), r"an output int8\[3\], where the file"),
        (runner.pack({}, [numpy.zeros((1, 3), "uint8")]), r"an output uint8\[1, 3\]"),
        (runner.pack({}), "0 outputs, where the file has 1"),
        (runner.pack({}, [numpy.zeros((1, 1), "int8")] * 2), "2 outputs, where the file has 1"),
        (runner.pack({}, [numpy.zeros((1, 3), "int8")]), "ns=None"),
        (runner.pack({"ns": -1}, [numpy.zeros((1, 3), "int8")]), "ns=-1"),
        (runner.pack({"ns": 10**12}, [numpy.zeros((1, 3), "int8")]), "ns=1000000000000"),
        (runner.pack({}, [numpy.zeros((1, 3), "float32")]), "arrays of 12 bytes, where 3 are the most"),
        (frame({"arrays": [["int8", [2**40]]]}), "arrays of 1099511627776 bytes, where 3 are the most"),
        (frame({"arrays": [["int8", [10**30, 10**30]]]}), "arrays of 10"),
        (frame({"arrays": [["int8", [-1, 3]]]}), "an array of type and shape"),
        (frame({"arrays": [["object", [1]]]}), "an array of type and shape"),
        (frame({"arrays": [["int8", [1.0]]]}), "an array of type and shape"),
        (frame({"arrays": [["int8", [True]]]}), "an array of type and shape"),
        (frame({"arrays": [["int8", [1] * 17]]}), "an array of type and shape"),
        (frame({"arrays": [["int8"]]}), "an array of type and shape"),
        (frame({"arrays": 3}), "a message without a list of arrays"),
        (frame([]), "a message without a list of arrays"),
        (frame(b"no json"), "a message that is no JSON"),
        (frame(b"[" * 100_000), "a message that is no JSON"),
        (frame(b"\xff\xfe"), "a message that is no JSON"),
        (frame(b'{"arrays": [], "x": NaN}'), "a message that is no JSON .NaN is no number"),
        (struct.pack("<Q", 2**63), "a message of 9223372036854775808 bytes, where 1048576 are the most"),
        (
            runner.pack({"error": "failed", "text": "\x1b[31mred\n\n" * 99}),
            r": \[31mred \[31mred.*while it ran a sample",
        ),
        (frame({"error": 3, "text": [], "arrays": []}), ": it did not say why"),
        (runner.pack({"error": "missing", "module": 5}), "its Python has no a module"),
    ],
)
def test_an_answer_that_cannot_be_is_one_error(path: Path, answer: bytes, message: str) -> None:
    with pytest.raises(RunnerError, match=f"^board.*{message}") as error:
        opened(answer, path)(SAMPLE)
    assert len(str(error.value)) < 700
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (runner.pack({}, [numpy.array([-5], "int64")]), "times that cannot be: -5 to -5 ns"),
        (runner.pack({}, [numpy.array([10**18], "int64")]), "times that cannot be"),
        (runner.pack({}, [numpy.array([], "int64")]), "something else than a list of times"),
        (runner.pack({}, [numpy.array([numpy.nan])]), "something else than a list of times"),
        (runner.pack({}, [numpy.array([[1]], "int64")]), "something else than a list of times"),
        (runner.pack({}), "something else than a list of times"),
        (runner.pack({}, [numpy.array([5], "int64")]), "calls=None"),
        (runner.pack({"calls": 0}, [numpy.array([5], "int64")]), "calls=0"),
        (runner.pack({"calls": 6}, [numpy.array([5], "int64")]), "calls=6"),
        (runner.pack({}, [numpy.ones(99, "int64")]), "arrays of 792 bytes, where 40 are the most"),
    ],
)
def test_times_that_cannot_be_are_one_error(path: Path, answer: bytes, message: str) -> None:
    with pytest.raises(RunnerError, match=f"^board answered with {message}"):
        opened(answer, path).times(SAMPLE, 5)


def test_what_a_device_says_of_itself_is_taken_only_where_it_can_be(path: Path) -> None:
    state = {"temperature_c": "hot", "frequency_mhz": 10**400}
    about = {"machine": 3, "model": "a\nboard\x00 " + "x" * 999, "cores": "four", "features": "all", **state}
    times = runner.pack({"calls": 4, "before": 3, "after": {"temperature_c": 41.5}}, [numpy.array([7], "int64")])
    device = Scripted(runner.GREETING + frame({"pids": "all", "about": about, "arrays": []}) + LOADED + times)
    opened = RemoteRunner("board", device, "tflite", path, CONTENTS, 1, 5.0)
    assert opened.about.machine is None
    assert opened.about.model is not None
    assert len(opened.about.model) == 120
    assert opened.about.cores is None
    assert opened.about.features == ()
    assert opened.about.state.temperature_c is None
    assert opened.about.state.frequency_mhz is None
    found = opened.times(SAMPLE, 5)
    assert found.ns == [7]
    assert found.calls == 4
    assert found.before.temperature_c is None
    assert found.after.temperature_c == 41.5


@pytest.mark.parametrize("load_ms", ["1e999", "-1", "true", '"2"', "null"])
def test_a_load_time_that_is_none_is_refused(path: Path, load_ms: str) -> None:
    loaded = runner.pack({}) + frame(b'{"arrays": [], "load_ms": ' + load_ms.encode() + b"}")
    with pytest.raises(RunnerError, match=r"^board answered with load_ms="):
        RemoteRunner("board", Scripted(HELLO + loaded), "tflite", path, CONTENTS, 1, 5.0)


@pytest.mark.parametrize(
    ("began", "farewell", "message"),
    [
        (b"", Farewell(None, lost="reset"), "the connection broke off before the runner began: reset"),
        (b"", Farewell(127, "sh: python3: not found"), r"there is no python3 \(sh: python3: not found\)"),
        (b"", Farewell(1, "SyntaxError"), r"python3 ended with status 1 before the runner began \(SyntaxError\)"),
        (b"", Farewell(None), "python3 ended before the runner began"),
        (runner.GREETING + frame(b"{"), Farewell(0), "its runner began with a message that is no JSON"),
    ],
)
def test_a_runner_that_does_not_begin(began: bytes, farewell: Farewell, message: str) -> None:
    with pytest.raises(DeviceError, match=f"^board: {message}"):
        Conversation("board", Scripted(began, farewell))


def test_only_numbers_of_processes_are_killed() -> None:
    for pids, killed in (([4, 5], [4, 5]), ([1, 0, -1, True, "7", 8.5, 8], [8]), ("all", [])):
        device = Scripted(runner.GREETING + runner.pack({"pids": pids}))
        Conversation("board", device).close()
        assert device.pids == killed


def test_a_large_file_is_sent_in_parts_that_come_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_edge.devices.conversation._PART_BYTES", 4)
    device = Scripted(HELLO + runner.pack({}) * 3)
    Conversation("board", device).put("model.tflite", b"0123456789")
    sent = [runner.unpack(io.BytesIO(data).read, 100) for data in device.written[1:]]
    assert [message["more"] for message, _ in sent] == [False, True, True]
    assert b"".join(part.tobytes() for _, (part,) in sent) == b"0123456789"


@pytest.mark.parametrize("name", sorted(runner.ITEM_BYTES))
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (1, 0, 2)])
def test_arrays_of_every_type_and_shape_arrive_as_they_were(name: str, shape: tuple[int, ...]) -> None:
    given = (numpy.arange(int(numpy.prod(shape))) % 2).astype(name).reshape(shape)
    message, (found,) = runner.unpack(io.BytesIO(runner.pack({"do": "run"}, [given])).read, 1000)
    assert message == {"do": "run"}
    assert found.dtype == given.dtype
    assert found.shape == given.shape
    assert (found == given).all()
    assert given.itemsize == runner.ITEM_BYTES[name]


@pytest.mark.parametrize("module", [runner, runtimes, sensors])
def test_an_old_python_reads_what_is_sent(module: ModuleType) -> None:
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(), feature_version=(3, 9))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    sent = {f"lightning_edge.devices.{name}" for name in ("runtimes", "sensors")}
    assert {name for name in names if name.startswith(("lightning", "torch"))} <= sent


def test_sensors_are_read_where_the_system_has_them(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert sensors.sensors(str(tmp_path)) == {"temperature_c": None, "frequency_mhz": None}
    for zone, text in enumerate(["48250\n", "51000\n", "-274000\n", "none\n"]):
        write(f"sys/class/thermal/thermal_zone{zone}/temp", text)
    for core, text in enumerate(["600000\n", "1800000\n"]):
        write(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", text)
    write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "ondemand\n")
    write("proc/device-tree/model", "Some Board Rev 1.4\0")
    write("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\n")
    write("proc/meminfo", "MemTotal:        3884356 kB\nMemFree: 1 kB\n")
    about = sensors.about(str(tmp_path))
    assert about["temperature_c"] == 51.0
    assert about["frequency_mhz"] == 1800.0
    assert about["governor"] == "ondemand"
    assert about["model"] == "Some Board Rev 1.4"
    assert about["features"] == ["avx512_vnni"]
    assert about["memory_bytes"] == 3884356 * 1024
    assert about["cores"] >= 1
