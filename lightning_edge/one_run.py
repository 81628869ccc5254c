"""One run at a time writes into a folder: files of one and a manifest of another would be mixed without a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_edge.errors import EdgeError
from lightning_edge.files import make_folders, remove_folders, writing
from lightning_edge.locks import Lock

NAME = ".lightning-edge.lock"


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Within this context, this is the only run that exports into a folder.

    Args:
        folder: The folder; made if it is not there, and removed again if nothing is written into it.

    Raises:
        EdgeError: If another run is at it.
        ExportError: If the folder cannot be written to.
    """
    with writing(folder):
        made = make_folders(folder)
        try:
            lock = Lock.take(folder / NAME)
        except OSError:
            remove_folders(made)
            raise
    if lock is None:
        raise EdgeError(
            f"another run exports into {str(folder)!r} at this moment, and its files would be mixed with those of this "
            "one. Wait until it has ended, or give another folder (dirpath)"
        )
    try:
        yield
    finally:
        lock.release()
        remove_folders(made)
