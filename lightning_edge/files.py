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

    Args:
        path: Where the file or folder shall be in the end; missing parent folders are made.

    Raises:
        ExportError: If the folder cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []
        with writing(path):
            self._make_parents()
            try:
                self._folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=path.parent))
            except OSError:
                self._remove_parents()
                raise
        self.staged = self._folder / path.name

    def accept(self) -> None:
        """Put what was written in the place of ``path``, in one step; a folder that was there is removed after.

        Raises:
            ExportError: If it cannot; what was at ``path`` is then still there.
        """
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
        shutil.rmtree(self._folder, ignore_errors=True)
        self._remove_parents()

    def _swap(self) -> None:
        """Replace where a folder is involved, which no system call does in one step."""
        old = self._folder / "old"
        if not self.path.exists():
            os.rename(self.staged, self.path)
            return
        os.rename(self.path, old)
        try:
            os.rename(self.staged, self.path)
        except OSError:
            os.rename(old, self.path)
            raise

    def _make_parents(self) -> None:
        missing = [folder for folder in (self.path.parent, *self.path.parent.parents) if not folder.exists()]
        for folder in reversed(missing):
            try:
                folder.mkdir(exist_ok=True)
            except OSError:
                self._remove_parents()
                raise
            self._made.append(folder)

    def _remove_parents(self) -> None:
        while self._made:
            with contextlib.suppress(OSError):
                self._made.pop().rmdir()


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
