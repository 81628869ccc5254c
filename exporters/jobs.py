"""Files of several targets written side by side, each target in a process of its own that loads exported programs."""

from __future__ import annotations

import builtins
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import torch
from torch import nn

from lightning_edge import errors
from lightning_edge.contents import Contents
from lightning_edge.cores import cores
from lightning_edge.errors import ExportError
from lightning_edge.exporters.artifact import check_kernels
from lightning_edge.exporters.order import Forms, Order, ordered
from lightning_edge.exporters.pipeline import opened, stage_order
from lightning_edge.exporters.run.child import Child
from lightning_edge.exporters.run.running import Running
from lightning_edge.exporters.staged import Staged
from lightning_edge.exporters.target import TARGETS
from lightning_edge.exporters.verify.contents import ExportWarning
from lightning_edge.exporters.writer import export_warnings, written
from lightning_edge.files import StagedPath
from lightning_edge.interface import Interface
from lightning_edge.network import Deployable
from lightning_edge.reporting.typed import built
from lightning_edge.user_warnings import warn

_WRITER = "lightning_edge.exporters.writer_process"
# The largest networks that were tried took ten minutes.
WRITE_LIMIT_S = 3600.0


def default_jobs(targets: int) -> int:
    """Say how many targets are written at once: one a core, and on one core 0, which is in this process.

    A process costs about 5 s of its own, to import torch and to load the network. It pays where another core is free.

    Args:
        targets: How many there are.
    """
    return min(cores(), targets) if cores() > 1 else 0


def check_jobs(jobs: int | None) -> None:
    """Refuse a number of processes that is none.

    Raises:
        ValueError: If it is neither ``None`` nor a whole number from 0 on.
    """
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 0):
        raise ValueError(
            f"jobs={jobs!r} is not allowed; give how many targets are written at once, 0 to write them in this "
            "process, or None for one a core"
        )


@dataclass(frozen=True)
class _Written:
    """What a process that wrote a file says of it; ``contents`` is ``None`` where it cannot load the network."""

    contents: Contents | None
    warnings: tuple[str, ...] = ()
    child: Child | None = None


@final
class Pending:
    """A file that is being written, or will be.

    Attributes:
        announced: Whether its failure was announced when it happened.
    """

    def __init__(self, finish: Callable[[Pending], Staged]) -> None:
        self.announced = False
        self._finish = finish

    def staged(self) -> Staged:
        """Wait for the file and load it; as `stage`, to be called once."""
        return self._finish(self)


@dataclass(frozen=True)
class _Task:
    """A file that waits for its target's process."""

    asked: Order
    prepared: Deployable
    program: Path
    place: StagedPath
    label: str
    pending: Pending
    future: Future[_Written]


