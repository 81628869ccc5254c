"""A Python process of our own that answers messages. What it prints is kept, and how it ended is put in words."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from typing import IO, Any, final

from torch import Tensor

from lightning_edge.exporters.run import messages

# What the process prints is kept for the message about its end, this much of it.
_WORDS_BYTES = 2**16
# How long a process may take from closing its end to being gone; writing a core dump takes some time.
_LAST_BREATH_S = 10.0


@final
class Child:
    """``python -m <module> <socket>``, which finds what this process finds and reads nothing.

    It ends with this object and belongs to the process that made it: a copy that ``os.fork`` makes leaves it alone.

    Args:
        module: Dotted name of what it runs; that serves the socket whose number is its one argument.

    Attributes:
        owner: Number of the process that made it.
        process: The process.
        words: What it has printed.
        finish: Ends it at once: it has nothing to put in order. Safe to call twice.

    Raises:
        OSError: If it cannot be started.
    """

    def __init__(self, module: str) -> None:
        self.owner = os.getpid()
        # A file and no pipe: a pipe that nobody reads fills up, and then whoever prints into it waits forever.
        self.words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._connection, theirs = socket.socketpair()
        try:
            self.process = _start(module, theirs, self.words)
        except OSError:
            self._connection.close()
            self.words.close()
            raise
        finally:
            theirs.close()
        self.finish = weakref.finalize(self, _finish, self.owner, self.process, self._connection, self.words)

    def send(self, message: dict[str, Any], tensors: Sequence[Tensor] = (), *, limit_s: float) -> None:
        """Send a message; `receive` has the same time limit then.

        Raises:
            OSError: If the process is gone, or does not read within the limit.
        """
        self._connection.settimeout(limit_s)
        messages.send(self._connection, message, tensors)

    def receive(self, *, limit_s: float | None = None) -> tuple[dict[str, Any], list[Tensor]]:
        """Wait for a message; as long as the last limit was if none is given.

        Raises:
            EOFError: If the process is gone.
            OSError: If the connection breaks, or nothing comes within the time limit.
        """
        if limit_s is not None:
            self._connection.settimeout(limit_s)
        return messages.receive(self._connection)

    def farewell(self) -> str:
        """How the process ended, in words, with the last that it said."""
        try:
            code = self.process.wait(_LAST_BREATH_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        words = self._last_words()
        if -code == signal.SIGKILL:
            words = words or "the system may have been out of memory"
        ended = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with status {code}"
        return f"{ended} ({words})" if words else ended

    def printed(self) -> str:
        """What it has printed, the last of it."""
        size = os.fstat(self.words.fileno()).st_size
        found = os.pread(self.words.fileno(), _WORDS_BYTES, max(0, size - _WORDS_BYTES))
        return found.decode(errors="replace")

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.printed().splitlines()]
        return next((line[:200] for line in reversed(lines) if line), "")

    def forget_words(self) -> None:
        """Keep a process that prints at every call from filling the disk."""
        if os.fstat(self.words.fileno()).st_size > _WORDS_BYTES:
            os.ftruncate(self.words.fileno(), 0)
            os.lseek(self.words.fileno(), 0, os.SEEK_SET)  # where the process goes on writing: it is one open file


def _start(module: str, connection: socket.socket, words: IO[bytes]) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # -P: sys.path is as here, without the current folder put before it. A session of its own: Ctrl-C is for the user's
    # process, which ends this one.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(connection.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=words,
        stderr=words,
        env={**os.environ, "PYTHONPATH": paths},
        pass_fds=[connection.fileno()],
        start_new_session=True,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _finish(owner: int, process: subprocess.Popen[bytes], connection: socket.socket, words: IO[bytes]) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()
    connection.close()
    words.close()
