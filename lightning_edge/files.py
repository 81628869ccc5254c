"""Files that appear whole or not at all: written beside, looked at, then moved into place."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lightning_edge.errors import ExportError
from lightning_edge.interrupts import undisturbed
from lightning_edge.locks import Lock

# How the folders begin that files are written in, which runs that were killed leave.
STAGING = ".staging-"
# In a folder of ours: the mark that it is one, whose lock is held as long as its run is alive; and what stood there.
_ALIVE, _OLD = ".lightning-edge.alive", "old"

_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "it is larger than a file may be here (ulimit -f); raise the limit or choose another folder",
    errno.EROFS: "the folder is read-only; choose another one",
    errno.EACCES: "the folder is not yours to write; choose another one",
    errno.EPERM: "the folder is not yours to write; choose another one",
    errno.ENOTDIR: "a part of its path is a file; choose another folder",
    errno.EEXIST: "a part of its path is a file; choose another folder",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


class StagedPath:
    """A place beside ``path``, in the same folder and of the same name, to write before it takes the place of ``path``.

    What runs that were killed have left there is removed, and an old folder that one had set aside put back.

    Args:
        path: Where the file or folder shall be in the end; missing parent folders are made.

    Raises:
        ExportError: If the folder cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []
        with undisturbed(), writing(path):
            self._made = make_folders(path.parent)
            try:
                _sweep(path.parent)
                self._folder, self._lock = _make_staging(path.parent)
            except OSError:
                remove_folders(self._made)
                raise
        self.staged = self._folder / path.name

    def accept(self) -> None:
        """Put what was written in the place of ``path``, in one step; a folder that was there is removed after.

        Raises:
            ExportError: If it cannot; what was at ``path`` is then still there.
        """
        with undisturbed():
            try:
                with writing(self.path):
                    _flush(self.staged)
                    if self.staged.is_dir() or self.path.is_dir():
                        self._swap()
                    else:
                        os.replace(self.staged, self.path)
            except ExportError:
                self.discard()
                raise
            self._made = []
            self.discard()

    def discard(self) -> None:
        """Remove what was written, and the parent folders made for it; safe to call twice."""
        with undisturbed():
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.release()
            remove_folders(self._made)

    def _swap(self) -> None:
        """Replace where a folder is involved, which no system call does in one step."""
        old = self._folder / _OLD
        if not self.path.exists():
            os.rename(self.staged, self.path)
            return
        os.rename(self.path, old)
        try:
            os.rename(self.staged, self.path)
        except OSError:
            os.rename(old, self.path)
            raise


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and those around it that are missing, all of them or none.

    Returns:
        Those that were made, from the outermost on.

    Raises:
        OSError: If one cannot be made.
    """
    made: list[Path] = []
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        try:
            each.mkdir(exist_ok=True)
        except OSError:
            remove_folders(made)
            raise
        made.append(each)
    return made


def remove_folders(made: list[Path]) -> None:
    """Remove folders that `make_folders` has made, as far as they are empty; safe to call twice."""
    while made:
        with contextlib.suppress(OSError):
            made.pop().rmdir()


def _make_staging(parent: Path) -> tuple[Path, Lock]:
    """Make a folder for one `StagedPath`, with a lock that tells that its run is alive."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=parent))
        try:
            lock = Lock.take(folder / _ALIVE)
        except FileNotFoundError:
            continue  # swept by another run, before it was locked
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if lock is not None:
            return folder, lock


def _sweep(parent: Path) -> None:
    """Remove what runs that are not alive any more have left behind."""
    for folder in parent.glob(f"{STAGING}*"):
        # Only what has our mark is ours, and only what nobody holds is left.
        with contextlib.suppress(OSError):
            if folder.is_symlink() or (lock := Lock.take(folder / _ALIVE, make=False)) is None:
                continue
            for old in [folder / _OLD] if (folder / _OLD).exists() else []:
                # Killed between two renames: the new one stands here under its name, and nothing there.
                names = [entry.name for entry in folder.iterdir() if entry.name not in (_OLD, _ALIVE)]
                if len(names) == 1 and not (parent / names[0]).exists():
                    os.rename(old, parent / names[0])
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def replace_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all, with the folders it needs, and return its path.

    Raises:
        ExportError: If it cannot be written; what was at ``path`` is then as it was.
    """
    place = StagedPath(path)
    try:
        with writing(path):
            place.staged.write_text(text, encoding="utf-8")
        place.accept()
    finally:
        place.discard()
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one message that says what to do.

    Raises:
        ExportError: In place of any ``OSError``.
    """
    try:
        yield
    except OSError as error:
        cause = _CAUSES.get(_number(error), f"{error.strerror or error}; choose another folder")
        kept = f" The old {path.name} is as it was." if os.path.lexists(path) else ""
        raise ExportError(f"cannot write {path}: {cause}.{kept}") from error


def _number(error: OSError) -> int:
    """The system's number for what went wrong; shutil has it in the text of a list only, of all files that failed."""
    found = re.search(r"\[Errno (\d+)\]", str(error))
    return error.errno or (int(found.group(1)) if found else 0)


def _flush(path: Path) -> None:
    """Have the bytes on the disk before the name points at them, or a power cut leaves an empty file."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
