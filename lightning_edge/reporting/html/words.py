"""Numbers in words: as few digits as say it, and never a number that is none."""

from __future__ import annotations

import math
from typing import TypeGuard

ABSENT = "-"
_THOUSAND = 1_000
_SAME = 0.005


def known(value: float | None) -> TypeGuard[float]:
    """Whether there is a finite number."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with so many digits that count; ``-`` where there is none."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "not finite"
    if float(value).is_integer() and abs(value) < 10**15:
        return f"{int(value):,}"
    exact = f"{value:.{digits}g}"
    if "e" not in exact:
        return exact
    # From 0.0001 up and 10^digits down, Python writes powers of ten where digits are easier to read.
    return f"{value:,.0f}" if _THOUSAND <= abs(value) < 10**15 else exact


def fixed(value: float | None, decimals: int) -> str:
    """Write a number with so many decimals, so that a column of them lines up."""
    return f"{value:,.{decimals}f}" if value is not None and math.isfinite(value) else number(value)


def share(value: float | None) -> str:
    """Write a share from 0 to 1 as a percentage."""
    return f"{value:.2%}" if value is not None and math.isfinite(value) else number(value)


def size(value: float) -> str:
    """Write bytes in the largest unit, for the ticks of an axis."""
    for unit, bytes_of in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(value) >= bytes_of:
            return f"{value / bytes_of:.4g} {unit}"
    return f"{value:.4g} B"


def times(before: float, after: float, less: str, more: str, same: str, within: float = _SAME) -> str:
    """Say by how many times something became less or more: ``3.1 times smaller``.

    Args:
        before: What it was, above 0.
        after: What it is, above 0.
        less: The word where it is less than before.
        more: The word where it is more.
        same: What to say where both hardly differ.
        within: By which share they then differ at most.
    """
    if abs(after / before - 1) <= within:
        return same
    factor = before / after if after < before else after / before
    # 1.00 times smaller says nothing.
    shown = f"{factor:.1f}" if factor >= 1.95 else f"{factor:.2f}"
    return f"{shown} times {less if after < before else more}"


def signed(value: float, digits: int = 3) -> str:
    """Write a difference with its sign."""
    shown = number(value, digits)
    return shown if shown.startswith("-") or value == 0 else f"+{shown}"


def clipped(words: str, longest: int) -> str:
    """Cut a text in the middle, where names differ least."""
    if len(words) <= longest:
        return words
    front = (longest - 1) * 2 // 3
    return f"{words[:front]}\N{HORIZONTAL ELLIPSIS}{words[len(words) - (longest - 1 - front) :]}"
