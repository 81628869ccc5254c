"""A published file over HTTP: goes on where it was cut, and is taken only with its published size and checksum."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_edge.locks import Lock
from lightning_edge.regular_files import check_regular

_BLOCK_BYTES = 1 << 20
_TIMEOUT_S = 60
# How often in a row a connection may bring nothing before that is the end of it.
_MOST_FAILURES = 3


def download(url: str, folder: Path, size_bytes: int, sha256: str, pause_s: float = 2.0) -> Path:
    """Download a file, or go on with one that was cut.

    What has come so far is beside it as ``<name>.part``; it stays there when the connection is lost, or the process.

    Args:
        url: Where the file is; the last part of its path is the file's name.
        folder: Where it goes; made if it is missing.
        size_bytes: Its published size; not a byte more is read.
        sha256: Its published checksum.
        pause_s: How long to wait after a connection that brought nothing.

    Returns:
        The file.

    Raises:
        OSError: If the connection brings nothing any more, the folder cannot be written, or another process downloads
            the same file.
        ValueError: If the file is not the published one. What came of it is removed.
    """
    path = folder / url.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock.take(path.with_name(f"{path.name}.lock"))
    if lock is None:
        raise OSError(f"another process downloads {path}; wait until it has ended")
    try:
        if not path.is_file():
            part = path.with_name(f"{path.name}.part")
            _complete(url, part, size_bytes, pause_s)
            _check(part, url, sha256)
            os.replace(part, path)
        else:
            _check(path, url, sha256)
    finally:
        lock.release()
    return path


def _complete(url: str, part: Path, size_bytes: int, pause_s: float) -> None:
    failures = 0
    while (have := _size(part)) < size_bytes:
        problem: Exception | str = "the connection was closed"
        try:
            _fetch(url, part, have, size_bytes)
        except (OSError, http.client.HTTPException) as error:
            problem = error
            # A file that is not there will not be there in two seconds either.
            failures = (
                _MOST_FAILURES if isinstance(error, HTTPError) and error.code in (401, 403, 404, 410) else failures
            )
        now = _size(part)
        failures = 0 if now > have else failures + 1
        if now < size_bytes and failures >= _MOST_FAILURES:
            raise OSError(
                f"{url} could not be downloaded into {str(part.parent)!r}: {problem}. {now:,} of {size_bytes:,} bytes "
                "are there, and the next run goes on from them. Or download it by hand, unpack it, and give its folder "
                "as data.folder."
            )
        if now < size_bytes:
            time.sleep(pause_s)


def _fetch(url: str, part: Path, have: int, size_bytes: int) -> None:
    """Read what is missing, or all of it from a server that does not know how to begin in the middle."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        given = response.headers.get("Content-Range", "")
        resumed = have > 0 and response.status == http.client.PARTIAL_CONTENT and given.startswith(f"bytes {have}-")
        done = have if resumed else 0
        length = response.headers.get("Content-Length")
        if length is not None and done + int(length) != size_bytes:
            raise ValueError(f"{url} has {done + int(length):,} bytes, not the published {size_bytes:,}")
        with part.open("ab" if resumed else "wb") as file:
            while block := response.read(_BLOCK_BYTES):
                if done + len(block) > size_bytes:
                    raise ValueError(f"{url} has more than the published {size_bytes:,} bytes")
                file.write(block)
                if 10 * (done + len(block)) // size_bytes > 10 * done // size_bytes:
                    rank_zero_info(f"{part.stem}: {(done + len(block)) / 1e6:,.0f} of {size_bytes / 1e6:,.0f} MB")
                done += len(block)


def _size(part: Path) -> int:
    try:
        return check_regular(part)
    except FileNotFoundError:
        return 0


def _check(path: Path, url: str, sha256: str) -> None:
    check_regular(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        path.unlink()
        raise ValueError(f"{url} gave a file with SHA-256 {found}, not the published {sha256}; it was removed")
