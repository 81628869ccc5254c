"""Configurations of a sweep as `lightning-edge fit` takes them: completed, and checked, without training."""

from __future__ import annotations

import contextlib
import io
import json
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser

from lightning_edge.cli.config_errors import cause
from lightning_edge.cli.main import EdgeCLI, EdgeParser
from lightning_edge.cli.recipe_files import RECIPE, recipe_path
from lightning_edge.cli.trainer import EdgeTrainer
from lightning_edge.errors import EdgeError, SweepError

_OURS = ("EdgeCompressionCallback", "DeviceEvaluationCallback")


class _BuiltError(Exception):
    """The parser is there; nothing else of LightningCLI is wanted."""


class _ParserOnly(EdgeCLI):
    """Builds the parsers of LightningCLI and stops."""

    fit_parser: LightningArgumentParser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> NoReturn:
        """Keep the parser of `fit`."""
        type(self).fit_parser = self._subcommand_parsers["fit"]
        raise _BuiltError


class CommandLineChecker:
    """What `lightning-edge fit` allows in a configuration."""

    def __init__(self) -> None:
        with contextlib.suppress(_BuiltError):
            _ParserOnly(trainer_class=EdgeTrainer, parser_class=EdgeParser, args=["fit"])
        self._parser = _ParserOnly.fit_parser
        self._callbacks = ArgumentParser(exit_on_error=False)
        self._callbacks.add_argument("--callbacks", type=list[Callback])
        # What stands beside our callbacks and was parsed already; to parse all of it takes a second.
        self._allowed: set[str] = set()

    def resolve(self, *configs: str) -> dict[str, Any]:
        """Give the complete configuration, with all defaults, of recipes or files, later ones merged over earlier ones.

        Args:
            configs: ``recipe:<name>``, or the path of a file.

        Raises:
            SweepError: If one is none.
        """
        options: list[str] = []
        for given in configs:
            try:
                path = recipe_path(given) if given.startswith(RECIPE) else Path(given)
            except ValueError as error:
                raise SweepError(f"base: {error}") from error
            if not path.is_file():
                raise SweepError(f"base: there is no file {given!r}; give recipe:<name> or the path of a configuration")
            options += ["--config", str(path)]
        with _refusals(f"base: {' + '.join(configs)}: "):
            complete = self._parser.parse_args(options)
            text = self._parser.dump(complete, skip_unset=False)
        config = yaml.safe_load(text)
        # `fit` takes no name of a configuration from a configuration.
        config.pop("config", None)
        return dict(config)

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse a configuration that `fit` would refuse, as far as it can be told without training.

        Raises:
            SweepError: If it is not allowed.
        """
        given = config["trainer"].get("callbacks") or []
        listed = given if isinstance(given, list) else [given]
        ours = [callback for callback in listed if str(callback["class_path"]).endswith(_OURS)]
        others = [callback for callback in listed if callback not in ours]
        rest = json.dumps({**config, "trainer": {**config["trainer"], "callbacks": others}}, default=str)
        with _refusals(""):
            if rest not in self._allowed:
                self._parser.parse_object(dict(config))
                self._allowed.add(rest)
            # Their constructors know more than their types, and do nothing else.
            try:
                parsed: Namespace = self._callbacks.parse_object({"callbacks": ours})
            except ArgumentError:
                # The parser of `fit` refuses it, too, and in words for a user.
                self._parser.parse_object(dict(config))
                raise
            self._callbacks.instantiate(parsed)


@contextlib.contextmanager
def _refusals(prefix: str) -> Iterator[None]:
    """Turn what a parser prints before it exits, and what a constructor raises, into one error."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as error:
        told = said.getvalue().partition("\n\nin full:")[0].strip().removeprefix("error: ")
        raise SweepError(prefix + told) from error
    except (EdgeError, ValueError, TypeError, ArgumentError) as error:
        raise SweepError(prefix + cause(error)) from error
