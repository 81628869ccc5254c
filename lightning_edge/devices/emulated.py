"""`Emulated`: ARM64 Linux under QEMU's user-mode emulation. Its values count; how long it takes says nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import final

from lightning_edge.devices.device import Channel, Device
from lightning_edge.devices.pipes import Pipes
from lightning_edge.errors import DeviceError


@final
class Emulated(Device):
    """An ARM64 Python of a folder, run by ``qemu-aarch64-static``: what files compute on another instruction set.

    Latency and energy are not measured there. The docs say how such a folder is made.

    Args:
        root: Folder of an ARM64 Linux with a Python, and ``proc/cpuinfo`` of an ARM CPU: LiteRT and ONNX Runtime crash
            on that of the host.
        packages: Folder with NumPy and the runtimes, unpacked ``aarch64`` wheels; ``site`` in ``root`` if not given.
        python: The Python in ``root``.
        cpu: The CPU, as QEMU calls it; it must have what the wheels were built for.
        qemu: The program.
        folder: Folder for what is written; that of temporary files if not given.

    Raises:
        ValueError: If a setting is empty.
    """

    times = False

    def __init__(
        self,
        root: str,
        packages: str | None = None,
        python: str = "usr/bin/python3.11",
        cpu: str = "neoverse-n1",
        qemu: str = "qemu-aarch64-static",
        folder: str | None = None,
    ) -> None:
        for name, value in (("root", root), ("python", python), ("cpu", cpu), ("qemu", qemu)):
            if not value:
                raise ValueError(f"Emulated({name}={value!r}): it may not be empty")
        self.root = Path(root).expanduser().absolute()
        self.packages = self.root / "site" if packages is None else Path(packages).expanduser().absolute()
        self.qemu, self.folder = qemu, folder
        self._program = self.root / python
        self.python = [qemu, "-cpu", cpu, "-L", str(self.root), str(self._program)]

    @property
    def label(self) -> str:
        """``emulated``."""
        return "emulated"

    def check(self) -> None:
        """Look whether the emulator and the folder are there.

        Raises:
            DeviceError: If something is not.
        """
        if shutil.which(self.qemu) is None:
            raise DeviceError(
                f"there is no program {self.qemu!r}. Install QEMU's user-mode emulation (Debian: qemu-user-static), or "
                "give its path with qemu=..."
            )
        for what, path in (
            ("the Python", self._program),
            ("a description of an ARM CPU", self.root / "proc/cpuinfo"),
            ("packages", self.packages),
        ):
            if not path.exists():
                raise DeviceError(f"there is no {path}: {what} of the emulated machine. The docs on devices say how")

    def start(self, command: Sequence[str]) -> Channel:
        """Start a program in a process of its own.

        Raises:
            DeviceError: If the emulator or the folder is not there.
        """
        self.check()
        environment = {"PYTHONHOME": str(self.root / "usr"), "PYTHONPATH": str(self.packages)}
        try:
            return Pipes(command, environment)
        except OSError as error:
            raise DeviceError(f"{command[0]} cannot be started: {error.strerror}. Look at qemu=...") from error
