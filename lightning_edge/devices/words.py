"""What programs and devices say, as one line that a terminal may show."""

from __future__ import annotations

from typing import Any


def last_line(found: bytes) -> str:
    """The last line of what a program printed that says something, 200 characters of it at most."""
    lines = ["".join(filter(str.isprintable, line)).strip() for line in found.decode(errors="replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "")


def plain(text: Any, most: int) -> str:
    """What a device says, as one line that a terminal may show."""
    return "".join(filter(str.isprintable, " ".join(text.split())))[:most] if isinstance(text, str) else ""
