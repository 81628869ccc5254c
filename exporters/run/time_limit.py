"""A time limit on work in this process, such as reading a file that was made to be read without end."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class _Stopped(BaseException):
    """Ends the work; no `Exception`, so that nothing takes it for a mistake in the file."""


def within(limit_s: float, work: Callable[[], Result]) -> Result:
    """Do work in a thread of its own, and end it where it takes too long.

    Python's own loops end then; a call into a library ends when that comes back.

    Args:
        limit_s: Seconds that it may take.
        work: The work; what it raises is raised here.

    Raises:
        TimeoutError: If it takes longer.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="lightning-edge reading a file")
    thread.start()
    try:
        thread.join(min(limit_s, threading.TIMEOUT_MAX))
    finally:
        if thread.is_alive() and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stopped))
    if errors and not isinstance(errors[0], _Stopped):
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]
