"""JSON from the disk read back as dataclasses, by the types of their fields: strict in types, sizes and numbers.

Knows no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_edge.plain_values import as_number, as_object, as_typed, as_whole, shortened
from lightning_edge.regular_files import read_regular

# A report of a dozen files has 30 kB, a sweep of a thousand trials 1 MB.
MOST_BYTES = 2**24
_LONGEST_SHOWN = 60


def read_json(path: Path) -> Any:
    """Read a JSON file that is not too large, without what JSON does not have: ``NaN``, or a name given twice.

    Raises:
        OSError: If it is not there, or cannot be read.
        ValueError: If it is no regular file, too large, or not JSON.
    """
    data = read_regular(path, MOST_BYTES)
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that JSON has")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shortened(next(name for name in names if names.count(name) > 1))} is given twice")
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
            raise ValueError(f"{where} is {shortened(value)} and not one of {', '.join(map(repr, options))}")
        return value
    if origin in (Union, UnionType):
        others = [option for option in options if option is not NoneType]
        if value is None and NoneType in options:
            return None
        return built(others[0] if len(others) == 1 else _first(others, value), value, where, unknown)
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass(kind, as_object(value, where), where, unknown)
    if origin in (Mapping, dict):
        named = as_object(value, where)
        return {name: built(options[1], entry, f"{where}.{_name(name)}", unknown) for name, entry in named.items()}
    if origin in (Sequence, list, tuple):
        return _sequence(origin, options, value, where, unknown)
    if kind in (str, bool):
        return as_typed(value, kind, where)
    return _number(kind, value, where)


def _number(kind: Any, value: Any, where: str) -> Any:
    if kind is int:
        return as_whole(value, where)
    if kind is not float:
        raise TypeError(f"{where} is of type {kind!r}, which is not read")
    if value is None:
        return math.nan
    return as_number(value, where)


def _sequence(origin: Any, options: Sequence[Any], value: Any, where: str, unknown: list[str] | None) -> Any:
    if type(value) is not list:
        raise ValueError(f"{where} is {shortened(value)} and not a list")
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
        raise ValueError(f"{where} has {', '.join(map(shortened, more))}, which is not known")
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


def _name(name: str) -> str:
    return name if name.isprintable() and len(name) <= _LONGEST_SHOWN else shortened(name)
