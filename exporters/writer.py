"""Writes a file and reads back what it holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_edge.contents import Contents
from lightning_edge.exporters.artifact import inspect_file, placed
from lightning_edge.exporters.target import Target
from lightning_edge.exporters.verify.contents import ExportWarning
from lightning_edge.files import writing
from lightning_edge.network import Deployable
from lightning_edge.tracing import tracing

# What to do about a file that cannot be read or loaded.
JUST_WRITTEN = "The converter has just written it so: leave the target out, and report it as a fault"


def written(
    module: Target,
    network: Deployable,
    path: Path,
    staged: Path,
    options: Mapping[str, Any],
    tell: Callable[[str], None] = lambda step: None,
) -> Contents:
    """Write what `Target.prepare` gave, and read what the file holds.

    Args:
        module: The target.
        network: The network.
        path: Where the file shall be in the end, for messages.
        staged: Where to write it.
        options: The target's own options.
        tell: Is called with a word or two before each step.

    Raises:
        ExportError: If the target cannot write the network.
        RunnerError: If the file is not what its suffix says.
    """
    tell("converting")
    with tracing(), writing(path):
        module.write(network, staged, **options)
    tell("reading the file back")
    return placed(module, staged, inspect_file(module, staged, path.name, JUST_WRITTEN))


@contextmanager
def export_warnings() -> Iterator[list[str]]:
    """Within this context, collect what an export warns of; what converters say to each other is dropped."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExportWarning)
        try:
            yield found
        finally:
            found += [str(entry.message) for entry in caught if issubclass(entry.category, ExportWarning)]
