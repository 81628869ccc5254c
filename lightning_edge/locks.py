"""A lock that the system releases with the process that holds it, however that ends: a file, with ``flock``."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Self, final

# File systems without locks say one of these.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@final
class Lock:
    """A lock that is held; see `take`."""

    def __init__(self, path: Path, opened: int) -> None:
        self._path = path
        self._opened: int | None = opened

    @classmethod
    def take(cls, path: Path, *, make: bool = True, wait: bool = False, needed: bool = False) -> Self | None:
        """Take the lock of a file.

        Args:
            path: The file; its folder is there.
            make: Whether to make it if it is not there.
            wait: Whether to wait for the one that holds it.
            needed: Whether a file system without locks is an error. What is locked there is not protected otherwise,
                and works.

        Returns:
            The lock; ``None`` if another holds it, in this process or elsewhere, or the file is not there to be taken.

        Raises:
            OSError: If the file cannot be made, opened or, where that is needed, locked.
        """
        path = path.absolute()  # the current folder may be another one when it is released
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if make else 0)
        while True:
            try:
                opened = os.open(path, flags, 0o600)
            except FileNotFoundError:
                if make:
                    raise
                return None
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(opened)
                return None
            except OSError as error:
                if needed or error.errno not in _WITHOUT_LOCKS:
                    os.close(opened)
                    raise
            except BaseException:  # Ctrl-C while it waits
                os.close(opened)
                raise
            if _is_at(path, opened):
                return cls(path, opened)
            os.close(opened)  # whoever held it has removed the file by now

    def fileno(self) -> int:
        """Give the descriptor of the open file, for a child process that shall hold the lock, too.

        Raises:
            ValueError: If it was released.
        """
        if self._opened is None:
            raise ValueError(f"the lock of {self._path} was released")
        return self._opened

    def close(self) -> None:
        """Let the lock go here and leave the file; children that were given the descriptor hold it until they end.

        Safe to call twice.
        """
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None

    def release(self) -> None:
        """Remove the file and let the lock go, for children too; safe to call twice."""
        if self._opened is None:
            return
        opened, self._opened = self._opened, None
        if _is_at(self._path, opened):
            self._path.unlink(missing_ok=True)
        # Not by closing alone: a process that was forked meanwhile has it open, too.
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_UN)
        os.close(opened)


def _is_at(path: Path, opened: int) -> bool:
    try:
        found, ours = os.stat(path, follow_symlinks=False), os.fstat(opened)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)
