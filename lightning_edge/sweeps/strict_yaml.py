"""Read YAML that people write: safe, without duplicate keys or aliases, and with ``1e-4`` as a number."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lightning_edge.errors import SweepError

# A sweep file has some dozen lines.
_MOST_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse aliases: a few lines of them stand for gigabytes."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that is there twice: YAML would keep the last one and say nothing."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-4 for text, for it has no point; everybody means the number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_text(path: Path) -> str:
    """Read a small text file.

    Raises:
        SweepError: If it is no regular file, too large, or no text.
    """
    try:
        if not path.is_file():
            raise SweepError(
                f"{path}: {'it is no file' if path.exists() else 'there is no such file'}; give a sweep file"
            )
        if path.stat().st_size > _MOST_BYTES:
            raise SweepError(f"{path}: {path.stat().st_size:,} bytes; a sweep file has less than {_MOST_BYTES:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(f"{path}: it cannot be read: {error}") from error


def load(text: str, name: str) -> Any:
    """Read one YAML document.

    Args:
        text: The document.
        name: What it is called in errors.

    Raises:
        SweepError: If it is no YAML, or has duplicate keys or aliases.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise SweepError(f"{name}: {place}{error.problem or 'it is no YAML'}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SweepError(f"{name}: it is no YAML: {error}") from error


def dump(value: Any) -> str:
    """Write plain values as YAML, in their order."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120))
