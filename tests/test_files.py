"""Files appear whole or not at all, whatever ends the run: an error, Ctrl-C once or twice, SIGTERM, SIGKILL."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_edge.errors import EdgeError, ExportError
from lightning_edge.files import StagedPath, replace_text
from lightning_edge.interrupts import undisturbed, unwinding
from lightning_edge.locks import Lock
from lightning_edge.one_run import NAME, only_run

# Writes beside a file and says so; then does what it is told.
SCRIPT = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run behind a shell, which has it ignored there
from lightning_edge.files import StagedPath
from lightning_edge.interrupts import unwinding
from lightning_edge.one_run import only_run

folder = Path(sys.argv[1])
with unwinding(), only_run(folder):
    place = StagedPath(folder / "sub" / "m.bin")
    try:
        for number in range(300):
            (place.staged.parent / str(number)).write_bytes(bytes(1000))
        place.staged.write_bytes(bytes(100_000))
        print("written", flush=True)
        time.sleep(600)
    finally:
        print("clean-up", flush=True)
        place.discard()
"""


def start(folder: Path, script: str = SCRIPT) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n", process.communicate()
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_sigterm_leaves_nothing_and_ends_by_the_signal(tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    process.terminate()
    assert process.wait(20) == -signal.SIGTERM
    assert names(tmp_path) == []


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_end_the_clean_up_after_the_first(tmp_path: Path, second: int) -> None:
    process = start(tmp_path / "out")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "clean-up\n"
    for _ in range(5):
        process.send_signal(second)
        time.sleep(0.0005)
    assert process.wait(20) in (-signal.SIGTERM, -signal.SIGINT)
    assert names(tmp_path) == []


class Interrupted:
    """Something that is deleted at the moment of a Ctrl-C: Python lets no exception out of there."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def _work(seconds: float) -> None:
    with unwinding():
        Interrupted()
        time.sleep(seconds)


@pytest.mark.parametrize("work_s", [0.0, 20.0])
def test_a_signal_that_python_loses_comes_again(work_s: float) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    hook, begun_s = sys.unraisablehook, time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            _work(work_s)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun_s < 10
    assert sys.unraisablehook is hook


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    process = start(tmp_path)
    process.kill()
    process.wait()
    (left,) = (tmp_path / "sub").iterdir()
    assert left.name.startswith(".staging-")
    with only_run(tmp_path):  # the lock of the folder went with the run
        replace_text(tmp_path / "sub" / "m.txt", "new")
    assert names(tmp_path) == ["sub", "sub/m.txt"]


def test_what_a_living_run_writes_is_left_alone(tmp_path: Path) -> None:
    process = start(tmp_path)
    try:
        before = names(tmp_path)
        place = StagedPath(tmp_path / "sub" / "m.txt")
        other = StagedPath(tmp_path / "sub" / "n.txt")
        place.discard()
        other.staged.write_text("n")
        other.accept()
        assert sorted({*names(tmp_path)} - {"sub/n.txt"}) == before
    finally:
        process.terminate()
        process.wait()
    assert names(tmp_path) == ["sub", "sub/n.txt"]


def test_what_is_not_ours_is_not_swept(tmp_path: Path) -> None:
    for name in ("file", "folder"):
        (tmp_path / f".staging-{name}").mkdir()
        (tmp_path / f".staging-{name}" / name).write_text("")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".lightning-edge.alive").write_text("")
    (tmp_path / ".staging-link").symlink_to(outside)
    before = names(tmp_path)
    replace_text(tmp_path / "m.txt", "m")
    assert names(tmp_path) == sorted([*before, "m.txt"])


def test_a_folder_that_a_killed_run_had_set_aside_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "m.mlpackage"
    path.mkdir()
    (path / "old").write_text("old")
    place = StagedPath(path)
    place.staged.mkdir()
    os.rename(path, place.staged.parent / "old")  # the first half of what accept() does
    place._lock.release()  # as the system does with a process that is killed
    (place.staged.parent / ".lightning-edge.alive").write_text("")
    StagedPath(path).discard()
    assert names(tmp_path) == ["m.mlpackage", "m.mlpackage/old"]


def test_a_signal_while_a_folder_is_replaced_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.mlpackage"
    path.mkdir()
    place = StagedPath(path)
    place.staged.mkdir()
    (place.staged / "new").write_text("")
    rename = os.rename

    def interrupted(source: Path, goal: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        rename(source, goal)

    monkeypatch.setattr(os, "rename", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            place.accept()
    finally:
        signal.signal(signal.SIGINT, before)
    assert names(tmp_path) == ["m.mlpackage", "m.mlpackage/new"]


def test_parents_that_were_made_go_with_what_was_not_accepted(tmp_path: Path) -> None:
    place = StagedPath(tmp_path / "a" / "b" / "m.bin")
    place.discard()
    place.discard()
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="a part of its path is a file"):
        StagedPath(tmp_path / "file" / "a" / "m.bin")


# One run at a time


def test_two_runs_into_one_folder_are_told_apart(tmp_path: Path) -> None:
    process = start(tmp_path)
    try:
        with (
            pytest.raises(EdgeError, match=rf"another run exports into '{tmp_path}'"),
            only_run(tmp_path),
        ):
            pytest.fail("both ran")
        with only_run(tmp_path / "sub" / "other"):
            pass
    finally:
        process.terminate()
        process.wait()
    with only_run(tmp_path):
        assert (tmp_path / NAME).exists()
        with pytest.raises(EdgeError, match="another run"), only_run(tmp_path):  # of this process, too
            pytest.fail("both ran")
    assert names(tmp_path) == []


def test_a_run_that_fails_lets_the_folder_go_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), only_run(tmp_path / "new" / "folder"):
        raise ZeroDivisionError
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"), only_run(tmp_path / "file"):
        pytest.fail("it ran")


def test_of_many_at_once_one_has_the_lock(tmp_path: Path) -> None:
    inside, most, taken = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, taken
        for _ in range(200):
            lock = Lock.take(tmp_path / "lock")
            if lock is None:
                continue
            with guard:
                inside, taken = inside + 1, taken + 1
                most = max(most, inside)
            with guard:
                inside -= 1
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert taken > 0
    assert names(tmp_path) == []


def test_a_lock_is_not_held_by_processes_that_were_forked_meanwhile(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom lightning_edge.one_run import only_run\n"
        "with only_run(Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n        time.sleep(20)\n        os._exit(0)\n"
        "print('written', flush=True)\ntime.sleep(600)\n"
    )
    process = start(tmp_path, script)
    try:
        with only_run(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_child_that_was_given_a_lock_holds_it_on(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = Lock.take(path)
    assert lock is not None
    child = subprocess.Popen(["sleep", "60"], pass_fds=(lock.fileno(),))
    try:
        lock.close()
        lock.close()
        with pytest.raises(ValueError, match="was released"):
            lock.fileno()
        assert Lock.take(path) is None
    finally:
        child.kill()
        child.wait()
    again = Lock.take(path, make=False)  # the file stayed
    assert again is not None
    again.release()
    assert names(tmp_path) == []


def test_a_lock_is_waited_for_and_is_that_of_the_file_that_is_there(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []
    first = Lock.take(path)
    assert first is not None

    def wait() -> None:
        lock = Lock.take(path, wait=True)
        assert lock is not None
        order.append("second")
        lock.release()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.05)
    order.append("first")
    first.release()  # removes the file that the other one has open
    thread.join(20)
    assert order == ["first", "second"]
    assert names(tmp_path) == []


@pytest.mark.parametrize("needed", [False, True])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: bool) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    if needed:
        with pytest.raises(OSError, match="No locks"):
            Lock.take(tmp_path / "lock", needed=True)
    else:
        lock = Lock.take(tmp_path / "lock")
        assert lock is not None
        lock.release()
        assert names(tmp_path) == []


# Signals


def test_handlers_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def users(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, users)
    try:
        with unwinding():
            assert signal.getsignal(signal.SIGTERM) is users
            with undisturbed():
                assert signal.getsignal(signal.SIGTERM) is not users
        assert signal.getsignal(signal.SIGTERM) is users
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("context", [unwinding, undisturbed])
def test_other_threads_set_no_handlers(context: Callable[[], object]) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with context():  # type: ignore[attr-defined]
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
