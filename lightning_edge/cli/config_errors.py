"""Say what is wrong with a configuration, innermost first. Knows the wording of jsonargparse's errors, nothing else.

jsonargparse reports a mistake as a tree, from the outermost key down, with one branch for every type a value could
have had. What a user needs is the leaf: which key, what was given, what is allowed.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from textwrap import fill

from lightning_edge.errors import EdgeError

_KEY = re.compile(r'Parser key "(?P<name>[^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '(?P<name>[^']+)':")
_OPTION = re.compile(r"(?:Option|does not accept option) '(?P<name>[^']+)'")
_ATTRIBUTE = re.compile(r"module '(?P<module>[^']+)' has no attribute '(?P<name>[^']+)'")
_IMPORT = re.compile(r"(?:No module named|Expected a dot import path string:) '?(?P<name>[^'\n]+)'?")
_VALUE = re.compile(r"Expected an? (?P<types>.+?)\. Got value: (?P<value>.*)")
_UNION = re.compile(r"^Subtypes: \[(?P<types>.*)\]$(?s:.*?)^Given value: (?P<value>.*)$", re.MULTILINE)
_REQUIRED = re.compile(r"the following arguments are required: (?P<names>.+)")
_ABSTRACT = re.compile(r"Expected an instantiatable class, but (?P<name>\S+) is abstract")
_NO_CONFIG = re.compile(r"^Unexpected config:(?P<text>(?s:.*))$")
_CLASS_KEYS = ("class_path", "init_args")
_WIDTH = 100


@dataclass(frozen=True)
class _Leaf:
    """The deepest branch of an error: the keys that lead to it, the class it is in, and the lines it ends in."""

    keys: tuple[str, ...]
    owner: str | None
    lines: tuple[str, ...]


def explain(message: str, options: Iterable[str] = ()) -> str:
    """Turn a parser's error into the key, what was given and what is allowed.

    Args:
        message: What jsonargparse says.
        options: Every key the parser accepts, dotted.
    """
    if match := _NO_CONFIG.search(message):
        text = match["text"].strip()
        given = repr(text.splitlines()[0]) if text else "an empty file"
        return f"--config: given {given}\n  allowed: a YAML file of keys, such as trainer:, model: and data:"
    leaf = _deepest(message)
    text = "\n".join(leaf.lines)
    key = ".".join(leaf.keys)
    if match := _ATTRIBUTE.search(text):
        known = [f"{match['module']}.{name}" for name in _offered(match["module"])]
        facts = _facts(f"{key}: there is no {match['module']}.{match['name']}", leaf.owner or "", known)
    elif match := _IMPORT.search(text):
        facts = [f"{key}: given {leaf.owner or match['name']!r}, which cannot be imported"]
        facts.append("  allowed: a class by its full path, package.module.Class")
    elif (match := _OPTION.search(text)) and leaf.owner:
        name, known = match["name"], _arguments(leaf.owner)
        if not known:  # a base class that is not meant itself: what is misspelled stands beside class_path
            name, known = name.split(".")[0], list(_CLASS_KEYS)
        facts = _facts(f"{key}.{name}: {leaf.owner} has no such setting", name, known)
    elif match:
        name, known = _beside(match["name"], options)
        facts = _facts(f"{name}: there is no such key", name, known)
    elif (match := _REQUIRED.search(text)) and leaf.owner:
        facts = [f"{key}.{match['names']}: not given, and {leaf.owner} has no default for it"]
    elif match := _ABSTRACT.search(text):
        facts = _facts(f"{key}: {match['name']} is only the base of what can stand here", "", _CLASS_KEYS)
    elif match := _VALUE.search(text) or _UNION.search(text):
        facts = [f"{key}: given {match['value']!r}", f"  allowed: {_types(match['types'])}"]
    elif leaf.keys and text:
        return f"{key}: {text}"
    else:
        return message
    return "\n".join(facts)


def _deepest(message: str) -> _Leaf:
    """Follow keys and classes by indentation; the branch with most of them is the one that was meant."""
    lines = [line for line in message.splitlines() if line.strip()]
    best = _Leaf((), None, tuple(line.strip() for line in lines))
    stack: list[tuple[int, str, bool]] = []
    depth = 0
    for number, line in enumerate(lines):
        margin = _margin(line)
        while stack and margin <= stack[-1][0]:
            stack.pop()
        match, is_class = (_KEY.search(line), False) if _KEY.search(line) else (_CLASS.search(line), True)
        if match is None:
            continue
        stack.append((margin, match["name"], is_class))
        if len(stack) > depth:
            depth = len(stack)
            body = [line[match.end() :]]
            for following in lines[number + 1 :]:
                if _margin(following) <= margin:
                    break
                body.append(following)
            keys = tuple(name for _, name, is_class in stack if not is_class)
            best = _Leaf(keys, match["name"] if is_class else None, tuple(b.strip() for b in body if b.strip()))
    return best


def _margin(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _facts(problem: str, given: str, allowed: Sequence[str]) -> list[str]:
    close = get_close_matches(given, allowed, n=1)
    lines = [problem, f"  did you mean: {close[0]}"] if close else [problem]
    if allowed:
        listed = fill(", ".join(allowed), _WIDTH, subsequent_indent=" " * 11, break_long_words=False)
        lines.append(f"  allowed: {listed}")
    return lines


def _beside(name: str, options: Iterable[str]) -> tuple[str, list[str]]:
    """Cut ``name`` after its first unknown part, and list the keys that could stand in that place."""
    every = sorted(set(options))
    known, parts = "", name.split(".")
    for part in parts:
        if not any(option.startswith(f"{known}{part}.") for option in every):
            return known + part, sorted({known + o[len(known) :].split(".")[0] for o in every if o.startswith(known)})
        known += f"{part}."
    return name, []


def _arguments(class_path: str) -> list[str]:
    """Names of the arguments of a class the parser has already imported."""
    module, _, name = class_path.rpartition(".")
    owner = getattr(sys.modules.get(module), name, None)
    if owner is None:
        return []
    return [parameter for parameter in inspect.signature(owner).parameters if parameter not in ("args", "kwargs")]


def _offered(module: str) -> list[str]:
    """Names that ``module`` makes public, or its own modules, or the public classes it defines."""
    try:
        found = vars(import_module(module))
    except ImportError:
        return []
    if "__all__" in found:
        return sorted(name for name in found["__all__"] if not name.startswith("_"))
    if "__path__" in found:
        return sorted(module.name for module in iter_modules(found["__path__"]))
    own = (name for name, value in found.items() if inspect.isclass(value) and value.__module__ == module)
    return sorted(name for name in own if not name.startswith("_"))


def _types(text: str) -> str:
    """Write types as a user of YAML does."""
    return re.sub(r"<class '([^']+)'>", r"\1", text).replace("NoneType", "null").replace("typing.", "")


def cause(error: BaseException) -> str:
    """Say what was raised first, and by the constructor of which class: jsonargparse wraps it once for every type.

    An error of ours says all there is to say, also of what it came from.
    """
    while not isinstance(error, EdgeError) and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    owner, traceback = "", error.__traceback__
    while traceback is not None and not owner:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "__init__" and "self" in frame.f_locals:
            # The outermost: what it makes inside is no class that a configuration names.
            owner = type(frame.f_locals["self"]).__name__.lstrip("_")
        traceback = traceback.tb_next
    return str(error) if not owner or str(error).startswith(owner) else f"{owner}: {error}"
