"""YAML of sweeps: what people write, read strictly, and configurations as they are written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_edge import yaml_files
from lightning_edge.errors import SweepError

# A sweep file has some dozen lines; the configuration of a trial may be longer.
_MOST_BYTES = 1_000_000


def read_text(path: Path) -> str:
    """Read a small text file.

    Raises:
        SweepError: If it is no regular file, too large, or no text.
    """
    try:
        return yaml_files.read_text(path, _MOST_BYTES)
    except ValueError as error:
        raise SweepError(f"{error}; give a sweep file") from error


def load(text: str, name: str) -> Any:
    """Read one YAML document.

    Args:
        text: The document.
        name: What it is called in errors.

    Raises:
        SweepError: If it is no YAML of plain values, has a key twice, or aliases that stand for very much.
    """
    try:
        return yaml_files.parse_yaml(text, name)
    except ValueError as error:
        raise SweepError(str(error)) from error


def whole(key: str, value: Any) -> int:
    """Give a value that is a whole number from 1 on.

    Raises:
        SweepError: Naming the key, if it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SweepError(f"{key}: given {value!r}; allowed: a whole number from 1 on")
    return value


def dump(value: Any) -> str:
    """Write plain values as YAML, in their order."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120))
