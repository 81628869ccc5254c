"""Files on a device that a real SSH server leads to: values, times, and all that can go wrong on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from boards import Server, free_port, is_runner, key, left_over
from deployables import batches

from lightning_edge.devices import Device, Local, Ssh
from lightning_edge.devices.conversation import Conversation
from lightning_edge.devices.remote import RemoteRunner
from lightning_edge.errors import DeviceError, MissingExtraError, RunnerError
from lightning_edge.exporters import Artifact

SAMPLE = batches("residual")[0].sample()
# A LiteRT that has one input and output of one float, and does something at each call.
FAKE = """
import os, signal, time
import numpy
__version__ = "0"
class Interpreter:
    def __init__(self, model_path, num_threads): pass
    def allocate_tensors(self): pass
    def get_input_details(self): return [{{"index": 0}}]
    def get_output_details(self): return [{{"index": 1}}]
    def set_tensor(self, index, array): pass
    def get_tensor(self, index): return numpy.zeros((1, 5), "int8")
    def invoke(self):
        {action}
"""


def fake(python: Callable[..., str], action: str) -> str:
    """A Python whose LiteRT does this at each call."""
    return python({"ai_edge_litert/__init__.py": "", "ai_edge_litert/interpreter.py": FAKE.format(action=action)})


def opened(device: Device, artifact: Artifact, time_limit_s: float = 20.0) -> RemoteRunner:
    return RemoteRunner("board", device, artifact.target, artifact.path, artifact.contents, 1, time_limit_s)


@pytest.mark.parametrize("target", ["tflite", "onnx"])
def test_values_are_those_of_the_runner_here_to_the_last_bit(
    server: Server, files: dict[str, Artifact], target: str
) -> None:
    artifact = files[target]
    with opened(server.device(), artifact) as runner:
        assert runner.inputs == artifact.runner.inputs
        for batch in batches("residual"):
            for at in range(batch.batch_size):
                sample = artifact.ready(batch.sample(at).tensors)
                (here,), (there,) = artifact.runner(sample), runner(sample)
                assert there.dtype == here.dtype
                assert torch.equal(there, here)
        assert runner.load_ms > 0
        assert runner.runtime.split(",")[0] == artifact.runner.runtime.split(",")[0]


def test_calls_are_timed_on_the_device_as_often_as_asked_or_until_the_time_is_over(
    server: Server, files: dict[str, Artifact]
) -> None:
    artifact = files["tflite"]
    with opened(server.device(), artifact) as runner:
        times = runner.times(SAMPLE.tensors, 25)
        assert len(times.ns) == 25
        assert min(times.ns) > 0
        assert 1 <= len(runner.times(SAMPLE.tensors, 10**6, seconds=0.05).ns) < 10**6
        peak = runner.peak_memory_bytes()
        assert peak is not None
        assert peak > 2**20
        assert runner.about.machine == os.uname().machine
        assert runner.about.cores
        assert runner.about.missing == ()


def test_a_fingerprint_takes_the_place_of_known_hosts(server: Server) -> None:
    shown = subprocess.check_output(["ssh-keygen", "-lf", server.folder / "host.pub"], text=True).split()[1]
    with Conversation("board", server.device(known_hosts=None, fingerprint=shown)) as asked:
        assert asked.about.python
    wrong = "SHA256:" + "A" * 43
    with pytest.raises(DeviceError, match=r"board: 127.0.0.1 shows the host key ssh-ed25519 SHA256:\S+, not fing") as e:
        Conversation("board", server.device(known_hosts=None, fingerprint=wrong))
    assert shown in str(e.value)


def test_an_unknown_host_key_is_refused_and_shown(server: Server, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(DeviceError, match=r"the host key of 127.0.0.1 is not known: it shows .* Log in once by ssh"):
        Conversation("board", server.device(known_hosts=str(tmp_path / "empty")))


def test_a_wrong_host_key_is_refused_as_a_changed_one(server: Server, tmp_path: Path) -> None:
    (tmp_path / "other").write_text(f"[127.0.0.1]:{server.port} {key(tmp_path / 'key')}\n")
    with pytest.raises(DeviceError, match=r"and .*other has another for it: it was set up anew, or something else"):
        Conversation("board", server.device(known_hosts=str(tmp_path / "other")))
    (tmp_path / "kind").write_text(f"[127.0.0.1]:{server.port} {key(tmp_path / 'ecdsa', 'ecdsa')}\n")
    with pytest.raises(DeviceError, match=r"whether it still has a host key of the kind that .*kind has for it"):
        Conversation("board", server.device(known_hosts=str(tmp_path / "kind")))


def test_a_file_of_host_keys_that_is_none(server: Server, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"@nonsense 127.0.0.1 ssh-ed25519 AAAA\n")
    with pytest.raises(DeviceError, match=r"board: what is known of 127.0.0.1 cannot be read: .*broken"):
        Conversation("board", server.device(known_hosts=str(tmp_path / "broken")))


def test_a_key_that_is_not_let_in(server: Server) -> None:
    with pytest.raises(
        DeviceError, match=r"did not let \S+ in by the key .*stranger. Add its public half .*ssh-copy-id"
    ):
        Conversation("board", server.device(key=str(server.folder / "stranger")))


def test_a_key_with_a_passphrase_and_one_that_is_none(server: Server, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", locked], check=True)
    with pytest.raises(DeviceError, match=r"locked cannot be read: .*ssh-add"):
        Conversation("board", server.device(key=str(locked)))
    (tmp_path / "none").write_text("no key")
    with pytest.raises(DeviceError, match="none cannot be read"):
        Conversation("board", server.device(key=str(tmp_path / "none")))
    with pytest.raises(DeviceError, match="key='missing' is no file"):
        Conversation("board", server.device(key="missing"))


def test_a_port_that_nobody_listens_on(server: Server) -> None:
    with pytest.raises(DeviceError, match=r"^board: 127.0.0.1 port \d+ refused the connection. Start the SSH server"):
        Conversation("board", server.device(port=free_port()))


def test_a_host_that_there_is_not(server: Server) -> None:
    with pytest.raises(DeviceError, match=r"there is no host 'no-such-device.invalid'"):
        Conversation("board", server.device(host="no-such-device.invalid"))


def test_a_server_that_says_nothing_and_one_that_is_none(server: Server) -> None:
    import socket
    import threading

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(DeviceError, match=r"did not answer within 0.5 s. Look whether the device is on"):
            Conversation("board", server.device(port=silent.getsockname()[1], connect_limit_s=0.5))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def answer() -> None:
            connection, _ = other.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 500)
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DeviceError, match=r"broke off before it let us in.*Look whether that is an SSH server"):
            Conversation("board", server.device(port=other.getsockname()[1]))
        thread.join()


def test_a_device_without_python(server: Server) -> None:
    with pytest.raises(
        DeviceError, match=r"there is no /no/python3 \(.*\). Install Python 3.9 or later there, or give"
    ):
        Conversation("board", server.device(python="/no/python3"))


def test_a_python_that_ends_at_once(server: Server, python: Callable[..., str]) -> None:
    with pytest.raises(DeviceError, match=r"ended with status 3 before the runner began \(too old\)"):
        Conversation("board", server.device(python=python(before="echo too old >&2; exit 3")))


def test_what_a_shell_says_first_is_read_over(server: Server, python: Callable[..., str]) -> None:
    with Conversation("board", server.device(python=python(before="echo welcome"))) as asked:
        assert asked.about.python


def test_a_shell_that_never_stops_talking(server: Server, python: Callable[..., str]) -> None:
    with pytest.raises(DeviceError, match=r"began with 819. bytes of something else"):
        Conversation("board", server.device(python=python(before="head -c 200000 /dev/zero")))


@pytest.mark.parametrize(
    ("target", "module", "package"),
    [("tflite", "ai_edge_litert", "ai-edge-litert"), ("onnx", "onnxruntime", "onnxruntime")],
)
def test_a_missing_runtime_says_how_to_install_it(
    server: Server,
    files: dict[str, Artifact],
    python: Callable[..., str],
    target: str,
    module: str,
    package: str,
) -> None:
    without = python({f"{module}.py": f'raise ModuleNotFoundError("No module", name={module!r})'})
    with pytest.raises(
        RunnerError, match=rf"^board: its Python has no {module}. Install .*python -m pip install {package}$"
    ):
        opened(server.device(python=without), files[target])


def test_a_file_that_the_runtime_refuses(server: Server, files: dict[str, Artifact], tmp_path: Path) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(files["onnx"].path.read_bytes()[:100])
    with pytest.raises(RunnerError, match=r"^board: .*\(while it loaded the file\)$"):
        RemoteRunner("board", server.device(), "onnx", cut, files["onnx"].contents, 1, 20.0)


def test_a_runtime_that_hangs_is_ended_by_the_device(
    server: Server, files: dict[str, Artifact], python: Callable[..., str]
) -> None:
    hanging = fake(python, "time.sleep(600)")
    with (
        opened(server.device(python=hanging), files["tflite"], time_limit_s=0.5) as runner,
        pytest.raises(
            RunnerError, match=r"did not answer within time_limit_s=0.5 while it ran a sample, and was ended"
        ),
    ):
        runner(SAMPLE.tensors)


def test_leaving_in_the_middle_ends_what_hangs(
    server: Server, files: dict[str, Artifact], python: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_edge.devices.conversation.WAY_S", 0.5)
    deaf = fake(python, "signal.setitimer(signal.ITIMER_REAL, 0); time.sleep(600)")
    with (
        opened(server.device(python=deaf), files["tflite"], time_limit_s=0.5) as runner,
        pytest.raises(RunnerError, match="board did not answer within 1 s while it ran a sample"),
    ):
        runner(SAMPLE.tensors)


@pytest.mark.parametrize("by", ["ssh", "pipes"])
def test_processes_that_do_not_end_by_themselves_are_killed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what is killed leaves its folder behind
    monkeypatch.setattr(f"lightning_edge.devices.{by}._LAST_BREATH_S", 0.5)
    device = server.device(folder=str(tmp_path)) if by == "ssh" else Local(folder=str(tmp_path))
    asked = Conversation("board", device)
    assert len(asked._pids) == 2
    assert all(map(is_runner, asked._pids))
    for pid in asked._pids:
        os.kill(pid, signal.SIGSTOP)
    asked.close()
    until = time.monotonic() + 5
    while time.monotonic() < until and any(map(is_runner, asked._pids)):
        time.sleep(0.05)
    assert not any(map(is_runner, asked._pids))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the runtime crashed .SIGSEGV. while it ran a sample"),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)",
            "was killed while it ran a sample: the device may have been out of mem",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "raise MemoryError",
            "board ran out of memory while it ran a sample. Free some there",
            marks=pytest.mark.slow,
        ),
        ("raise RuntimeError('no such kernel')", "board: no such kernel .while it ran a sample"),
        ("print('words'); os._exit(7)", "ended with status 7 while it ran a sample"),
    ],
)
def test_a_runtime_that_fails(
    server: Server, files: dict[str, Artifact], python: Callable[..., str], action: str, message: str
) -> None:
    with (
        opened(server.device(python=fake(python, action)), files["tflite"]) as runner,
        pytest.raises(RunnerError, match=message),
    ):
        runner(SAMPLE.tensors)


def test_what_a_runtime_prints_is_no_answer(
    server: Server, files: dict[str, Artifact], python: Callable[..., str]
) -> None:
    loud = fake(python, "print('INFO: ' * 1000); os.write(1, b'more' * 1000)")
    with opened(server.device(python=loud), files["tflite"]) as runner:
        assert runner(SAMPLE.tensors)[0].shape == (1, 5)


def test_a_connection_that_is_cut_in_the_middle(server: Server, files: dict[str, Artifact]) -> None:
    sessions = subprocess.check_output(["ps", "-e", "-o", "pid=,ppid="], text=True)
    before = {int(line.split()[0]) for line in sessions.splitlines() if int(line.split()[1]) == server.process.pid}
    runner = opened(server.device(), files["tflite"])
    assert left_over(server.place)[1]
    sessions = subprocess.check_output(["ps", "-e", "-o", "pid=,ppid="], text=True)
    after = {int(line.split()[0]) for line in sessions.splitlines() if int(line.split()[1]) == server.process.pid}
    (session,) = after - before
    os.kill(session, signal.SIGKILL)
    with pytest.raises(RunnerError, match=r"board: the connection was lost while it ran a sample: .* is kept"):
        runner(SAMPLE.tensors)
    with pytest.raises(RunnerError, match="board: the connection was lost"):
        runner(SAMPLE.tensors)
    runner.close()


def test_a_disk_that_is_full(server: Server, files: dict[str, Artifact], python: Callable[..., str]) -> None:
    small = python(before="ulimit -f 1")  # the system refuses more, as a full disk does
    with pytest.raises(RunnerError, match=r"^board: the disk is full while a file was sent \(.*folder=\.\.\."):
        opened(server.device(python=small), files["tflite"])


def test_a_folder_that_there_is_not(server: Server) -> None:
    with pytest.raises(
        DeviceError, match=r"board: .*No such file or directory.*/no/folder.* \(a folder could not be made"
    ):
        Conversation("board", server.device(folder="/no/folder"))


def test_the_folder_and_the_arguments_are_never_a_line_for_a_shell(server: Server, tmp_path: Path) -> None:
    odd = tmp_path / "a folder; touch $(id)' \"x"
    odd.mkdir()
    with Conversation("board", server.device(folder=str(odd))):
        assert [place.name.startswith("lightning-edge-") for place in odd.iterdir()] == [True]
    assert list(odd.iterdir()) == []


def test_asyncssh_that_is_not_installed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_edge.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'asyncssh' is not installed. .*lightning-edge\[ssh\]"):
        server.device().start(["true"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "pi@raspberrypi:22"}, "user=... and port=... beside it"),
        ({"host": "-oProxyCommand=x"}, "give the name or address"),
        ({"host": ""}, "give the name or address"),
        ({"port": 0}, "from 1 to 65535"),
        ({"port": "22"}, "from 1 to 65535"),
        ({"fingerprint": "MD5:00"}, "give SHA256: and 43 characters"),
        ({"fingerprint": "SHA256:" + "A" * 43, "known_hosts": "x"}, "give one of them"),
        ({"python": ""}, "path of the device's Python"),
        ({"connect_limit_s": 0}, "more than 0 seconds"),
    ],
)
def test_settings_that_are_not_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ssh(**{"host": "board", **settings})


def test_a_program_may_stand_before_a_local_python(tmp_path: Path) -> None:
    device = Local(["env", "HOME=/nowhere", sys.executable], {"SECOND": "2"}, folder=str(tmp_path))
    with Conversation("board", device) as asked:
        found = dict.fromkeys(Path(f"/proc/{asked._pids[1]}/environ").read_bytes().decode().split("\0"))
        assert {"HOME=/nowhere", "SECOND=2"} <= found.keys()
        assert len(list(tmp_path.iterdir())) == 1


def test_a_local_python_that_there_is_not() -> None:
    with pytest.raises(DeviceError, match="board: /no/python cannot be started: No such file"):
        Conversation("board", Local("/no/python"))
    with pytest.raises(ValueError, match="give the path of a Python"):
        Local([""])
