"""The recipes that ship with this package: their names, files and what each says of itself. Knows no parser."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

RECIPE = "recipe:"
_SUFFIX = ".yaml"


@dataclass(frozen=True)
class Recipe:
    """What the first comments of a recipe say.

    Attributes:
        name: What stands behind ``recipe:``.
        command: The command that runs it.
        summary: What it is, in one sentence.
    """

    name: str
    command: str
    summary: str


def recipe_names() -> list[str]:
    """List the recipes; those of a folder have its name in front, ``compression/int8``."""
    root = resources.files("lightning_edge.recipes")
    return sorted(_names(root, ""))


def _names(folder: Traversable, prefix: str) -> list[str]:
    names: list[str] = []
    for entry in folder.iterdir():
        if entry.name.endswith(_SUFFIX):
            names.append(prefix + entry.name.removesuffix(_SUFFIX))
        elif entry.is_dir() and not entry.name.startswith("_"):
            names += _names(entry, f"{prefix}{entry.name}/")
    return names


def recipe_path(name: str) -> Path:
    """Find the file of a recipe, in a checkout as in an installed wheel.

    Args:
        name: Its name, with or without ``recipe:``.

    Raises:
        ValueError: If there is no such recipe.
    """
    name, known = name.removeprefix(RECIPE), recipe_names()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"there is no recipe {name!r}.{meant} Recipes: {', '.join(known)}")
    return Path(str(resources.files("lightning_edge.recipes"))) / f"{name}{_SUFFIX}"


def describe(name: str) -> Recipe:
    """Read what a recipe says of itself.

    Raises:
        ValueError: If there is no such recipe.
    """
    lines = [line.removeprefix("#").strip() for line in recipe_path(name).read_text(encoding="utf-8").splitlines()]
    command, text = lines[0], " ".join(lines[2:6])
    return Recipe(name, command, text.partition(". ")[0].rstrip("."))
