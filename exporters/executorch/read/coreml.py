"""Read the Core ML packages in a ``.pte`` file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lightning_edge.errors import ExportError, MissingExtraError, require
from lightning_edge.exporters import coreml
from lightning_edge.exporters.executorch.read.tally import Tally

PACKAGE = "model.mlpackage"


def archives() -> Any:
    """Import ExecuTorch's archiver of Core ML models.

    Raises:
        ExportError: If this build of ExecuTorch lacks it.
    """
    try:
        return require("executorch.backends.apple.coreml.executorchcoreml", "executorch")
    except MissingExtraError as error:
        raise ExportError(
            "executorch: backend='coreml' packs its model with a library that this build of ExecuTorch lacks "
            f"({error.__cause__}). Its wheels for macOS and for Linux on x86-64 have it; leave backend out elsewhere."
        ) from error


def count(payload: bytes, name: str, tally: Tally) -> None:
    """Count the operations and weights of one package, like those of a Core ML package by itself.

    Core ML chooses CPU, GPU or Neural Engine on the device, so all operations count as delegated.

    Args:
        payload: The archive of the package and its metadata.
        name: Name of the graph, which its weights are counted under.
        tally: The sums to add to.

    Raises:
        RunnerError: If the archive holds no Core ML package.
        ValueError: If it cannot be unpacked.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            archives().unflatten_directory_contents(payload, folder)
        except RuntimeError as error:
            raise ValueError(f"what it hands to Core ML cannot be unpacked: {error}") from error
        package = next(Path(folder).rglob(PACKAGE), Path(folder, PACKAGE))
        contents = coreml.TARGET.inspect(package)
    assert contents.placements is not None
    for entry in contents.placements.ops:
        tally.ops[entry.op] += entry.count
        tally.delegated += entry.count
        # The package's contents sum MACs by kind of operation: they go to the first of each kind.
        for position in range(entry.count):
            tally.places.append((entry.op, "delegate", 0 if position else entry.macs))
    tally.float_compute += contents.float_compute_ops
    tally.float_other += contents.float_ops
    for weights, size in (
        (tally.int8_weights, contents.int8_weight_bytes),
        (tally.float_weights, contents.float_weight_bytes),
        (tally.half_weights, contents.half_weight_bytes),
    ):
        if size:
            weights[f"coreml:{name}"] = size
