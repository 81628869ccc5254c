"""Reading what somebody else has put on the disk: regular files only, and their sizes before their contents.

A pipe, a device or a socket of a file's name would block whoever opens it, or never end. Knows no format.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

# An exported package has three to six.
MOST_MEMBERS = 10_000

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of(path: Path) -> str:
    """Say what lies at a path, behind its links: ``"a file"``, ``"a folder"``, ``"a named pipe"`` and others.

    Raises:
        OSError: If nothing does, or it cannot be looked at.
    """
    return _kind(os.stat(path).st_mode)


def check_regular(path: Path, most_bytes: int | None = None) -> int:
    """Refuse whatever is no regular file, or is too large, without opening it.

    Args:
        path: The file.
        most_bytes: The most bytes that it may have; any number if not given.

    Returns:
        Its bytes.

    Raises:
        OSError: If it is not there, or cannot be looked at.
        ValueError: If it is something else, or larger.
    """
    found = os.stat(path)
    _check(path, found, most_bytes)
    return found.st_size


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Read a regular file that is not too large.

    Args:
        path: The file.
        most_bytes: The most bytes that it may have.

    Raises:
        OSError: If it is not there, or cannot be read.
        ValueError: If it is something else, or larger.
    """
    check_regular(path, most_bytes)
    # What lies there may be another thing by now: not to wait is asked for in opening it, and it is looked at again.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
        _check(path, os.fstat(stream.fileno()), most_bytes)
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(_too_large(path, len(data), most_bytes))
    return data


def _check(path: Path, found: os.stat_result, most_bytes: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is {_kind(found.st_mode)} and not a file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise ValueError(_too_large(path, found.st_size, most_bytes))


def _kind(mode: int) -> str:
    return next((name for matches, name in _KINDS if matches(mode)), "a file")


def _too_large(path: Path, size_bytes: int, most_bytes: int) -> str:
    return f"{path} has {size_bytes:,} bytes or more; {most_bytes:,} are allowed"


def check_members(folder: Path, most_bytes: int) -> None:
    """Refuse a folder that holds, at any depth and behind links too, what is neither a file nor a folder.

    Args:
        folder: The folder.
        most_bytes: The most bytes that its files may have together.

    Raises:
        OSError: If a part of it cannot be looked at.
        ValueError: If there is something else, more than `MOST_MEMBERS` entries or so many bytes, or a link to a
            folder around it.
    """
    todo: list[tuple[Path, tuple[tuple[int, int], ...]]] = [(folder, ())]
    count = size_bytes = 0
    while todo:
        place, above = todo.pop()
        found = os.stat(place)
        identity = (found.st_dev, found.st_ino)
        if identity in above:
            raise ValueError(f"{place} is a link to a folder that it lies in")
        with os.scandir(place) as entries:
            for entry in entries:
                count += 1
                if count > MOST_MEMBERS:
                    raise ValueError(f"{folder} holds more than {MOST_MEMBERS:,} files")
                mode = entry.stat().st_mode
                size_bytes += entry.stat().st_size
                if size_bytes > most_bytes:
                    raise ValueError(_too_large(folder, size_bytes, most_bytes))
                if stat.S_ISDIR(mode):
                    todo.append((Path(entry.path), (*above, identity)))
                elif not stat.S_ISREG(mode):
                    raise ValueError(f"{entry.path} is {_kind(mode)} and not a file")
