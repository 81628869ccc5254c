"""A file on a device as a `Runner`: it is called as the file here is, and asked how long calls take there."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from lightning_edge.contents import Contents, Endpoint
from lightning_edge.devices.conversation import WAY_S, Conversation, figure, state_of
from lightning_edge.devices.device import Device
from lightning_edge.devices.runner import MAX_CALLS
from lightning_edge.devices.words import plain
from lightning_edge.errors import RunnerError
from lightning_edge.exporters.run import ends
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.exporters.target import target as target_of
from lightning_edge.reporting.devices import About, State
from lightning_edge.wording import counted

# What a file that does not fix the sizes of its outputs may give for a sample.
_FREE_BYTES = 2**28
# Calls are timed in stretches of this length, so that what was measured is here when the way to the device breaks.
_STRETCH_S = 10.0


@dataclass(frozen=True)
class Times:
    """Calls that were timed on a device, one after the other.

    Attributes:
        ns: Nanoseconds of each call, or of every n-th, in their order.
        calls: So many were made.
        before: Temperature and frequency before the first.
        after: The same after the last.
    """

    ns: Sequence[int]
    calls: int
    before: State
    after: State


@dataclass(frozen=True)
class Apart:
    """What one sample takes beside the runtime's own time, milliseconds.

    Attributes:
        quantize_ms: Making the file's inputs of real numbers, on this machine.
        transfer_ms: The way to the device and back: all of the call there that is not the runtime's.
        dequantize_ms: Making real numbers of the file's outputs, on this machine.
    """

    quantize_ms: float
    transfer_ms: float
    dequantize_ms: float


@dataclass(frozen=True)
class Spent:
    """What a device took in a stretch of calls, or of waiting.

    Attributes:
        calls: Calls that were made.
        seconds: How long it was.
        joules: What it took, by the counter of the device; ``None`` where that does not tell.
        source: What tells it, or why nothing does.
    """

    calls: int
    seconds: float
    joules: float | None
    source: str


@final
class RemoteRunner(Runner):
    """Runs a file on a device. What it wrote there is removed when it is closed.

    Args:
        name: Name of the device, for messages.
        device: The device.
        target: Target of the file.
        path: The file.
        contents: What it says of itself.
        threads: Threads to run it with.
        time_limit_s: Seconds that loading the file, or running one sample, may take on the device.

    Attributes:
        about: What the device says it is.
        load_ms: Milliseconds from the path to a runtime that is ready, on the device.
        session: Settings that the runtime was given.

    Raises:
        DeviceError: If the device cannot be reached, or cannot run the runner.
        RunnerError: If the file does not load there.
    """

    def __init__(
        self, name: str, device: Device, target: str, path: Path, contents: Contents, threads: int, time_limit_s: float
    ) -> None:
        self._contents = contents
        self._limit_s = time_limit_s
        self._device = device
        self._asked = Conversation(name, device)
        self.about: About = self._asked.about
        self.inputs = tuple(ends.spec(end) for end in contents.inputs)
        try:
            # The name on the device is ours: the file's own may be anything.
            name, data = f"model{path.suffix}", path.read_bytes() if path.is_file() else b""
            if path.is_dir():
                name, data = f"{name}.zip", _zipped(path, name)
            self._asked.put(name, data)
            self._load(target, name, threads)
        except BaseException:
            self.close()
            raise

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one call."""
        return self._run(tensors)[0]

    def apart(self, tensors: list[Tensor]) -> Apart:
        """Run on the flattened inputs of one sample, and say what it takes beside the runtime's own time.

        Raises:
            RunnerError: If the file fails to run, or the device says what cannot be.
        """
        return self._run(tensors)[1]

    def _run(self, tensors: list[Tensor]) -> tuple[list[Tensor], Apart]:
        start = time.perf_counter_ns()
        samples = tensors[0].shape[0] if tensors and tensors[0].dim() else 1
        arrays = self._arrays(tensors)
        most = sum(_most_bytes(end, samples) for end in self._contents.outputs)
        sent = time.perf_counter_ns()
        reply, given = self._asked.ask("while it ran a sample", {"do": "run"}, arrays, self._limit_s, most)
        came = time.perf_counter_ns()
        if len(given) != len(self._contents.outputs):
            self._asked.strange(f"{len(given)} outputs, where the file has {len(self._contents.outputs)}")
        outputs = [self._output(array, end, samples) for array, end in zip(given, self._contents.outputs, strict=True)]
        own_ns = figure(reply.get("ns"))
        if own_ns is None or not 0 <= own_ns / 1e9 <= self._limit_s + WAY_S:
            self._asked.strange(f"ns={reply.get('ns')!r}"[:80])
        way_ns = max(0.0, came - sent - own_ns)  # two clocks may differ by a little
        return outputs, Apart((sent - start) / 1e6, way_ns / 1e6, (time.perf_counter_ns() - came) / 1e6)

    def times(self, tensors: list[Tensor], calls: int, seconds: float = _STRETCH_S, keep: int = MAX_CALLS) -> Times:
        """Time calls on one sample on the device; the way there has no part in it.

        Args:
            tensors: The flattened inputs of one sample.
            calls: So many calls at most.
            seconds: None begins after so many seconds, so that it may be fewer: but one is made.
            keep: Times that are told at most, evenly spread over the calls.

        Raises:
            RunnerError: If the file fails to run, or the device says what cannot be.
        """
        calls = min(calls, MAX_CALLS)
        temperature_c = self._device.temperature_c()
        reply, given = self._asked.ask(
            "while calls were timed",
            {"do": "time", "calls": calls, "seconds": seconds, "keep": keep},
            self._arrays(tensors),
            seconds + self._limit_s,
            8 * min(calls, keep),
        )
        if len(given) != 1 or given[0].dtype.name != "int64" or given[0].ndim != 1 or not len(given[0]):
            self._asked.strange("something else than a list of times")
        ns = [int(value) for value in given[0]]
        if min(ns) < 0 or sum(ns) / 1e9 > seconds + self._limit_s + WAY_S:
            self._asked.strange(f"times that cannot be: {min(ns)} to {max(ns)} ns")
        made = figure(reply.get("calls"))
        if made is None or not len(ns) <= made <= calls:
            self._asked.strange(f"calls={reply.get('calls')!r}"[:80])
        before = _warm(state_of(reply.get("before")), temperature_c)
        return Times(ns, int(made), before, _warm(state_of(reply.get("after")), self._device.temperature_c()))

    def spent(self, seconds: float, tensors: list[Tensor] | None = None) -> Spent:
        """Have the device make calls for so long, or wait, and tell what energy that took.

        Args:
            seconds: How long.
            tensors: The flattened inputs of one sample; ``None`` to wait.

        Raises:
            RunnerError: If the file fails to run, or the device says what cannot be.
        """
        message = {"do": "energy", "seconds": seconds}
        arrays = [] if tensors is None else self._arrays(tensors)
        reply, _ = self._asked.ask("while energy was measured", message, arrays, seconds + self._limit_s)
        calls, took = figure(reply.get("calls")), figure(reply.get("seconds"))
        if calls is None or calls < 1 or took is None or not seconds <= took < seconds + self._limit_s + WAY_S:
            self._asked.strange(f"calls={reply.get('calls')!r} in {reply.get('seconds')!r} s"[:80])
        joules = figure(reply.get("joules"))
        source = plain(reply.get("source"), 200) or "the device did not say"
        return Spent(int(calls), took, None if joules is None or joules < 0 else joules, source)

    def state(self) -> State:
        """Ask for its temperature and frequency now."""
        reply, _ = self._asked.ask("between two samples", {"do": "state"})
        return _warm(state_of(reply), self._device.temperature_c())

    def peak_memory_bytes(self) -> int | None:
        """Ask for the peak of the resident memory of the whole process on the device; ``None`` if it does not tell."""
        reply, _ = self._asked.ask("between two samples", {"do": "state"})
        found = figure(reply.get("peak_memory_bytes"))
        return None if found is None or found <= 0 else int(found)

    def close(self) -> None:
        """End the runner on the device; what was written there goes with it."""
        self._asked.close()

    def __enter__(self) -> RemoteRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, target: str, name: str, threads: int) -> None:
        """Open the file with the first of the target's settings that its runtime takes."""
        known = target_of(target).sessions(threads, self.about.machine or "", self.about.features)
        sessions = [{**session, **self._device.session} for session in known]
        if target == "coreml":  # it goes by names
            contents = self._contents
            sessions = [
                {**session, "inputs": _names(contents.inputs), "outputs": _names(contents.outputs)}
                for session in sessions
            ]
        message = {"do": "load", "target": target, "name": name, "limit_s": self._limit_s}
        self._asked.limit(self._limit_s)
        for session in sessions:
            try:
                reply, _ = self._asked.ask(
                    "while it loaded the file", {**message, "session": session}, (), self._limit_s
                )
            except RunnerError as error:
                # As in exporters.onnx: exact kernels do not take files in which two layers share a weight.
                if session is sessions[-1] or "replace the existing tensor" not in str(error):
                    raise
            else:
                break
        load_ms = figure(reply.get("load_ms"))
        if load_ms is None or load_ms < 0:
            self._asked.strange(f"load_ms={reply.get('load_ms')!r}"[:80])
        self.load_ms, self.session = load_ms, session
        count = counted(threads, "thread")
        self.runtime = plain(reply.get("runtime"), 200) or target
        if "threads" in session or "options" in session:  # Core ML chooses
            self.runtime += f", {count}"

    def _arrays(self, tensors: list[Tensor]) -> list[Any]:
        """The inputs in the file's own types."""
        return [
            ends.quantized(tensor, end).contiguous().numpy()
            for tensor, end in zip(tensors, self._contents.inputs, strict=True)
        ]

    def _output(self, array: Any, end: Endpoint, samples: int) -> Tensor:
        """An output as the network gives it, if it is what the file declares."""
        fits = array.dtype.name == end.dtype and len(array.shape) == len(end.shape)
        for position, (size, declared) in enumerate(zip(array.shape, end.shape, strict=False)):
            fits = fits and (size == declared or declared < 0 or (position == 0 and declared == 1 and size == samples))
        if not fits:
            given = f"{array.dtype.name}{list(array.shape)}"
            self._refuse_output(f"an output {given}, where the file declares {end.dtype}{list(end.shape)}")
        return ends.dequantized(torch.from_numpy(array), end)

    def _refuse_output(self, what: str) -> NoReturn:
        self._asked.strange(what)


def _warm(state: State, temperature_c: float | None) -> State:
    """Add the temperature that the way to a device tells, where the runner there cannot read it."""
    return state if state.temperature_c is not None else replace(state, temperature_c=temperature_c)


def _names(found: Sequence[Endpoint]) -> list[list[Any]]:
    """What an input or output is called, its type and its shape."""
    return [[end.name, end.dtype, list(end.shape)] for end in found]


def _zipped(folder: Path, name: str) -> bytes:
    """Pack a folder under another name."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            archive.write(file, Path(name, file.relative_to(folder)))
    return packed.getvalue()


def _most_bytes(end: Endpoint, samples: int) -> int:
    """The most bytes that an output may have."""
    if any(size < 0 for size in end.shape):
        return _FREE_BYTES
    return prod(end.shape) * samples * ends.dtype(end).itemsize
