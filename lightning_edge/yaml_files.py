"""YAML from outside, read strictly: plain values, each key once, and no file that grows when its aliases are filled in.

Scalars are what they are to jsonargparse: ``1e-3`` is a number and a date is a text. Knows no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_edge.regular_files import read_regular

MOST_BYTES = 2**18
# Keys and values with every alias filled in. The largest recipe has some hundreds.
MOST_NODES = 100_000

_FLOAT = re.compile(
    r"""[-+]?(?:
        [0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[0-9][0-9_]*[eE][-+]?[0-9]+
        |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN)
    )""",
    re.VERBOSE,
)
_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
_OTHERWISE = (_TAG + "float", _TAG + "timestamp")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose numbers are those of YAML 1.2 and whose dates are texts.

    The one written in Python: the one in C crashes with some thousand brackets in each other.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (as PyYAML has it)
        first: [(tag, pattern) for tag, pattern in entries if tag not in _OTHERWISE]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _first in "-+0123456789.":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).append(
        (_TAG + "float", re.compile(f"(?:{_FLOAT.pattern})$", re.VERBOSE))
    )


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file as plain values: dicts, lists, texts, numbers, ``True``, ``False`` and ``None``.

    Args:
        path: A regular file of one YAML document, of at most `MOST_BYTES`.

    Raises:
        ValueError: If it is not there or no regular file, too large, no YAML, names a class, gives a key twice, or has
            more than `MOST_NODES` values with its aliases filled in. One line that names the file and the place in it.
    """
    return parse_yaml(read_text(Path(path)), str(path))


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        path: A regular file.
        most_bytes: The most bytes that it may have.

    Raises:
        ValueError: If it is not there or no regular file, too large, or no text. One line that names the file.
    """
    try:
        return read_regular(path, most_bytes).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def parse_yaml(text: str, name: str) -> Any:
    """Read a YAML text as `read_yaml` reads a file.

    Args:
        text: One YAML document.
        name: What an error calls it.

    Raises:
        ValueError: As `read_yaml`.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            sizes: dict[int, int | None] = {}
            _check_size(node, name, sizes)
            for found in _nodes(node):
                if found.tag not in _PLAIN:
                    raise ValueError(
                        f"{name}: {_place(found)}: the tag {found.tag!r} names no plain value; leave it out"
                    )
                if isinstance(found, yaml.MappingNode):
                    _check_keys(loader, found, name)
            return _constructed(loader.construct_document, node, name)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: {_told(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error


def _check_size(node: yaml.Node, name: str, sizes: dict[int, int | None]) -> int:
    """Count values as if every alias were written out, which takes no longer than reading the text did."""
    if id(node) in sizes:
        known = sizes[id(node)]
        if known is None:
            raise ValueError(f"{name}: {_place(node)}: a value holds itself by an alias; write it out")
        return known
    sizes[id(node)] = None
    size = 1 + sum(_check_size(below, name, sizes) for below in _below(node))
    if size > MOST_NODES:
        raise ValueError(
            f"{name}: {_place(node)}: there are more than {MOST_NODES:,} values with the aliases filled in; write fewer"
        )
    sizes[id(node)] = size
    return size


def _nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    todo, seen = [node], {id(node)}
    while todo:
        found = todo.pop()
        yield found
        fresh = [below for below in _below(found) if id(below) not in seen]
        seen.update(map(id, fresh))
        todo += fresh


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_keys(loader: Any, mapping: yaml.MappingNode, name: str) -> None:
    """Refuse a key that is there twice: a parser takes the last one, in silence."""
    seen: dict[Any, yaml.Node] = {}
    for node, _ in mapping.value:
        if not isinstance(node, yaml.ScalarNode):
            raise ValueError(f"{name}: {_place(node)}: a key is a list or a mapping; give a text")
        merge = node.tag == _TAG + "merge"
        key = node.value if merge else _constructed(loader.construct_object, node, name)
        if key in seen:
            raise ValueError(
                f"{name}: {_place(node)}: {key!r} is given twice, first in line {seen[key].start_mark.line + 1}; "
                "leave one out"
            )
        seen[key] = node


def _constructed(construct: Callable[[Any], Any], node: yaml.Node, name: str) -> Any:
    try:
        return construct(node)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        # PyYAML's own way to say that a value is not of the type that a tag, or its digits, promise.
        raise ValueError(f"{name}: {_place(node)}: a value is not of the type it is said to be: {error}") from error


def _place(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"


def _told(error: yaml.YAMLError) -> str:
    """Give what was found, and where: YAML says first what it was doing."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    found = " ".join(str(problem or error).split())
    hint = "; YAML is indented by spaces, not by tabs" if "cannot start any token" in found else ""
    return f"{where}{found}{hint}"
