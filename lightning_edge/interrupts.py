"""Ctrl-C and SIGTERM while files are written: what is half done is removed first. Knows nothing of files."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final

_ENDING = (signal.SIGINT, signal.SIGTERM)
# How long clean-up has before a further signal may end it.
_CLEAN_UP_S = 10.0


class _Terminated(BaseException):
    """SIGTERM, on its way up the stack."""


@contextmanager
def unwinding() -> Iterator[None]:
    """Within this context, the first Ctrl-C or SIGTERM unwinds the stack, and those right after it are left out.

    By itself, SIGTERM ends a process at once, without a ``finally``, and a second Ctrl-C ends the clean-up after the
    first. The process ends by SIGTERM all the same. Where somebody handles a signal, that stays as it is.
    """
    if not _is_main():
        yield
        return
    first = _First()
    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: handler for number, handler in usual.items() if signal.getsignal(number) == handler}
    for number in before:
        signal.signal(number, first)
    terminated = False
    try:
        yield
    except _Terminated:
        if signal.SIGTERM not in before:
            raise  # whoever set the handler ends the process
        terminated = True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if terminated:
            signal.raise_signal(signal.SIGTERM)


@final
class _First:
    """Raises for the first signal, and for none within some seconds after it: they would end the clean-up."""

    def __init__(self) -> None:
        self._raised_s: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._raised_s is not None and now_s - self._raised_s < _CLEAN_UP_S:
            return
        self._raised_s = now_s
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within this context, Ctrl-C and SIGTERM wait: a second one must not end the clean-up after the first."""
    if not _is_main():
        yield
        return
    waiting: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    # A handler that C code has set is None, and cannot be set again.
    before = {number: handler for number in _ENDING if (handler := signal.getsignal(number)) is not None}
    for number in before:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def _is_main() -> bool:
    """Whether this is the only thread that may set handlers."""
    return threading.current_thread() is threading.main_thread()
