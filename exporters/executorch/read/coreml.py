"""Read the model packages that an ExecuTorch file hands to its Core ML delegate."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lightning_edge.errors import ExportError, MissingExtraError, require
from lightning_edge.exporters import coreml
from lightning_edge.exporters.executorch.read.tally import Tally

PACKAGE = "model.mlpackage"


def archives() -> Any:
    """Import what packs a folder into a file for the delegate, and unpacks it.

    Raises:
        ExportError: If this build of ExecuTorch is without it.
    """
    try:
        return require("executorch.backends.apple.coreml.executorchcoreml", "executorch")
    except MissingExtraError as error:
        raise ExportError(
            "executorch: backend='coreml' packs its model with a library that this build of ExecuTorch lacks "
            f"({error.__cause__}). Its wheels for macOS and for Linux on x86-64 have it; leave backend out elsewhere."
        ) from error


def count(payload: bytes, name: str, tally: Tally) -> None:
    """Count the operations and weights of one package, as those of a Core ML package by itself.

    Which of its units Core ML runs them on is decided on the device, so that all of them count as handed over.

    Args:
        payload: The package and what is said of it, packed.
        name: Name of the graph, for what it alone holds.
        tally: What is added to.

    Raises:
        RunnerError: If there is no Core ML package in it.
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
        # Summed up by kind there and here: all of a kind's count with the first.
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
