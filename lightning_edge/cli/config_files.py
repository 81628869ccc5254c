"""What ``--config`` takes: files, recipes by name, and no file that would be misread in silence or never be read."""

from __future__ import annotations

import os
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, get_loader, set_loader

from lightning_edge.cli.recipe_files import RECIPE, recipe_path
from lightning_edge.yaml_files import parse_yaml, read_yaml

# What makes a value more than one plain text or number.
_STRUCTURE = frozenset("[{&*!\n")
_LONGEST_ARGUMENT = 1000


class ConfigFile(ActionConfigFile):
    """``--config`` that also takes ``recipe:<name>``."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read one configuration into ``cfg``."""
        if isinstance(values, str) and values.startswith(RECIPE):
            try:
                values = str(recipe_path(values))
            except ValueError as error:
                raise ArgumentError(None, str(error)) from error
        elif isinstance(values, str):
            try:
                _read_strictly(values)
            except ValueError as error:
                raise ArgumentError(None, f"--config: {error}") from error
        super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]


def _read_strictly(given: str) -> None:
    """Refuse a configuration that jsonargparse would take in silence, or never come to an end with.

    Raises:
        ValueError: If it is no regular file, or not the YAML that `yaml_files` reads.
    """
    if os.path.lexists(given):
        read_yaml(given)
    elif "\n" in given or ":" in given:  # the configuration itself
        parse_yaml(given, "the text")


@contextmanager
def strict_values() -> Iterator[None]:
    """Within this context jsonargparse reads whatever it reads as strictly as ``--config``, files of parts included.

    Its own loader is PyYAML's in C, which crashes with some thousand brackets in each other, and fills in aliases
    without end.
    """
    loader = get_loader("yaml")

    def load(text: str) -> Any:
        if _STRUCTURE & set(text):
            try:
                parse_yaml(text, "the value")
            except ValueError as error:
                if "\n" in text.strip() or len(text) > _LONGEST_ARGUMENT:  # of a file, and meant to be no plain text
                    raise
                raise yaml.YAMLError(str(error)) from error
        return loader(text)

    set_loader("yaml", load, (yaml.YAMLError,))
    try:
        yield
    finally:
        set_loader("yaml", loader, (yaml.YAMLError,))
