"""`Local`: this machine as a device."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import final

from lightning_edge.devices.device import Channel, Device
from lightning_edge.devices.meter import check_meter
from lightning_edge.devices.pipes import Pipes
from lightning_edge.devices.programs import programs_of
from lightning_edge.errors import DeviceError


@final
class Local(Device):
    """This machine, through the same runner as any other device.

    Args:
        python: The Python to run files with, and what stands before its own arguments; the one that runs this if not
            given.
        environment: Variables of its environment beside those of this process.
        folder: Folder for what is written; that of temporary files if not given.
        meter: A program of this machine that prints how many joules the device has taken so far, as one number, and its
            arguments, for ``measure: [energy]``.
        programs: By target a runtime's own benchmark program on the device, and arguments for it: ``benchmark_model``
            for ``tflite``, ``executor_runner`` for ``executorch``, ``trtexec`` for ``onnx``. It runs the files of that
            target in place of Python, and gives times only.

    Raises:
        ValueError: If ``python`` or ``meter`` names nothing.
    """

    def __init__(
        self,
        python: Sequence[str] | str | None = None,
        environment: Mapping[str, str] | None = None,
        folder: str | None = None,
        meter: Sequence[str] | None = None,
        programs: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        given = [python] if isinstance(python, str) else list(python or [sys.executable])
        if not all(given):
            raise ValueError(
                f"Local(python={python!r}): give the path of a Python, or a list that begins with a program"
            )
        self.python = given
        self.environment = dict(environment or {})
        self.folder = folder
        self.meter = check_meter(meter)
        self.programs = programs_of(programs)

    @property
    def label(self) -> str:
        """``local``."""
        return "local"

    def start(self, command: Sequence[str]) -> Channel:
        """Start a program in a process of its own.

        Raises:
            DeviceError: If there is no such program.
        """
        try:
            return Pipes(command, self.environment)
        except OSError as error:
            raise DeviceError(
                f"{command[0]} cannot be started: {error.strerror}. Give the path of a Python with python=..."
            ) from error
