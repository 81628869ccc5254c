"""Markup in which text is always escaped: whatever goes into a tag is, unless it is markup already."""

from __future__ import annotations

import html
import math
import re
from urllib.parse import quote, urlsplit

# Control characters, halves of surrogate pairs, and what turns the direction of a text around.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")
_VOID = {"meta", "br"}


class Markup(str):
    """Text that is markup, made by `tag` and `join`."""

    __slots__ = ()


def text(value: object, longest: int = 2_000) -> Markup:
    """Escape what is no markup; a text that is longer than ``longest`` characters is cut and says so.

    Args:
        value: Markup, which stays as it is, or anything that has words.
        longest: Characters that are kept.
    """
    if isinstance(value, Markup):
        return value
    words = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value))
    if len(words) > longest:
        words = f"{words[:longest]} ... ({len(words) - longest:,} characters more)"
    return Markup(html.escape(words))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Make one element.

    Args:
        name: Its name.
        children: Markup, or text to be escaped; ``None`` is left out.
        attributes: By name, with ``_`` for ``-`` and a ``_`` behind Python's own words; ``None`` is left out. Numbers
            are written with two decimals.

    Raises:
        ValueError: If a number is not finite.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(key, value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """Put markup, and text to be escaped, one behind the other."""
    return Markup("".join(text(child) for child in children if child is not None))


def link(address: str, words: object) -> Markup:
    """Make a link of an address on the web; of another kind, such as a script, only the words are left."""
    try:
        parts = urlsplit(address)
        plain = parts.scheme in ("http", "https") and bool(parts.netloc)
    except ValueError:
        plain = False
    return tag("a", words, href=address, rel="noreferrer") if plain else text(words)


def file_link(path: str, words: object) -> Markup:
    """Make a link to a file below the page's folder; of a path that leads out of it only the words are left."""
    parts = path.split("/")
    if "\\" in path or {"", ".", ".."} & {*parts} or _UNPRINTABLE.search(path):
        return text(words)
    return tag("a", words, href="./" + quote(path))


def _attribute(key: str, value: object) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{key}={value!r} cannot be drawn; give finite numbers")
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return text(value, 4_000)
