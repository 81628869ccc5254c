"""Ctrl-C and SIGTERM while files are written: what is half done is removed first. Knows nothing of files."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final

_ENDING = (signal.SIGINT, signal.SIGTERM)
# How long clean-up has before a further signal may end it.
_CLEAN_UP_S = 10.0
# How long after a signal was lost it comes again.
_AGAIN_S = 0.05


class _Terminated(BaseException):
    """SIGTERM, on its way up the stack."""


@contextmanager
def unwinding() -> Iterator[None]:
    """Within this context, the first Ctrl-C or SIGTERM unwinds the stack, and those right after it are left out.

    By itself, SIGTERM ends a process at once, without a ``finally``, and a second Ctrl-C ends the clean-up after the
    first. The process ends by SIGTERM all the same. Where somebody handles a signal, that stays as it is. A signal that
    comes while an object is deleted or collected is lost, since Python lets no exception out of there: it comes again.
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
    usual_hook = sys.unraisablehook
    if before:
        sys.unraisablehook = first.unraisable
    lost: int | None = None
    try:
        yield
        lost = first.lost
    except _Terminated:
        if signal.SIGTERM not in before:
            raise  # whoever set the handler ends the process
        terminated = True
    finally:
        first.end()
        sys.unraisablehook = usual_hook
        for number, handler in before.items():
            signal.signal(number, handler)
        if terminated:
            signal.raise_signal(signal.SIGTERM)
        elif lost is not None:
            signal.raise_signal(lost)


@final
class _First:
    """Raises for the first signal, and for none within some seconds after it: they would end the clean-up."""

    def __init__(self) -> None:
        self._raised_s: float | None = None
        self._again: threading.Timer | None = None
        self._usual_hook = sys.unraisablehook
        self.lost: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._raised_s is not None and now_s - self._raised_s < _CLEAN_UP_S:
            return
        self._raised_s, self.lost = now_s, None
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated

    def unraisable(self, found: sys.UnraisableHookArgs) -> None:
        """Note that Python dropped what was raised for a signal, and send the signal again."""
        if not issubclass(found.exc_type, KeyboardInterrupt | _Terminated):
            self._usual_hook(found)
            return
        self.lost, self._raised_s = signal.SIGINT if found.exc_type is KeyboardInterrupt else signal.SIGTERM, None
        self._again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), self.lost))
        self._again.daemon = True
        self._again.start()

    def end(self) -> None:
        """Send nothing any more."""
        if self._again is not None:
            self._again.cancel()


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
