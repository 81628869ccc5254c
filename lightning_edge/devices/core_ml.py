"""`CoreML`: a Mac as a device, on the compute units that the user names. It was never run: no Mac was there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal, final, get_args

from lightning_edge.devices.device import Channel, Device
from lightning_edge.devices.meter import check_meter
from lightning_edge.devices.pipes import Pipes
from lightning_edge.errors import DeviceError

ComputeUnits = Literal["all", "cpu_only", "cpu_and_gpu", "cpu_and_ne"]


@final
class CoreML(Device):
    """This Mac, which runs ``.mlpackage`` files in Core ML on some of its compute units.

    Core ML's own plan tells which unit takes what share of the work.

    Args:
        compute_units: Those that Core ML may use: ``"cpu_and_ne"`` leaves out the GPU.
        python: A Python with coremltools and NumPy; the one that runs this if not given.
        folder: As for `Local`.
        meter: As for `Local`.

    Raises:
        ValueError: If a setting is not allowed.
    """

    runtimes = ("coreml",)

    def __init__(
        self,
        compute_units: ComputeUnits = "all",
        python: str | None = None,
        folder: str | None = None,
        meter: Sequence[str] | None = None,
    ) -> None:
        if compute_units not in get_args(ComputeUnits):
            raise ValueError(
                f"CoreML(compute_units={compute_units!r}): give one of {', '.join(get_args(ComputeUnits))}"
            )
        self.compute_units = compute_units
        self.session = {"compute_units": compute_units.upper()}
        self.python = [python or sys.executable]
        self.folder = folder
        self.meter = check_meter(meter)

    @property
    def label(self) -> str:
        """``mac``."""
        return "mac"

    def check(self) -> None:
        """Look whether this is a Mac.

        Raises:
            DeviceError: If it is none.
        """
        if sys.platform != "darwin":
            raise DeviceError("Core ML runs on macOS, and this is none. Leave the device out here")

    def start(self, command: Sequence[str]) -> Channel:
        """Start a program in a process of its own.

        Raises:
            DeviceError: If this is no Mac, or there is no such program.
        """
        self.check()
        try:
            return Pipes(command)
        except OSError as error:
            raise DeviceError(
                f"{command[0]} cannot be started: {error.strerror}. Give a Python with python=..."
            ) from error
