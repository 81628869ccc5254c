"""Files of unknown origin: what is no file does not hang `load`, and what is too much for it is refused at once."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faulty_target import Faulty

from lightning_edge import RunnerError, load
from lightning_edge.contents import Contents
from lightning_edge.exporters import TARGETS, contents_of
from lightning_edge.exporters.run.time_limit import within


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


def folder(path: Path) -> None:
    path.mkdir()


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**31)


def zeros(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**31 - 1)


@pytest.mark.parametrize("suffix", [".pte", ".tflite", ".onnx"])
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (pipe, r"is a named pipe; a \.\w+ is a file"),
        (device, r"is a device; a \.\w+ is a file"),
        (listening, r"is a socket; a \.\w+ is a file"),
        (folder, r"is a folder; a \.\w+ is a file"),
        (sparse, r"has 2,147,483,648 bytes or more; 2,147,483,647 are allowed"),
        (zeros, r"is no \.\w+ file: it does not begin as one"),
    ],
)
def test_what_only_has_the_name_of_a_file_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, make: Callable[[Path], None], told: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    path = Path(f"m{suffix}")
    make(path)
    for read in (load, contents_of):
        with pytest.raises(RunnerError, match=told):
            read(path)


@pytest.mark.parametrize("place", ["Manifest.json", "Data/com.apple.CoreML/weights/weight.bin"])
def test_a_package_holds_files_only(tmp_path: Path, place: str) -> None:
    path = tmp_path / "m.mlpackage" / place
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(RunnerError, match=r"(Manifest\.json|weight\.bin) is a named pipe and not a file"):
        load(tmp_path / "m.mlpackage")


def test_a_package_that_holds_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.mlpackage"
    path.mkdir()
    (path / "Data").symlink_to(path)
    with pytest.raises(RunnerError, match=r"Data is a link to a folder that it lies in"):
        load(path)
    (tmp_path / "n.mlpackage").write_bytes(b"")
    with pytest.raises(RunnerError, match=r"n\.mlpackage is a file; a \.mlpackage is a folder"):
        load(tmp_path / "n.mlpackage")


class Endless(Faulty):
    """A target whose files take forever to be read."""

    suffix = ".endless"

    def inspect(self, path: Path) -> Contents:
        while True:
            time.sleep(0.001)


TARGET = Endless()


@pytest.mark.parametrize("isolated", [True, False])
def test_the_time_limit_is_one_of_reading_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated: bool) -> None:
    monkeypatch.setitem(TARGETS, "endless", __name__)
    path = tmp_path / "m.endless"
    path.write_text("")
    with pytest.raises(RunnerError, match=r"m\.endless was not read within time_limit_s=0\.2"):
        load(path, isolated=isolated, time_limit_s=0.2)
    with pytest.raises(RunnerError, match="was not read within"):
        contents_of(path, time_limit_s=0.2)
    deadline = time.monotonic() + 30
    while any("reading a file" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread goes on"
        time.sleep(0.01)


def test_work_within_a_time_limit_gives_what_it_gives_and_raises_what_it_raises() -> None:
    assert within(10, lambda: torch.ones(2).sum().item()) == 2
    with pytest.raises(ZeroDivisionError):
        within(10, lambda: 1 // 0)
    with pytest.raises(ValueError, match="time_limit_s=0 is not allowed"):
        contents_of("m.pte", time_limit_s=0)
