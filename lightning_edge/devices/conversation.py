"""What is asked of a runner on a device, and what of its answers is believed: types, sizes and figures are checked."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Sequence
from importlib import resources
from types import TracebackType
from typing import Any, NoReturn, final

from lightning_edge.devices import runner
from lightning_edge.devices.device import Channel, Device, Farewell
from lightning_edge.devices.words import plain
from lightning_edge.errors import DeviceError, EdgeError, RunnerError
from lightning_edge.reporting.devices import About, State

# How long a device may take to start a Python, and to take a part of a file.
_START_LIMIT_S = 60.0
_PART_LIMIT_S = 120.0
# What the way to a device may take on top of what happens there.
WAY_S = 30.0
# What a shell may say before a program begins.
_NOISE_BYTES = 2**13
# What is sent to a device, in the order of what each needs.
_SENT = ("sensors", "runtimes", "runner")
_PACKAGES = {"ai_edge_litert": "ai-edge-litert", "onnxruntime": "onnxruntime", "numpy": "numpy"}
_NOT_FOUND = re.compile(r"not found|no such file|cannot execute|permission denied", re.IGNORECASE)
_PART_BYTES = 2**22
_STRANGE = "Nothing of it was used. Look whether something else answers in the place of the runner"


def boot() -> tuple[str, bytes]:
    """A line of Python that makes modules of what comes by standard input and runs the last one, and what comes."""
    folder = resources.files("lightning_edge.devices")
    sources = {f"{__package__}.{name}": (folder / f"{name}.py").read_bytes() for name in _SENT}
    sizes = ",".join(f"({name!r},{len(source)})" for name, source in sources.items())
    line = (
        "import sys,types;read,made=sys.stdin.buffer.read,sys.modules;"
        "[exec(compile(read(size),name,'exec'),made.setdefault(name,types.ModuleType(name)).__dict__)"
        f"for name,size in({sizes})];made[{[*sources][-1]!r}].main(*sys.argv[1:])"
    )
    return line, b"".join(sources.values())


@final
class Conversation:
    """A runner that was started on a device, and frames to and from it.

    Args:
        name: Name of the device, for messages.
        device: The device.

    Attributes:
        about: What the device says it is.

    Raises:
        DeviceError: If the device cannot be reached, or its Python does not start the runner.
    """

    def __init__(self, name: str, device: Device) -> None:
        self.name = name
        self._device = device
        self._limit_s = _START_LIMIT_S
        line, source = boot()
        folder = [device.folder] if device.folder else []
        self._pids: list[int] = []
        try:
            self._channel: Channel = device.start([*device.python, "-c", line, *folder])
        except DeviceError as error:
            raise DeviceError(f"{name}: {error}") from error
        try:
            self._channel.write(source, _START_LIMIT_S)
            self._find_greeting()
            hello, _ = self._receive(_START_LIMIT_S, 0)
        except EOFError as error:
            raise DeviceError(f"{name}: {self._not_begun(self.close())}") from error
        except TimeoutError as error:
            self.close()
            raise DeviceError(
                f"{name}: {' '.join(device.python)} did not begin within {_START_LIMIT_S:g} s. Look at the device"
            ) from error
        except runner.FrameError as error:
            self.close()
            raise DeviceError(f"{name}: its runner began with {error}. {_STRANGE}") from error
        except BaseException:
            self.close()
            raise
        try:
            if "error" in hello:
                self._refuse(hello, "a folder could not be made")
            self._pids = [pid for pid in _list(hello, "pids") if type(pid) is int and pid > 1]
            self.about = about_of(hello.get("about"))
        except EdgeError as error:
            self.close()
            raise DeviceError(str(error)) from error

    def ask(
        self, when: str, message: dict[str, Any], arrays: Sequence[Any] = (), limit_s: float = 0.0, most_bytes: int = 0
    ) -> tuple[dict[str, Any], list[Any]]:
        """Ask for something and wait for the answer.

        Args:
            when: What the device does then, for messages: ``"while it ran a sample"``.
            message: What is asked.
            arrays: Values that go with it.
            limit_s: Seconds that it may take on the device.
            most_bytes: The most that the values of the answer may have.

        Raises:
            RunnerError: If the device refuses, does not answer in time, or answers what cannot be.
        """
        try:
            self._channel.write(runner.pack(message, arrays), limit_s + _PART_LIMIT_S)
            reply, given = self._receive(limit_s + WAY_S, most_bytes)
        except EOFError as error:
            raise RunnerError(f"{self.name}: {self._ended(self.close(), when)}") from error
        except TimeoutError as error:
            self.close()
            raise RunnerError(
                f"{self.name} did not answer within {limit_s + WAY_S:g} s {when}. Look whether it still runs"
            ) from error
        except runner.FrameError as error:
            self.close()
            raise RunnerError(f"{self.name} answered with {error} {when}. {_STRANGE}") from error
        except BaseException:
            self.close()  # an answer is on its way that nobody waits for
            raise
        if "error" in reply:
            self._refuse(reply, when)
        return reply, given

    def put(self, name: str, data: bytes) -> None:
        """Write a file on the device, in a folder that is removed with the runner.

        Raises:
            RunnerError: If the device has no room for it.
        """
        import numpy

        for start in range(0, max(1, len(data)), _PART_BYTES):
            part = numpy.frombuffer(data[start : start + _PART_BYTES], dtype=numpy.uint8)
            self.ask("while a file was sent", {"do": "put", "name": name, "more": start > 0}, [part], _PART_LIMIT_S)

    def strange(self, what: str) -> NoReturn:
        """Refuse an answer that cannot be.

        Raises:
            RunnerError: Always.
        """
        self.close()
        raise RunnerError(f"{self.name} answered with {what}. {_STRANGE}")

    def close(self) -> Farewell:
        """End the runner; what it wrote on the device goes with it."""
        return self._channel.close(self._pids)

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def limit(self, seconds: float) -> None:
        """Remember what time limit the runner was given, for messages."""
        self._limit_s = seconds

    def _receive(self, limit_s: float, most_bytes: int) -> tuple[dict[str, Any], list[Any]]:
        return runner.unpack(lambda count: self._channel.read(count, limit_s), most_bytes)

    def _find_greeting(self) -> None:
        """Read over what the device's shell says of its own before a program begins."""
        seen = self._channel.read(len(runner.GREETING), _START_LIMIT_S)
        while not seen.endswith(runner.GREETING):
            if len(seen) > _NOISE_BYTES:
                raise runner.FrameError(f"{len(seen)} bytes of something else")
            seen += self._channel.read(1, _START_LIMIT_S)

    def _refuse(self, reply: dict[str, Any], when: str) -> NoReturn:
        """Raise the error of an answer that says what went wrong."""
        kind, said = plain(reply["error"], 20), plain(reply.get("text"), 500) or "it did not say why"
        python = " ".join(self._device.python)
        if kind == "missing":
            module = plain(reply.get("module"), 80) or "a module"
            package = _PACKAGES.get(module.partition(".")[0], module)
            raise RunnerError(
                f"{self.name}: its Python has no {module}. Install it on the device: {python} -m pip install {package}"
            )
        if kind == "memory":
            raise RunnerError(f"{self.name} ran out of memory {when}. Free some there, or make the network smaller")
        if kind == "disk":
            folder = self._device.folder or "the folder of its temporary files"
            raise RunnerError(
                f"{self.name}: the disk is full {when} ({said}). Free some space in {folder}, or give another with "
                "folder=..."
            )
        raise RunnerError(f"{self.name}: {said.rstrip('.')} ({when})")

    def _not_begun(self, farewell: Farewell) -> str:
        """Why there is no runner, in words."""
        python = " ".join(self._device.python)
        said = f" ({farewell.words})" if farewell.words else ""
        if farewell.lost is not None:
            return (
                f"the connection broke off before the runner began: {farewell.lost}. Look at the device and try again"
            )
        if farewell.status in (126, 127) or _NOT_FOUND.search(farewell.words):
            return f"there is no {python}{said}. Install Python 3.9 or later there, or give its path with python=..."
        ended = "ended" if farewell.status is None else f"ended with status {farewell.status}"
        return f"{python} {ended} before the runner began{said}. It needs Python 3.9 or later"

    def _ended(self, farewell: Farewell, when: str) -> str:
        """How the runner ended, in words."""
        said = f" ({farewell.words})" if farewell.words else ""
        if farewell.lost is not None:
            return f"the connection was lost {when}: {farewell.lost}. What was measured before is kept"
        if farewell.status is None:
            return f"the runner was gone {when}{said}. Try again"
        number = farewell.status - 128
        if number == signal.SIGALRM:
            return (
                f"the runtime did not answer within time_limit_s={self._limit_s:g} {when}, and was ended. "
                "If it is slow and does not hang, give a larger time_limit_s"
            )
        if number == signal.SIGKILL:
            return (
                f"the runtime was killed {when}{said}: the device may have been out of memory. "
                "Free some there, or make the network smaller"
            )
        try:
            crash = f"crashed ({signal.Signals(number).name})"
        except ValueError:
            crash = f"ended with status {farewell.status}"
        return f"the runtime {crash} {when}{said}. Try another version of it on the device"


