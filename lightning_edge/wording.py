"""Words of messages that depend on a number. Knows no torch."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Give a number with its noun: ``1 layer``, ``1,200 layers``.

    Args:
        number: How many.
        noun: The word for one.
        plural: The word for several, if it is not ``noun`` with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
