"""JSON from the disk read back as dataclasses, by the types of their fields: strict in types, sizes and numbers.

Knows no torch.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# A report of a dozen files has 30 kB, a sweep of a thousand trials 1 MB.
MOST_BYTES = 2**24
_MOST_WHOLE = 2**63
_LONGEST_SHOWN = 60


def read_json(path: Path) -> Any:
    """Read a JSON file that is not too large, without what JSON does not have: ``NaN``, or a name given twice.

    Raises:
        OSError: If it is not there, or cannot be read.
        ValueError: If it is no regular file, too large, or not JSON.
    """
    _check_file(path, path.stat())
    # What lies there may be another thing by now: a pipe is not waited for, and is looked at once more.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
        _check_file(path, os.fstat(stream.fileno()))
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _check_file(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"it is {'a folder' if path.is_dir() else 'a pipe or a device'} and not a file")
    if found.st_size > MOST_BYTES:
        raise ValueError(f"it has {found.st_size:,} bytes; {MOST_BYTES:,} are allowed")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that JSON has")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{_shown(next(name for name in names if names.count(name) > 1))} is given twice")
    return made


def built(kind: Any, value: Any, where: str, unknown: list[str] | None = None) -> Any:
    """Build what a type says of plain values.

    Args:
        kind: The type: a dataclass, ``str``, ``int``, ``float``, ``bool``, ``Literal``, a sequence, tuple or mapping of
            them, or several with ``|``.
        value: The values as JSON gives them. ``null`` for a ``float`` is a number that was not finite.
        where: What the value is called in errors.
        unknown: Takes the names of entries that a dataclass has no field for; they are refused if not given.

    Raises:
        ValueError: If the values are not of the type.
    """
    origin, options = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in options):
            raise ValueError(f"{where} is {_shown(value)} and not one of {', '.join(map(repr, options))}")
        return value
    if origin in (Union, UnionType):
        others = [option for option in options if option is not NoneType]
        if value is None and NoneType in options:
            return None
        return built(others[0] if len(others) == 1 else _first(others, value), value, where, unknown)
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass(kind, _object(value, where), where, unknown)
    if origin in (Mapping, dict):
        named = _object(value, where)
        return {name: built(options[1], entry, f"{where}.{_name(name)}", unknown) for name, entry in named.items()}
    if origin in (Sequence, list, tuple):
        return _sequence(origin, options, value, where, unknown)
    if kind in (str, bool):
        if type(value) is not kind:
            raise ValueError(f"{where} is {_shown(value)} and not {'a text' if kind is str else 'true or false'}")
        return value
    return _number(kind, value, where)


def _number(kind: Any, value: Any, where: str) -> Any:
    if kind is int:
        if type(value) is not int or abs(value) >= _MOST_WHOLE:
            raise ValueError(f"{where} is {_shown(value)} and not a whole number")
        return value
    if kind is not float:
        raise TypeError(f"{where} is of type {kind!r}, which is not read")
    if value is None:
        return math.nan
    if (
        type(value) not in (int, float)
        or not abs(value) < math.inf
        or (type(value) is int and abs(value) >= _MOST_WHOLE)
    ):
        raise ValueError(f"{where} is {_shown(value)} and not a finite number")
    return value


def _sequence(origin: Any, options: Sequence[Any], value: Any, where: str, unknown: list[str] | None) -> Any:
    if type(value) is not list:
        raise ValueError(f"{where} is {_shown(value)} and not a list")
    kinds = list(options)
    if origin is tuple and options[-1] is not Ellipsis:
        if len(value) != len(options):
            raise ValueError(f"{where} has {len(value)} entries and not {len(options)}")
    else:
        kinds = [options[0]] * len(value)
    return tuple(
        built(entry_kind, entry, f"{where}[{index}]", unknown)
        for index, (entry_kind, entry) in enumerate(zip(kinds, value, strict=True))
    )


def _dataclass(kind: type, given: Mapping[str, Any], where: str, unknown: list[str] | None) -> Any:
    known = {entry.name: entry for entry in fields(kind)}
    more = [name for name in given if name not in known]
    if more and unknown is None:
        raise ValueError(f"{where} has {', '.join(map(_shown, more))}, which is not known")
    for name in more:
        if unknown is not None and _name(name) not in unknown:
            unknown.append(_name(name))
    missing = [
        name
        for name, entry in known.items()
        if name not in given and entry.default is MISSING and entry.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}")
    kinds = _types_of(kind)
    values = {
        name: built(kinds[name], given[name], name if where == "it" else f"{where}.{name}", unknown)
        for name in known
        if name in given
    }
    return kind(**values)


@cache
def _types_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _first(kinds: Sequence[Any], value: Any) -> Any:
    """The one of several types that a value is of."""
    for kind in kinds:
        if kind is float and type(value) is float:
            return kind
        if isinstance(kind, type) and type(value) is kind:
            return kind
    return kinds[0]


def _object(value: Any, where: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{where} is {_shown(value)} and not an object")
    return value


def _shown(value: Any) -> str:
    if type(value) is int and abs(value) >= _MOST_WHOLE:
        return "a number of very many digits"
    words = ascii(value) if isinstance(value, str) else repr(value)
    return words if len(words) <= _LONGEST_SHOWN else f"{words[: _LONGEST_SHOWN - 3]}..."


def _name(name: str) -> str:
    return name if name.isprintable() and len(name) <= _LONGEST_SHOWN else _shown(name)
