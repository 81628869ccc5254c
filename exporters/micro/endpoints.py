"""Inputs and outputs of a file for a C++ header: shapes, scales, zero points, and names of the classes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from lightning_edge.contents import Contents, Endpoint
from lightning_edge.exporters.input_adapter import place_of_scores

_PLAIN = re.compile(r"[ !#->@-\[\]-~]")  # ASCII without the quote, the backslash, and the "?" of trigraphs


def declarations(prefix: str, contents: Contents) -> str:
    """Write constants of C++11 for every input and output, in the order of the interpreter's.

    Args:
        prefix: What their names begin with.
        contents: What the file holds.
    """
    lines = [
        "// Inputs and outputs, in the order of MicroInterpreter::input(i) and output(i).",
        "// real value = scale * (integer - zero_point)",
    ]
    for side, ends in (("input", contents.inputs), ("output", contents.outputs)):
        lines.append(f"constexpr int {prefix}_{side}s = {len(ends)};")
        for at, end in enumerate(ends):
            lines += _endpoint(f"{prefix}_{side}_{at}", f"{side} {at}", end)
    return "\n".join([*lines, *_labels(prefix, contents)])


def comment(text: str) -> str:
    """A text from a file as a line comment takes it: nothing that ends or continues the line."""
    return re.sub(r"[^ -\[\]-~]", "?", text)


def literal(text: str) -> str:
    """A text as a string literal of ASCII: its bytes in UTF-8, all but plain ones as octal escapes."""
    return '"' + "".join(char if _PLAIN.fullmatch(char) else _octal(char) for char in text) + '"'


def _octal(char: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "replace"))


def _endpoint(name: str, place: str, end: Endpoint) -> Iterator[str]:
    yield f"// {place}{f', {comment(end.name)}' if end.name else ''}: {end.dtype}"
    if end.shape:
        yield f"constexpr int {name}_shape[] = {{{', '.join(map(str, end.shape))}}};"
    if end.scale:
        yield f"constexpr float {name}_scale = {_float(end.scale)};"
        yield f"constexpr int {name}_zero_point = {end.zero_point or 0};"


def _float(value: float) -> str:
    """The shortest digits that are the same float32."""
    digits = str(np.float32(value))
    return f"{digits}f" if set(digits) & set(".e") else f"{digits}.0f"


def _labels(prefix: str, contents: Contents) -> Iterator[str]:
    if not contents.labels:
        return
    place = place_of_scores([len(end.shape) for end in contents.outputs])
    yield f"// Names of the classes{'' if place is None else f', in the order of the scores of output {place}'}."
    yield f"constexpr int {prefix}_labels_length = {len(contents.labels)};"
    yield f"constexpr const char* {prefix}_labels[] = {{"
    yield from (f"    {literal(label)}," for label in contents.labels)
    yield "};"
