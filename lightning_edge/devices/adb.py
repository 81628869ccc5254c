"""`Adb`: an Android phone by the Android Debug Bridge, through the `adb` program and a Python on the phone."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import final

from lightning_edge.devices.device import Channel, Device
from lightning_edge.devices.meter import Reading, check_meter
from lightning_edge.devices.pipes import Pipes
from lightning_edge.devices.programs import programs_of
from lightning_edge.errors import DeviceError

# Termux's own Python, as the app's user: Android lets no other process into the folder of an app.
TERMUX = ("run-as", "com.termux", "/data/data/com.termux/files/usr/bin/python3")
_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\[\]-]{0,99}")
_ASK_LIMIT_S = 15.0
_ANSWER_BYTES = 2**20
# Of `dumpsys thermalservice`: a temperature of the CPU (type 0), in degrees Celsius.
_CPU = re.compile(r"mValue=(-?\d{1,3}(?:\.\d{1,6})?), mType=0\b")
# Of `dumpsys battery`: tenths of a degree.
_CHARGE = re.compile(r"^\s*Charge counter: (\d{1,9})$", re.MULTILINE)
_VOLTAGE = re.compile(r"^\s*voltage: (\d{1,5})$", re.MULTILINE)
_POWERED = re.compile(r"^\s*\w+ powered: true$", re.MULTILINE)
_BATTERY = re.compile(r"^\s*temperature: (-?\d{1,4})$", re.MULTILINE)


@final
class Adb(Device):
    """An Android phone on a cable, or on the network after ``adb connect``.

    The phone needs Termux in a build that lets ``run-as`` in (the debug build of its GitHub releases), and there
    ``pkg install python python-numpy`` and the runtime of the files.

    Args:
        serial: Which phone, as ``adb devices`` lists it; the only one if not given.
        python: The phone's Python, and what stands before its own arguments; Termux's if not given.
        folder: Folder on the phone for what is written there; that of temporary files if not given.
        adb: The program.
        meter: As for `Local`; the phone's battery if not given.
        programs: As for `Local`. They need no Termux.

    Raises:
        ValueError: If a setting is not allowed.
    """

    def __init__(
        self,
        serial: str | None = None,
        python: Sequence[str] | str | None = None,
        folder: str | None = None,
        adb: str = "adb",
        meter: Sequence[str] | None = None,
        programs: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if serial is not None and not _SERIAL.fullmatch(serial):
            raise ValueError(f"Adb(serial={serial!r}): give the name of a phone as `adb devices` lists it")
        given = [python] if isinstance(python, str) else list(python or TERMUX)
        if not all(given):
            raise ValueError(f"Adb(python={python!r}): give the path of a Python, or a list that begins with a program")
        if not adb:
            raise ValueError(f"Adb(adb={adb!r}): give the path of the program")
        self.serial, self.python, self.folder, self.adb = serial, given, folder, adb
        self.meter = check_meter(meter)
        self.programs = programs_of(programs)

    native_folder = "/data/local/tmp"

    @property
    def label(self) -> str:
        """The serial, or ``android``."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", self.serial or "android")

    def check(self) -> None:
        """Look whether there is such a program.

        Raises:
            DeviceError: If there is none.
        """
        if shutil.which(self.adb) is None:
            raise DeviceError(
                f"there is no program {self.adb!r}. Install Android's platform tools, or give its path with adb=..."
            )

    def start(self, command: Sequence[str]) -> Channel:
        """Start a program on the phone.

        Raises:
            DeviceError: If there is no such phone, or it does not let this machine in.
        """
        self.check()
        state = self._ask("get-state")
        if state.returncode != 0 or state.stdout.strip() != "device":
            told = " ".join((state.stderr or state.stdout).split())[:200] or f"its state is {state.stdout.strip()!r}"
            raise DeviceError(
                f"adb does not reach {self.serial or 'a phone'}: {told.removeprefix('error: ')}. Look at "
                "`adb devices`, allow debugging on the phone, and give serial=... where there are several"
            )
        # -T: no terminal, which would change bytes. adb joins arguments to a line for the phone's shell.
        return Pipes([*self._adb, "shell", "-T", shlex.join(command)])

    def temperature_c(self) -> float | None:
        """Ask the phone for the hottest of its CPU's temperatures, or its battery's; ``None`` if it does not say."""
        try:
            told = [float(value) for value in _CPU.findall(self._dumpsys("thermalservice"))]
            told = told or [int(value) / 10 for value in _BATTERY.findall(self._dumpsys("battery"))]
        except DeviceError:
            return None
        return max(told, default=None)

    def energy(self) -> Reading:
        """Read the user's meter, or what the battery has given so far: its counter of charge times its voltage.

        Raises:
            DeviceError: If the meter does not tell.
        """
        if (told := super().energy()) is not None:
            return told
        said = self._dumpsys("battery")
        if _POWERED.search(said):
            return Reading(None, "the phone is on power. Use `adb connect` without a cable, or give meter=...")
        charge, voltage = _CHARGE.search(said), _VOLTAGE.search(said)
        if charge is None or voltage is None:
            return Reading(None, "the phone's battery does not tell its charge")
        # Microampere-hours and millivolts; what is left falls, and what was given rises.
        joules = int(charge[1]) * 3600e-6 * int(voltage[1]) / 1000
        return Reading(-joules, "the phone's battery, charge times voltage")

    @property
    def _adb(self) -> list[str]:
        return [self.adb, *(["-s", self.serial] if self.serial else [])]

    def _dumpsys(self, service: str) -> str:
        return self._ask("shell", "dumpsys", service).stdout[:_ANSWER_BYTES]

    def _ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [*self._adb, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=_ASK_LIMIT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"adb did not answer within {_ASK_LIMIT_S:g} s. Try `adb kill-server`") from error
        except OSError as error:
            raise DeviceError(f"{self.adb} cannot be started: {error.strerror}") from error
