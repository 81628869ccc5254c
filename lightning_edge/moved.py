"""Old import paths that still work in this version, each with one deprecation line. Goes with version 0.3."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any, final

# Dotted paths that docs/api.md named, and where each module is now.
MOVED = {
    "lightning_edge.anatomy": "lightning_edge.contents",
    "lightning_edge.budget": "lightning_edge.reporting.budget",
    "lightning_edge.exporters.base": "lightning_edge.exporters.artifact",
    "lightning_edge.exporters.microcontroller": "lightning_edge.exporters.micro.sources",
    "lightning_edge.exporters.vela": "lightning_edge.exporters.micro.vela",
    "lightning_edge.manifest": "lightning_edge.reporting.manifest",
    "lightning_edge.report": "lightning_edge.reporting.report",
    "lightning_edge.tracking": "lightning_edge.callbacks.tracking",
    "lightning_edge.verification": "lightning_edge.reporting.verification",
}


@final
class _Finder(MetaPathFinder, Loader):
    """Imports an old path as a module that hands on every name of the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for the old paths only."""
        return spec_from_loader(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Warn once, and look every name up in the module's new place."""
        new = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} is {new} now; the old path goes with lightning-edge 0.3",
            DeprecationWarning,
            stacklevel=2,  # Python counts no frames of the import system
        )
        found = import_module(new)

        def look_up(name: str) -> Any:
            return getattr(found, name)

        vars(module)["__getattr__"] = look_up


def install() -> None:
    """Make the old paths importable; safe to call twice."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
