"""Locks that end with the process that holds them, however it ends: the system's own, on a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_edge.errors import SweepError


class Lock:
    """A file that one process at a time can hold, with the children that are given its descriptor.

    Args:
        path: The file; it is made if it is not there, and stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def descriptor(self) -> int:
        """The open file, for a child process that shall hold it, too.

        Raises:
            SweepError: If it is not held.
        """
        if self._descriptor is None:
            raise SweepError(f"{self.path} is not held")
        return self._descriptor

    def acquire(self, wait: bool = False) -> bool:
        """Take it; whether it is held now.

        Args:
            wait: Whether to wait for the process that has it.

        Raises:
            SweepError: If the file system has no locks, or the folder cannot be written to.
        """
        try:
            import fcntl
        except ImportError as error:
            raise SweepError("sweeps need a system with file locks, such as Linux or macOS") from error
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SweepError(f"{self.path} cannot be written: {error.strerror}. Give another --folder") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:
            os.close(descriptor)
            raise SweepError(
                f"{self.path} cannot be locked: {error.strerror}. Give a --folder on another disk"
            ) from error
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Give it up; safe to call twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait for a lock, and hold it within the context."""
    lock = Lock(path)
    lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()
