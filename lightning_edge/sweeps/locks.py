"""Locks of a sweep's folder, whose errors say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_edge.errors import SweepError
from lightning_edge.locks import Lock


def take(path: Path, wait: bool = False) -> Lock | None:
    """Take a lock, to be let go by `Lock.close`: a training that was given it goes on holding it.

    Args:
        path: The file; it is made if it is not there.
        wait: Whether to wait for the process that has it.

    Returns:
        The lock; ``None`` if another holds it.

    Raises:
        SweepError: If the file system has no locks, or the folder cannot be written to.
    """
    try:
        return Lock.take(path, wait=wait, needed=True)
    except OSError as error:
        raise SweepError(f"{path} cannot be locked: {error.strerror}. Give another --folder") from error


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait for a lock, and hold it within the context."""
    lock = take(path, wait=True)
    assert lock is not None  # it was waited for
    try:
        yield
    finally:
        lock.close()
