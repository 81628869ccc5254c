"""`Pipes`: a process of this machine as the way to a program, for devices that another program leads to."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, final

from lightning_edge.devices.device import Channel, Farewell
from lightning_edge.devices.words import last_line

# How long a runner may take to put its things away, once nobody asks any more.
_LAST_BREATH_S = 5.0
_WORDS_BYTES = 2**12


@final
class Pipes(Channel):
    """A process of this machine, through its pipes.

    Args:
        command: The program and its arguments.
        environment: Variables of its environment beside those of this process.

    Raises:
        OSError: If there is no such program.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C is for the user's process, which ends this one
            )
        except OSError:
            words.close()
            raise
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._words = process, words
        self._in, self._out = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._farewell: Farewell | None = None
        self._finish = weakref.finalize(self, _finish, process, words)

    def write(self, data: bytes, limit_s: float) -> None:
        """Write to its standard input."""
        view, until = memoryview(data), time.monotonic() + limit_s
        while view:
            if not select.select([], [self._in], [], max(0.0, until - time.monotonic()))[1]:
                raise TimeoutError
            try:
                view = view[os.write(self._in, view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise EOFError("the process is gone") from error

    def read(self, count: int, limit_s: float) -> bytes:
        """Read from its standard output."""
        parts, until = bytearray(), time.monotonic() + limit_s
        while len(parts) < count:
            if not select.select([self._out], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(self._out, min(count - len(parts), 2**20))
            if not part:
                raise EOFError("the process is gone")
            parts += part
        return bytes(parts)

    def close(self, pids: Sequence[int] = ()) -> Farewell:
        """End it, and what it started."""
        if self._farewell is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                code = self._process.wait(_LAST_BREATH_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)  # it began a session of its own
                code = self._process.wait()
            size = os.fstat(self._words.fileno()).st_size
            found = os.pread(self._words.fileno(), _WORDS_BYTES, max(0, size - _WORDS_BYTES))
            self._farewell = Farewell(128 - code if code < 0 else code, last_line(found))
            self._finish()
        return self._farewell


def _finish(process: subprocess.Popen[bytes], words: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for opened in (process.stdin, process.stdout, words):
        if opened is not None:
            opened.close()
