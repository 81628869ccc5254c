"""An SSH server on this machine, what it leads to, and a look at what was left there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_edge.devices import Ssh


@dataclass
class Server:
    """An SSH server: where its keys are, and the process of it."""

    folder: Path
    place: Path
    port: int
    process: subprocess.Popen[bytes]

    def device(self, **settings: Any) -> Ssh:
        """The device that it leads to, whose Python is that of the tests."""
        given = {
            "host": "127.0.0.1",
            "user": os.environ.get("USER") or subprocess.check_output(["id", "-un"], text=True).strip(),
            "port": self.port,
            "known_hosts": str(self.folder / "known_hosts"),
            "key": str(self.folder / "client"),
            "python": sys.executable,
            "folder": str(self.place),
            "connect_limit_s": 10.0,
        }
        return Ssh(**{**given, **settings})


def key(path: Path, kind: str = "ed25519") -> str:
    """Make a key, and give its public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path)], check=True, stdin=subprocess.DEVNULL)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Whether a server answers before it ends or ten seconds are over."""
    until = time.monotonic() + 10
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.02)
    return False


def is_runner(pid: int | str) -> bool:
    """Whether a process is a runner that has not ended."""
    try:
        return b"['lightning_edge.devices.runner'].main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def left_over(place: Path) -> tuple[set[Path], set[str]]:
    """Folders in a place, and runners that were told of it: other tests run beside these."""
    found = set()
    for process in filter(is_runner, (entry.name for entry in Path("/proc").glob("[0-9]*"))):
        try:
            told = [(Path("/proc") / process / name).read_bytes() for name in ("cmdline", "environ")]
        except OSError:
            continue
        if any(str(place).encode() in text for text in told):
            found.add(process)
    return {*place.glob("lightning-edge-*")}, found
