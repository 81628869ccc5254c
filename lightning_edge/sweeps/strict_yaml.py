"""YAML of sweeps: what people write, read strictly, and configurations as they are written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_edge.errors import SweepError
from lightning_edge.regular_files import read_regular
from lightning_edge.yaml_files import parse_yaml

# A sweep file has some dozen lines; the configuration of a trial may be longer.
_MOST_BYTES = 1_000_000


def read_text(path: Path) -> str:
    """Read a small text file.

    Raises:
        SweepError: If it is no regular file, too large, or no text.
    """
    try:
        return read_regular(path, _MOST_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        raise SweepError(f"{path}: there is no such file; give a sweep file") from error
    except OSError as error:
        raise SweepError(f"{path}: it cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SweepError(f"{path}: it is no text in UTF-8: {error}") from error
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
        return parse_yaml(text, name)
    except ValueError as error:
        raise SweepError(str(error)) from error


def dump(value: Any) -> str:
    """Write plain values as YAML, in their order."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120))
