"""A runtime in a process of its own: what crashes, hangs or corrupts memory there is an error here, and no more."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_edge import errors
from lightning_edge.errors import RunnerError
from lightning_edge.exporters.run.calls import Samples, TensorSpec, stack
from lightning_edge.exporters.run.child import Child
from lightning_edge.exporters.run.runner import Intermediate, Runner
from lightning_edge.wording import counted

DEFAULT_TIME_LIMIT_S = 60.0

# How long a process may take to import torch and a runtime: 2 to 3 s where they lie on a disk of this machine.
_START_LIMIT_S = 300.0
# So many calls are asked for one by one, after which the memory that the file takes is known.
_CALLS_ALONE = 8
# Then samples are sent in parts of so many bytes at most, which take about so long, and no longer than this share of
# the limit of one sample.
_PART_S = 0.1
_PART_OF_LIMIT = 0.1
_PART_BYTES = 2**24
# What the process runs.
WORKER = "lightning_edge.exporters.run.worker"


class RuntimeFault(Exception):
    """What a runtime raised in its process, other than an error of this package.

    Attributes:
        printed: What the process had printed by then, as far as it is kept.
    """

    printed: str = ""


@final
class Isolated(Runner):
    """Runs a file that is loaded and run in a process of its own, one process for each file.

    The process is started here and ends with this object. It belongs to the process that made it: a copy that
    ``os.fork`` makes of that one cannot use it.

    Args:
        module: Dotted name of the target's module.
        path: The file.
        threads: Threads of the runtime, and of torch in its process.
        time_limit_s: Seconds that loading the file, or running one sample, may take.
        child: A process that serves as the worker does, such as the one that wrote the file; a new one if not given.
        reference: Whether it runs with reference kernels.

    Attributes:
        runtime: As `Runner`.
        is_reference: As `Runner`.
        inputs: As `Runner`.
        load_ms: Milliseconds from the path to a runner that is ready, in the process, without starting that.

    Raises:
        RunnerError: If the process cannot be started, ends, or takes longer than the limit.
        RuntimeFault: If the runtime refuses the file.
    """

    def __init__(
        self,
        module: str,
        path: Path,
        threads: int,
        time_limit_s: float,
        child: Child | None = None,
        reference: bool = False,
    ) -> None:
        self._name = path.name
        self._time_limit_s = time_limit_s
        self._turn = threading.Lock()
        self._end: str | None = None
        self._calls_alone = _CALLS_ALONE
        self._calls_at_once = 1
        self._memory_bytes: int | None = None
        self.runtime = module.rpartition(".")[2]
        try:
            self._child = child or Child(WORKER)
        except OSError as error:
            raise RunnerError(
                f"cannot start a process to run {self._name} in: {error}. Give isolated=False to run it in this one"
            ) from error
        self._finish = self._child.finish
        try:
            self._ask("while it started", {"do": "start", "module": module}, limit_s=_START_LIMIT_S)
            asked = {"do": "load", "path": str(path.absolute()), "threads": threads, "reference": reference}
            reply, _ = self._ask("while it loaded the file", asked)
        except BaseException:
            self._finish()
            raise
        self.runtime = str(reply["runtime"])
        self.is_reference = bool(reply["is_reference"])
        self.inputs = tuple(TensorSpec(tuple(shape), getattr(torch, dtype)) for shape, dtype in reply["inputs"])
        self.load_ms = float(reply["load_ms"])

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one sample."""
        return self._ask("while it ran a sample", {"do": "run"}, tensors)[1]

    def run_all(self, samples: Samples, most: int) -> list[Tensor]:
        """Run on several samples, sent in parts: to ask for each of them takes longer than small networks do."""
        if samples.count <= most:
            return self(samples.tensors)
        outputs, start = [], 0
        while start < samples.count:
            if self._calls_alone:
                self._calls_alone -= 1
                outputs.append(self(samples.part(start, most).tensors))
                start += most
                continue
            if self._memory_bytes is None:
                # What is sent from here on takes memory there that is not the file's.
                self._memory_bytes = self.peak_memory_bytes()
            part = samples.part(start, self._calls_at_once * most)
            outputs.append(self._run_part(part, most))
            start += part.count
        return stack(outputs)

    def _run_part(self, part: Samples, most: int) -> list[Tensor]:
        """Run on samples that are sent together, and choose how many that is the next time."""
        message = {"do": "run_all", "carries": part.carries, "count": part.count, "most": most}
        begun_s = time.monotonic()
        outputs = self._ask(f"while it ran {counted(part.count, 'sample')}", message, part.tensors)[1]
        took_s, wanted_s = time.monotonic() - begun_s, min(_PART_S, _PART_OF_LIMIT * self._time_limit_s)
        if took_s > wanted_s:
            self._calls_at_once = max(1, self._calls_at_once // 2)
        elif took_s < wanted_s / 2 and part.count == self._calls_at_once * most:
            self._calls_at_once *= 1 if 2 * part.count * part.size_bytes > _PART_BYTES else 2
        return outputs

    def timed_call(self, tensors: list[Tensor]) -> Callable[[], int]:
        """Hand a sample over, and give a function that runs it there and tells the nanoseconds that the runner took."""
        self._ask("while it took a sample", {"do": "keep"}, tensors)
        return lambda: int(self._ask("while it ran a sample", {"do": "time"})[0]["ns"])

    def intermediates(self, tensors: list[Tensor]) -> list[Intermediate] | None:
        """Run on one sample and give the quantized values inside the file; ``None`` if the runtime does not tell."""
        reply, values = self._ask("while it ran a sample", {"do": "intermediates"}, tensors)
        if reply["found"] is None:
            return None
        return [
            Intermediate(operation, scale, zero_point, value)
            for (operation, scale, zero_point), value in zip(reply["found"], values, strict=True)
        ]

    def peak_memory_bytes(self) -> int | None:
        """Ask by how much the resident memory of the process has grown at its peak since before the file was loaded.

        It is what the file took with everything that was run so far, or before several samples were sent at once:
        weights, activations, the runtime's workspace, and what of its code was not yet in memory. ``None`` where the
        system does not tell.
        """
        if self._memory_bytes is not None:
            return self._memory_bytes
        found = self._ask("between two samples", {"do": "memory"})[0]["peak_memory_bytes"]
        return None if found is None else int(found)

    def close(self) -> None:
        """End the process; who waits for it in another thread gets an error."""
        self._finish()

    def _ask(
        self, when: str, message: dict[str, Any], tensors: Sequence[Tensor] = (), limit_s: float | None = None
    ) -> tuple[dict[str, Any], list[Tensor]]:
        if os.getpid() != self._child.owner:
            raise RunnerError(f"{self._name} was loaded in another process; load it again in this one")
        with self._turn:
            if self._end is not None:
                raise RunnerError(f"{self._end} Load it again")
            try:
                self._child.send(message, tensors, limit_s=limit_s or self._time_limit_s)
                reply, outputs = self._child.receive()
            except TimeoutError as error:
                limit = f"time_limit_s={self._time_limit_s:g}" if limit_s is None else f"{limit_s:g} s"
                self._end = (
                    f"{self._name}: {self.runtime} did not answer within {limit} {when}, and its process was ended. "
                    "If it is slow and does not hang, give a larger time_limit_s."
                )
                self._finish()
                raise RunnerError(self._end) from error
            except (EOFError, OSError) as error:
                self._end = f"{self._name}: the process of {self.runtime} {self._child.farewell()} {when}."
                self._finish()
                raise RunnerError(self._end) from error
            except BaseException:
                # An answer is on its way that nobody waits for.
                self._end = f"{self._name}: a call was interrupted, and the process of {self.runtime} ended."
                self._finish()
                raise
            printed = self._child.printed() if "error" in reply else ""
            self._child.forget_words()
        if "error" in reply:
            raised = getattr(errors, reply["error"], RuntimeFault)(reply["text"])
            if isinstance(raised, RuntimeFault):
                raised.printed = printed
            raise raised
        return reply, outputs
