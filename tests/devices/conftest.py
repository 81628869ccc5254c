"""A real SSH server on this machine, and two small files to run on what it leads to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from boards import Server, free_port, key, left_over, wait_for
from deployables import exported, network

from lightning_edge.exporters import Artifact

SSHD = Path("/usr/sbin/sshd")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs while these tests do."""
    pytest.importorskip("asyncssh")
    if not SSHD.exists() or shutil.which("ssh-keygen") is None:
        pytest.skip(f"there is no OpenSSH server here: {SSHD}")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    folder, port = tmp_path_factory.mktemp("sshd"), free_port()
    host_key, client_key = key(folder / "host"), key(folder / "client")
    key(folder / "stranger")
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    (folder / "authorized_keys").write_text(client_key + "\n")
    (folder / "authorized_keys").chmod(0o600)
    (folder / "config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder / 'host'}\nPidFile {folder / 'pid'}\n"
        f"AuthorizedKeysFile {folder / 'authorized_keys'}\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\nMaxStartups 100\n"
    )
    log = (folder / "log").open("wb")
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "config"], stderr=log, stdin=subprocess.DEVNULL)
    try:
        if not wait_for(port, process):
            pytest.skip("the OpenSSH server here does not start")
        yield Server(folder, port, process)
    finally:
        process.terminate()
        process.wait()
        log.close()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The int8 file of a small network for each target that runs on devices, with its runner on this machine."""
    for module in ("litert_torch", "onnxruntime"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("files")
    paths = {"tflite": folder / "model.tflite", "onnx": folder / "model.onnx"}
    return {target: exported(network("residual", "int8"), target, path)[0] for target, path in paths.items()}


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., str]:
    """Makes a Python that finds these modules first, by name with their text, and a shell that does this before it."""

    def make(modules: dict[str, str] | None = None, before: str = "") -> str:
        place = tmp_path / "modules"
        for name, text in (modules or {}).items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\n{before}\nexport PYTHONPATH={place}\nexec {sys.executable} "$@"\n')
        script.chmod(0o755)
        return str(script)

    return make


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process and no folder of a runner outlives a test."""
    before = left_over()
    yield
    until = time.monotonic() + 10
    while time.monotonic() < until and left_over() != before:
        time.sleep(0.05)
    assert left_over() == before
