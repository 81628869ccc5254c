"""Our warnings: each names the line of the user's own code that led to it. Knows no torch."""

from __future__ import annotations

import sys
import warnings

# Packages that may stand between the user's line and the one that warns: this one, and those that call it.
_BETWEEN = {"concurrent", "contextlib", "jsonargparse", "lightning", "lightning_edge", "runpy", "threading", "torch"}


class EdgeWarning(UserWarning):
    """Base of all warnings of this package: something works, but not as the user may think."""


def warn(message: str, category: type[EdgeWarning] = EdgeWarning) -> None:
    """Warn at the user's line that called this package, directly or through Lightning.

    Args:
        message: What was found, and what to do.
        category: Kind of the warning.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def print_messages_only() -> None:
    """From here on, print our warnings without a place in code: who runs a command has no line that they could name."""
    warnings.formatwarning = _formatted


_usual_format = warnings.formatwarning


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if issubclass(category, EdgeWarning):
        return f"warning: {message}\n"
    return _usual_format(message, category, filename, lineno, line)