@final
class Writers:
    """Writes files of up to ``jobs`` targets at once; as a context it ends all that is under way.

    Args:
        jobs: How many targets at once, each in a process of its own; 0 to write each file in this process when it is
            waited for.
        tell: Is called with a line at each step of a file, from other threads.
        limit_s: Seconds that writing a file may take in a process of its own.
    """

    def __init__(self, jobs: int, tell: Callable[[str], None], limit_s: float = WRITE_LIMIT_S) -> None:
        self._jobs = jobs
        self._tell = tell
        self._limit_s = limit_s
        self._forms = Forms()
        self._pool = ThreadPoolExecutor(max(1, jobs))
        # Made with mode 0700: the programs in it are loaded as what we wrote.
        self._folder = tempfile.TemporaryDirectory(prefix="lightning-edge-")
        self._saved: dict[int, tuple[Path | None, Deployable]] = {}
        self._lock = threading.Lock()
        self._running: set[Child] = set()
        self._places: list[StagedPath] = []
        self._waiting: dict[str, deque[_Task]] = {}
        self._closed = False

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process, and remove what was not handed out."""
        with self._lock:
            self._closed = True
            for child in self._running:
                child.finish()
        self._pool.shutdown(cancel_futures=True)
        for place in reversed(self._places):  # the first has made the folders
            place.discard()
        self._folder.cleanup()

    def begin(
        self,
        model: nn.Module,
        target: str,
        path: str | Path,
        *,
        label: str,
        inputs: Any = None,
        running: Running | None = None,
        max_fallback: float | None = None,
        interface: Interface | None = None,
        **options: Any,
    ) -> Pending:
        """Begin to write a file; arguments and errors as of `stage`, the errors when the file is waited for.

        Args:
            model: As for `stage`.
            target: As for `stage`.
            path: As for `stage`.
            label: What lines call the file.
            inputs: As for `stage`.
            running: How it is run; as `stage` does if not given.
            max_fallback: As for `stage`.
            interface: As for `stage`.
            options: The target's own options.
        """
        running = running or Running()
        shape: dict[str, Any] = {"inputs": inputs, "max_fallback": max_fallback, "interface": interface, **options}
        if not self._jobs:

            def here(_: Pending) -> Staged:
                asked = ordered(model, target, path, forms=self._forms, **shape)
                return stage_order(asked, running)

            return Pending(here)
        try:
            check_kernels(target, running.kernels, max_fallback)
            asked = ordered(model, target, path, forms=self._forms, **shape)
            with export_warnings() as messages:
                prepared = asked.prepared()
            program = self._program(prepared)
            place = StagedPath(asked.path)
        except Exception as error:
            return Pending(_raising(error))
        self._places.append(place)
        future: Future[_Written] = Future()
        pending = Pending(lambda _: self._finished(asked, prepared, place, messages, future, running))
        if program is None:
            future.set_result(_Written(None))
        else:
            self._submit(_Task(asked, prepared, program, place, label, pending, future))
        return pending

    def _submit(self, task: _Task) -> None:
        """Have a thread begin with the target's files, if none is at it."""
        with self._lock:
            queue = self._waiting.get(task.asked.target)
            if queue is not None:
                queue.append(task)
                return
            self._waiting[task.asked.target] = deque([task])
        self._pool.submit(self._write_all, task.asked.target)

    def _write_all(self, target: str) -> None:
        """Write the files of a target one after the other, in one process as long as that lives."""
        child: Child | None = None
        while True:
            with self._lock:
                queue = self._waiting[target]
                if not queue or self._closed:
                    del self._waiting[target]
                    break
                task = queue.popleft()
            try:
                found, child = self._in_process(task, child)
            except BaseException as error:  # whoever waits for the file raises it
                found, child = error, None
            if isinstance(found, BaseException):
                task.future.set_exception(found)
            else:
                task.future.set_result(found)
        self._end(child)

    def _end(self, child: Child | None) -> None:
        if child is not None:
            child.finish()
            with self._lock:
                self._running.discard(child)

    def _program(self, network: Deployable) -> Path | None:
        """Save a network as an exported program, once; ``None`` where that fails, and each target says why itself."""
        if id(network) not in self._saved:
            path: Path | None = Path(self._folder.name, f"{len(self._saved)}.pt2")
            try:
                torch.export.save(network.program(), str(path))
            except Exception:
                path = None
            self._saved[id(network)] = path, network  # kept, so that the number stays its own
        return self._saved[id(network)][0]

    def _finished(
        self,
        asked: Order,
        prepared: Deployable,
        place: StagedPath,
        messages: list[str],
        future: Future[_Written],
        running: Running,
    ) -> Staged:
        try:
            found = future.result()
            for message in (*messages, *found.warnings):
                warn(message, ExportWarning)
            contents = found.contents
            if contents is None:  # it cannot be saved, or names operations of the user's own that are not known there
                contents = written(asked.module, prepared, asked.path, place.staged, asked.options)
            staged = opened(asked, place, contents, running, found.child)
        except BaseException:
            place.discard()
            raise
        with self._lock:
            self._places.remove(place)
            self._running -= {found.child}  # the file's runner has it now
        return staged

    def _in_process(self, task: _Task, child: Child | None) -> tuple[_Written | BaseException, Child | None]:
        """Have a process write a file; gives what came of it, and the process if it can write another one."""
        start_s = time.monotonic()

        def tell(line: str) -> None:
            if not self._closed:
                self._tell(f"{task.label}: {line}, after {time.monotonic() - start_s:.0f} s")

        name = f"{task.asked.target}: the process that writes {task.asked.path.name}"
        found: _Written | Exception
        try:
            child = child or self._started(name)
            reply = self._conversation(task, child, name, start_s, tell)
            stays = "contents" in reply and task.asked.module.in_process
            found = _result(reply, task.asked.target, child if stays else None)
            child = None if stays else child
        except Exception as error:
            self._end(child)
            found, child = error, None
        if isinstance(found, Exception):
            task.pending.announced = not self._closed
            if not self._closed:
                self._tell(f"FAILED: {task.label}, there is no such file: {found}")
        elif found.contents is not None:
            tell("written")
        return found, child

    def _started(self, name: str) -> Child:
        try:
            child = Child(_WRITER)
        except OSError as error:
            raise ExportError(f"{name} cannot be started: {error}. Give jobs=0 to write it in this one") from error
        with self._lock:
            self._running.add(child)
            closed = self._closed
        if closed:
            self._end(child)
            raise ExportError(f"{name} was ended")
        return child

    def _conversation(
        self, task: _Task, child: Child, name: str, start_s: float, tell: Callable[[str], None]
    ) -> dict[str, Any]:
        asked, prepared = task.asked, task.prepared
        message = {
            "module": TARGETS[asked.target],
            "program": str(task.program),
            "precision": prepared.precision,
            "scales": prepared.output_scales,
            "interface": asdict(prepared.interface),
            "path": str(asked.path.absolute()),
            "staged": str(task.place.staged.absolute()),
            "options": asked.options,
            "threads": torch.get_num_threads(),
            "stay": asked.module.in_process,
        }
        try:
            child.send(message, limit_s=self._limit_s)
            while "step" in (reply := child.receive(limit_s=self._left_s(start_s))[0]):
                tell(reply["step"])
        except TimeoutError as error:
            raise ExportError(
                f"{name} did not end within {self._limit_s:g} s, and was ended. Leave the target out, or write it with "
                "jobs=0, which has no limit"
            ) from error
        except (EOFError, OSError) as error:
            ended = "was ended" if self._closed else child.farewell()
            raise ExportError(f"{name} {ended}. Leave the target out") from error
        return reply

    def _left_s(self, start_s: float) -> float:
        return max(0.001, self._limit_s - (time.monotonic() - start_s))


def _result(reply: Mapping[str, Any], target: str, child: Child | None) -> _Written | Exception:
    """Read what a process answers: what it wrote, or what was raised there."""
    if "foreign" in reply:
        return _Written(None)
    if "error" in reply:
        return _error(reply, target)
    contents: Contents = built(Contents, reply["contents"], "contents")
    return _Written(contents, tuple(reply["warnings"]), child)


def _error(reply: Mapping[str, Any], target: str) -> Exception:
    kind = getattr(errors, reply["error"], None) or getattr(builtins, reply["error"], None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        error: Exception = kind(reply["text"])
    else:
        error = ExportError(f"{target}: {reply['error']}: {reply['text']}")
    if not isinstance(error, errors.EdgeError):  # one of ours says all that there is to say
        error.add_note(f"In the process that wrote the file:\n{reply['trace']}")
    return error


def _raising(error: Exception) -> Callable[[Pending], Staged]:
    def finish(_: Pending) -> Staged:
        raise error

    return finish
