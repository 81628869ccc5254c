"""The process that a runtime lives in: loads one file, runs it when asked, and ends with whoever asks.

Started by `isolated` as ``python -m lightning_edge.exporters.run.worker <socket>``. It imports torch and the
runtime, and no converter.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from lightning_edge.errors import EdgeError, first_line
from lightning_edge.exporters.run import messages
from lightning_edge.exporters.run.calls import Samples
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.measure import stopwatch

_Reply = tuple[dict[str, Any], list[Tensor]]


@final
class _Worker:
    """Does what is asked, one method for each thing; see `isolated.Isolated` for what each is for."""

    def __init__(self) -> None:
        self._target: Any = None
        self._runner: Runner | None = None
        self._held: Callable[[], object] = list
        self._memory: _Memory | None = None

    def start(self, message: dict[str, Any], tensors: list[Tensor]) -> _Reply:
        """Import the target and its runtime."""
        self._target = import_module(message["module"]).TARGET
        self._target.import_runtime()
        return {}, []

    def load(self, message: dict[str, Any], tensors: list[Tensor]) -> _Reply:
        """Open the file, and say what the runner takes and how long that took."""
        threads = message["threads"]
        torch.set_num_threads(threads)
        self._memory = _Memory()
        start = time.perf_counter()
        open_file = self._target.open_reference if message["reference"] else self._target.open
        self._runner = open_file(Path(message["path"]), threads)
        load_ms = (time.perf_counter() - start) * 1000
        inputs = [[list(spec.shape), str(spec.dtype).removeprefix("torch.")] for spec in self._runner.inputs]
        reply = {"runtime": self._runner.runtime, "is_reference": self._runner.is_reference}
        return {**reply, "inputs": inputs, "load_ms": load_ms}, []

    def run(self, message: dict[str, Any], tensors: list[Tensor]) -> _Reply:
        """Run on one sample."""
        return {}, self._run(tensors)

    def run_all(self, message: dict[str, Any], tensors: list[Tensor]) -> _Reply:
        """Run on several samples, one call after the other."""
        assert self._runner is not None
        samples = Samples(tensors, message["carries"], message["count"])
        with torch.no_grad():
            return {}, self._runner.run_all(samples, message["most"])

    def keep(self, message: dict[str, Any], tensors: list[Tensor]) -> _Reply:
        """Keep a sample for `time`."""
        assert self._runner is not None
        self._held = self._runner.prepare(tensors)
        return {}, []

    def time(self, message: dict[str, Any], tensors: list[Tensor]) -> _Reply:
        """Run on the kept sample and say how long it took, nanoseconds."""
        with torch.no_grad():
            return {"ns": stopwatch(self._held)()}, []

    def intermediates(self, message: dict[str, Any], tensors: list[Tensor]) -> _Reply:
        """Run on one sample and say what the values inside the file were, if the runtime tells."""
        assert self._runner is not None
        found = self._runner.intermediates(tensors)
        if found is None:
            return {"found": None}, []
        layers = [[entry.operation, entry.scale, entry.zero_point] for entry in found]
        return {"found": layers}, [entry.values for entry in found]

    def memory(self, message: dict[str, Any], tensors: list[Tensor]) -> _Reply:
        """Say by how much the file made the memory of this process grow at its peak."""
        return {"peak_memory_bytes": self._memory.growth_bytes() if self._memory else None}, []

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        assert self._runner is not None
        with torch.no_grad():
            return self._runner(tensors)


@final
class _Memory:
    """How far the memory of this process grows from here on at its peak, without pages of files: the code of libraries.

    Linux tells the peak of all resident memory, and that of files now. What is in memory of a library stays there, so
    that the difference is the peak of the rest, or less where code came in after it.
    """

    def __init__(self) -> None:
        self._before: int | None = None
        with contextlib.suppress(OSError):
            # The highest value so far is one of importing; this sets it back to the present one.
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident_bytes()

    def growth_bytes(self) -> int | None:
        """Give it; ``None`` where the system does not tell, which is anything but Linux."""
        return None if self._before is None else max(0, _resident_bytes() - self._before)


def _resident_bytes() -> int:
    values = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, files = (int(values[name].split()[0]) for name in ("VmHWM", "RssFile"))
    return (peak - files) * 1024


def serve(connection: socket.socket) -> None:
    """Answer until the other end is gone."""
    worker = _Worker()
    while True:
        try:
            message, tensors = messages.receive(connection)
        except (EOFError, ConnectionError):
            return
        action: Callable[[dict[str, Any], list[Tensor]], _Reply] = getattr(worker, message["do"])
        try:
            reply, outputs = action(message, tensors)
        except EdgeError as error:
            reply, outputs = {"error": type(error).__name__, "text": str(error)}, []
        except Exception as error:
            reply, outputs = {"error": "", "text": first_line(error)}, []
        messages.send(connection, reply, outputs)


def main() -> NoReturn:
    """Serve the socket that was handed over, and end without the clean-up of libraries.

    Runtimes that share a process free some things twice when it ends; nothing is left to be cleaned up here.
    """
    leave(lambda: serve(socket.socket(fileno=int(sys.argv[1]))))


def leave(work: Callable[[], None]) -> NoReturn:
    """Do the work of a process, and end it without the clean-up of libraries."""
    status = 0
    try:
        work()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
