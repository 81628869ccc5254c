"""Patches of ExecuTorch's internals, each in force within a context only, with why and when it can go."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from lightning_edge.errors import require
from lightning_edge.exporters.coreml import package as mlpackage
from lightning_edge.exporters.executorch.read import coreml as pte_coreml
from lightning_edge.interface import Interface

_EXTRA = "executorch"


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Silence the log lines of a lowering, one for each operation.

    Why: the Vulkan backend of ExecuTorch 1.4 sets the root logger to INFO when it is imported.
    Can go: with a version that leaves the root logger alone.
    """
    root = logging.getLogger()
    level, disabled = root.level, root.manager.disable
    try:
        logging.disable(logging.WARNING)
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)


@final
class _CompactArchives:
    """Stands for ExecuTorch's archiver of Core ML models: makes the package compact and reproducible, then packs it."""

    def __init__(self, archives: Any) -> None:
        self._archives = archives

    def flatten_directory_contents(self, path: str) -> Any:
        """Pack a folder without debug maps, with names that depend on its contents alone."""
        folder = Path(path)
        (folder / "debug_info.json").unlink(missing_ok=True)
        described = folder / "metadata.json"
        metadata = json.loads(described.read_text())
        package = folder / pte_coreml.PACKAGE
        mlpackage.compact(package, metadata["outputNames"], Interface())
        program = mlpackage.read(package)
        metadata["inputNames"] = [value.name for value in program.inputs]
        metadata["outputNames"] = [getattr(value, "name", "") for value in program.outputs]
        # Devices cache compiled models under this name, so it has to change with the contents and only with them.
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(package.rglob("*")) if file.is_file()))
        metadata["identifier"] = f"executorch_{uuid.UUID(bytes=digest.digest()[:16])}"
        described.write_text(json.dumps(metadata))
        return self._archives.flatten_directory_contents(path)


@contextmanager
def compact_packages() -> Iterator[None]:
    """Pack Core ML models without debug maps and with reproducible names.

    Why: ExecuTorch 1.4 packs the debug maps, 70 % of the bytes of an int8 network of three layers, and names each
    model at random, so that equal networks give different files.
    Can go: with a version that has an option to leave them out and names models by their contents.
    """
    compiler: Any = require("executorch.backends.apple.coreml.compiler.coreml_preprocess", _EXTRA)
    before = compiler.executorchcoreml
    compiler.executorchcoreml = _CompactArchives(before)
    try:
        yield
    finally:
        compiler.executorchcoreml = before
