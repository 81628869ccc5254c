"""Every error lightning-edge raises on purpose, and the one way it asks for an optional package.

EdgeError
├── CompressionError      the network cannot be found, captured or quantized
├── RecordError           a checkpoint and the phases of this run disagree
├── ExportError           a target could not write the network, or wrote something else than was asked
│   └── AgreementError    the exported file computes something else than the network it came from
├── RunnerError           an exported file does not load or does not run
├── DeviceError           a device cannot be reached, or cannot run files at all
├── BudgetError           a file is larger, slower or less accurate than its budget allows
├── ManifestError         the manifest of a folder cannot be read, or does not say what a manifest says
├── SweepError            a sweep file is wrong, or a folder is not that of its sweep
└── MissingExtraError     an optional package is not installed (also an ImportError)

Bad argument values stay ``ValueError`` and ``TypeError``. Every message says what was given, what is
allowed, and what to do.
"""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from types import ModuleType

_COLOR = re.compile(r"\x1b\[[\d;]*m")


class EdgeError(Exception):
    """Base of all errors of this package."""


class CompressionError(EdgeError):
    """The network cannot be found, captured or quantized."""


class RecordError(EdgeError):
    """A checkpoint and the phases of this run disagree."""


class ExportError(EdgeError):
    """A target could not write the network, or wrote something else than was asked."""


class AgreementError(ExportError):
    """The exported file computes something else than the network it came from."""


class RunnerError(EdgeError):
    """An exported file does not load or does not run."""


class DeviceError(EdgeError):
    """A device cannot be reached, or cannot run files at all."""


class BudgetError(EdgeError):
    """A file is larger, slower or less accurate than its budget allows."""


class ManifestError(EdgeError):
    """The manifest of a folder cannot be read, or does not say what a manifest says."""


class SweepError(EdgeError):
    """A sweep file is wrong, or a folder is not that of its sweep."""


# Status of a `fit` that a HopelessError ends; the sweep that started it knows it by that.
HOPELESS = 4


class HopelessError(EdgeError):
    """A training was ended because its validation metric is beyond what the sweep asks for."""


class MissingExtraError(EdgeError, ImportError):
    """An optional package is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra of lightning-edge brings it.

    Args:
        module: Dotted name of the module to import.
        extra: Name of the extra in ``pyproject.toml`` that installs it.

    Raises:
        MissingExtraError: If the module, or something it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{module!r} cannot be imported ({error}). {_advice(extra)}") from error


def check_installed(module: str, extra: str) -> None:
    """Make sure that ``module`` is there without importing it, so that one can ask long before it is needed.

    Args:
        module: Name of a top-level module.
        extra: Name of the extra in ``pyproject.toml`` that installs it.

    Raises:
        MissingExtraError: If it is not installed.
    """
    if find_spec(module) is None:
        raise MissingExtraError(f"{module!r} is not installed. {_advice(extra)}")


def _advice(extra: str) -> str:
    return f"Install it with: pip install 'lightning-edge[{extra}]'"


def printable(text: str) -> str:
    """Escape what a terminal acts on or cannot show: control characters, halves of characters."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def first_line(error: BaseException) -> str:
    """Give the first line an exception says, without colors, or its type where it says nothing."""
    lines = [line.strip() for line in _COLOR.sub("", str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