def _list(reply: dict[str, Any], name: str) -> list[Any]:
    found = reply.get(name)
    return found if isinstance(found, list) else []


def figure(value: Any) -> float | None:
    """What a device says, if it is a finite number."""
    whole = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if whole and math.isfinite(value) else None
    except OverflowError:  # an integer of many digits
        return None


def state_of(told: Any) -> State:
    """What a device says of its temperature and frequency; ``None`` for what is no number."""
    told = told if isinstance(told, dict) else {}
    return State(figure(told.get("temperature_c")), figure(told.get("frequency_mhz")))


def about_of(told: Any) -> About:
    """What a device says it is; ``None`` for what it does not say, or what cannot be."""
    told = told if isinstance(told, dict) else {}
    cores, memory = figure(told.get("cores")), figure(told.get("memory_bytes"))
    words = {name: plain(told.get(name), 120) or None for name in ("machine", "system", "model", "governor", "python")}
    return About(
        **words,
        cores=None if cores is None else int(cores),
        memory_bytes=None if memory is None else int(memory),
        features=tuple(name for name in map(lambda name: plain(name, 40), _list(told, "features")[:100]) if name),
        missing=tuple(name for name in map(lambda name: plain(name, 40), _list(told, "missing")[:100]) if name),
        state=state_of(told),
    )
