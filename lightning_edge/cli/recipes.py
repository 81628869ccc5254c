"""``lightning-edge recipes``: which recipes there are, what is in one, and a copy to change."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_edge.cli.recipe_files import describe, recipe_names, recipe_path
from lightning_edge.errors import EdgeError
from lightning_edge.files import replace_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lightning-edge recipes``.

    Args:
        arguments: Arguments behind ``recipes``.

    Returns:
        The status to exit with: 2 if there is no such recipe, or a copy cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-edge recipes",
        description="List the recipes that --config recipe:NAME takes; show one; copy some to change them.",
    )
    actions = parser.add_subparsers(dest="action", metavar="{show,copy}")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name", metavar="NAME")
    copy = actions.add_parser("copy", help="copy recipes into a folder")
    copy.add_argument("names", metavar="NAME", nargs="+")
    copy.add_argument("folder", metavar="FOLDER", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.action == "show":
            sys.stdout.write(recipe_path(given.name).read_text(encoding="utf-8"))
        elif given.action == "copy":
            _copy(given.names, given.folder)
        else:
            _list()
    except (EdgeError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _list() -> None:
    recipes = [describe(name) for name in recipe_names()]
    width = max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        print(f"{recipe.name:<{width}}  {recipe.summary}")
    print("\nlightning-edge fit --config recipe:NAME trains; --config recipe:compression/NAME behind it makes more.")


def _copy(names: Sequence[str], folder: Path) -> None:
    """Copy recipes; all that can be refused is refused before the first is written.

    Raises:
        ExportError: If a file cannot be written.
        ValueError: If there is no such recipe, or a file of that name is there already.
    """
    sources = [recipe_path(name) for name in names]
    copies = {folder / source.name: source for source in sources}
    for path in copies:
        if path.exists():
            raise ValueError(f"{path} is there already; remove it, or give another folder")
    for path, source in copies.items():
        replace_text(path, source.read_text(encoding="utf-8"))
    options = [option for path in copies for option in ("--config", str(path))]
    print(shlex.join(["lightning-edge", "fit", *options]))
