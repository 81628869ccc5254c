"""Values that somebody else has written, as JSON and checkpoints have them, checked one by one before they are used.

Every check raises ``ValueError`` that names the place, the value and what is allowed. Knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

# The largest whole number that other programs read back as they find it.
LARGEST = 2**63 - 1

_MOST_SHOWN = 60
_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "true or false"}


def check_keys(given: Mapping[str, Any], wanted: Collection[str], where: str, what: str) -> None:
    """Refuse an object that has not just these keys; ``what`` is what an error calls the thing that has them."""
    missing = [name for name in wanted if name not in given]
    more = [name for name in given if name not in wanted]
    if missing or more:
        told = [f"lacks {', '.join(map(repr, missing))}"] * bool(missing)
        told += [f"has {', '.join(map(repr, more))}, which {what} has not"] * bool(more)
        raise ValueError(f"{where} {' and '.join(told)}")


def as_typed(value: Any, kind: type, where: str) -> Any:
    """Give a value of exactly this type: ``True`` is no number."""
    if type(value) is not kind:
        raise ValueError(f"{where} is {shortened(value)} and not {_NAMES[kind]}")
    return value


def as_optional(value: Any, kind: type, where: str) -> Any:
    """Give a value of exactly this type, or ``None``."""
    return None if value is None else as_typed(value, kind, where)


def as_object(value: Any, where: str) -> dict[str, Any]:
    """Give an object whose keys are texts."""
    found: dict[str, Any] = as_typed(value, dict, where)
    for name in found:
        as_typed(name, str, f"a key of {where}")
    return found


def as_list(value: Any, where: str) -> list[Any]:
    """Give a list."""
    return as_typed(value, list, where)  # type: ignore[no-any-return]


def as_whole(value: Any, where: str) -> int:
    """Give a whole number of 64 bits."""
    if type(value) is not int or abs(value) > LARGEST:
        raise ValueError(f"{where} is {shortened(value)} and not a whole number")
    return value


def as_count(value: Any, where: str) -> int:
    """Give a whole number from 0 on, of 64 bits."""
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{where} is {shortened(value)} and not a whole number of 0 or more")
    return value


def as_number(value: Any, where: str) -> float:
    """Give a number that is finite."""
    if type(value) is int and abs(value) <= LARGEST:
        return value
    if type(value) is not float or not math.isfinite(value):
        raise ValueError(f"{where} is {shortened(value)} and not a finite number")
    return value


def as_numbers(value: Any, where: str) -> dict[str, float | None]:
    """Give numbers by name, each of which may be ``None``."""
    return {
        name: None if number is None else as_number(number, f"{where}.{name}")
        for name, number in as_object(value, where).items()
    }


def shortened(value: Any) -> str:
    """Show a value in a message, as much of it as helps."""
    try:
        return cut(repr(value), _MOST_SHOWN)
    except ValueError:  # Python refuses to write out numbers of thousands of digits
        return "a number of thousands of digits"


def cut(text: str, most: int) -> str:
    """Leave out the end of a text that has more than so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
