"""What runs on a device: this file, `runtimes` and `sensors`, in its own Python with NumPy, a runtime and no torch.

They are sent over as they are and started by Python 3.9 or later. This one says `GREETING` and what the machine is, and
then answers frames on its standard input with frames on its standard output. A frame is the length of a JSON text (8
bytes, little-endian), the text, and behind it the bytes of the arrays that the text tells the types and shapes of.
Nothing is pickled. Values go in and out in the file's own types: quantizing them stays where the frames come from.

Two processes: one runs the file, and may crash or hang. The other waits for it, ends it when nobody asks any more, and
then removes the folder that both were given.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from math import prod
from typing import Any

from lightning_edge.devices.runtimes import RUNTIMES, Arrays
from lightning_edge.devices.sensors import Meter, about, kilobytes, sensors

GREETING = b"\nlightning-edge runner 1\n"
MAX_TEXT_BYTES = 2**20
MAX_CALLS = 1_000_000
# What an array may be of, and the bytes of one element.
ITEM_BYTES = dict(bool=1, int8=1, uint8=1, int16=2, int32=4, int64=8, float16=2, float32=4, float64=8)

_LENGTH = struct.Struct("<Q")
_MAX_DIMENSIONS = 16
# The most that a request may bring: a file is sent in parts.
_MAX_REQUEST_BYTES = 2**30
# How long a runner waits for a request, and how long it may take to end after the last.
_IDLE_LIMIT_S = 1800.0
_LAST_BREATH_MS = 2000
# How long this sleeps at once where it only waits.
_NAP_S = 0.05

_Reply = tuple[dict[str, Any], list[Any]]


class FrameError(ValueError):
    """What came is no frame, or is larger than it may be."""


def pack(message: dict[str, Any], arrays: Arrays = ()) -> bytes:
    """Make a frame of a message and arrays."""
    specs = [[array.dtype.name, list(array.shape)] for array in arrays]
    text = json.dumps({**message, "arrays": specs}, allow_nan=False).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *(array.tobytes() for array in arrays)])


def unpack(read: Callable[[int], bytes], limit_bytes: int) -> tuple[dict[str, Any], list[Any]]:
    """Read a frame: its message and its arrays.

    Args:
        read: Gives exactly as many bytes as it is asked for.
        limit_bytes: The most that the arrays may have together.

    Raises:
        FrameError: If it is no frame, or larger than it may be; nothing of that size is read or made room for.
        EOFError: If the other end is gone.
    """
    (length,) = _LENGTH.unpack(read(_LENGTH.size))
    if length > MAX_TEXT_BYTES:
        raise FrameError(f"a message of {length} bytes, where {MAX_TEXT_BYTES} are the most")
    try:
        message = json.loads(read(length).decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a message that is no JSON ({str(error)[:80]})") from error
    specs = message.pop("arrays", None) if isinstance(message, dict) else None
    if not isinstance(specs, list):
        raise FrameError("a message without a list of arrays")
    total = sum(_length_bytes(spec) for spec in specs)
    if total > limit_bytes:
        raise FrameError(f"arrays of {total} bytes, where {limit_bytes} are the most")
    return message, [_array(read, name, shape) for name, shape in specs]


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _length_bytes(spec: Any) -> int:
    """The bytes of an array of this type and shape; a `FrameError` if that is no type and shape."""
    if isinstance(spec, list) and len(spec) == 2 and isinstance(spec[0], str) and isinstance(spec[1], list):
        name, shape = spec
        whole = all(type(size) is int and size >= 0 for size in shape)
        if name in ITEM_BYTES and whole and len(shape) <= _MAX_DIMENSIONS:
            return ITEM_BYTES[name] * prod(shape)
    raise FrameError(f"an array of type and shape {str(spec)[:80]}")


def _array(read: Callable[[int], bytes], name: str, shape: list[int]) -> Any:
    import numpy

    length = _length_bytes([name, shape])
    if not length:
        return numpy.zeros(shape, name)
    return numpy.frombuffer(bytearray(read(length)), name).reshape(shape)  # in memory that may be written to


class _Server:
    """Does what is asked; each method that `actions` names answers one kind of request."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._runtime: Any = None
        self._limit_s = _IDLE_LIMIT_S
        self.actions: dict[str, Callable[[dict[str, Any], list[Any]], _Reply]] = {
            "put": self._put,
            "load": self._load,
            "run": self._run,
            "time": self._time,
            "energy": self._energy,
            "state": self._state,
        }

    def _put(self, message: dict[str, Any], arrays: list[Any]) -> _Reply:
        with open(self._path(message), "ab" if message["more"] else "wb") as opened:
            opened.write(arrays[0].tobytes())
        return {}, []

    def _load(self, message: dict[str, Any], arrays: list[Any]) -> _Reply:
        """Open a file that was put here in its runtime."""
        import numpy  # noqa: F401 (what is missing is told before it is needed)

        needed, kind = RUNTIMES[message["target"]]
        __import__(needed)
        path = self._path(message)
        self._limit_s = message["limit_s"]
        limited(self._limit_s)
        if path.endswith(".zip"):  # a package is a folder
            shutil.unpack_archive(path, self._folder)
            path = path[: -len(".zip")]
        self._runtime = kind(path, message["session"])
        return {"runtime": self._runtime.name, "load_ms": self._runtime.load_ms}, []

    def _path(self, message: dict[str, Any]) -> str:
        return os.path.join(self._folder, os.path.basename(message["name"]))

    def _run(self, message: dict[str, Any], arrays: list[Any]) -> _Reply:
        """Run on one sample, and say how long the runtime took for it."""
        limited(self._limit_s)
        call = self._runtime.prepared(arrays)
        start = time.perf_counter_ns()
        outputs = call()
        return {"ns": time.perf_counter_ns() - start}, outputs

    def _time(self, message: dict[str, Any], arrays: list[Any]) -> _Reply:
        """Run on one sample so many times, or for so many seconds, and say how long each, or every n-th, took."""
        import numpy

        call, clock = self._runtime.prepared(arrays), time.perf_counter_ns
        before = sensors()
        times: list[int] = []
        until = clock() + int(message["seconds"] * 1e9)
        while len(times) < min(message["calls"], MAX_CALLS) and (not times or clock() < until):
            limited(self._limit_s)
            start = clock()
            call()
            times.append(clock() - start)
        step = -(-len(times) // message["keep"])
        return {"calls": len(times), "before": before, "after": sensors()}, [numpy.array(times[::step], "int64")]

    def _energy(self, message: dict[str, Any], arrays: list[Any]) -> _Reply:
        """Run on one sample for so many seconds, or only wait where there is none, and say what energy that took."""
        call = self._runtime.prepared(arrays) if arrays else lambda: time.sleep(_NAP_S)
        calls, meter = 0, Meter()
        try:
            start = time.perf_counter()
            while time.perf_counter() - start < message["seconds"]:
                limited(self._limit_s)
                call()
                calls += 1
            joules, seconds = meter.joules(), time.perf_counter() - start
        finally:
            meter.close()
        return {"calls": calls, "seconds": seconds, "joules": joules, "source": meter.source}, []

    def _state(self, message: dict[str, Any], arrays: list[Any]) -> _Reply:
        """Tell temperature, frequency, and the peak of this process's resident memory."""
        return {**sensors(), "peak_memory_bytes": kilobytes("/", "proc/self/status", "VmHWM")}, []


def limited(seconds: float) -> None:
    """End this process after so many seconds, whatever it is doing then, unless this is called again before."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _told(error: BaseException) -> dict[str, Any]:
    """What went wrong, as an answer."""
    text = " ".join((str(error) or type(error).__name__).split())[:500]
    if isinstance(error, ModuleNotFoundError):
        return {"error": "missing", "module": error.name, "text": text}
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return {"error": "memory" if isinstance(error, MemoryError) else "disk" if full else "failed", "text": text}


def serve(source: int, sink: int, folder: str) -> None:
    """Answer frames from one descriptor on another until the other end is gone; files are put into the folder."""
    server = _Server(folder)
    while True:
        limited(_IDLE_LIMIT_S)
        try:
            message, arrays = unpack(lambda count: read_from(source, count), _MAX_REQUEST_BYTES)
        except EOFError:
            return
        try:
            reply, given = server.actions[message["do"]](message, arrays)
        except Exception as error:
            reply, given = _told(error), []
        limited(_IDLE_LIMIT_S)
        write_to(sink, pack(reply, given))


def read_from(source: int, count: int) -> bytes:
    """Read exactly so many bytes; an `EOFError` if the other end is gone."""
    parts = []
    while count:
        part = os.read(source, min(count, 2**20))
        if not part:
            raise EOFError("the other end is gone")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def write_to(sink: int, data: bytes) -> None:
    """Write all of the bytes."""
    view = memoryview(data)
    while view:
        view = view[os.write(sink, view) :]


def _watch(child: int, source: int, alive: int, folder: str) -> int:
    """Wait for the process that runs the file, end it when nobody asks any more, and remove the folder."""
    gone = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    poll.register(source, gone)
    while alive not in dict(poll.poll()):
        poll.unregister(source)
        if not poll.poll(_LAST_BREATH_MS):
            os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    shutil.rmtree(folder, ignore_errors=True)
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main(place: str | None = None) -> None:
    """Run as the program on a device, with a folder of its own in ``place``, or among the temporary files."""
    source, sink = os.dup(0), os.dup(1)
    # What a runtime prints goes where errors go, and it reads nothing.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (signal.SIGHUP, signal.SIGINT):  # the frames say when to end
        signal.signal(number, signal.SIG_IGN)
    try:
        folder = tempfile.mkdtemp(prefix="lightning-edge-", dir=place)
    except OSError as error:
        write_to(sink, GREETING + pack({**_told(error), "folder": place or tempfile.gettempdir()}))
        sys.exit(1)
    alive, held = os.pipe()
    child = os.fork()
    if child:
        os.close(held)
        os.close(sink)
        sys.exit(_watch(child, source, alive, folder))
    status = 1
    try:
        os.close(alive)
        write_to(sink, GREETING + pack({"pids": [os.getppid(), os.getpid()], "about": about()}))
        serve(source, sink, folder)
        status = 0
    except BrokenPipeError:
        pass
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    sys.stderr.flush()
    os._exit(status)  # without the clean-up of libraries, which free some things twice
