"""A file as devices are given it: what its values and metrics there are held against, and over which samples."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil

from lightning_edge.evaluation.reference import Reference
from lightning_edge.evaluation.validation import Validation
from lightning_edge.exporters import Artifact
from lightning_edge.exporters.run.not_run import NotRun
from lightning_edge.measure import Tolerance
from lightning_edge.network import Deployable, Inputs
from lightning_edge.reporting.report import Row


@dataclass(frozen=True)
class Beside:
    """What the metrics of a device are held against, over the samples that devices get.

    Attributes:
        here: Metrics of the file on this machine; none where it gave no numbers here.
        floats: Metrics of the float network.
    """

    here: Mapping[str, float]
    floats: Mapping[str, float]


@dataclass(frozen=True)
class DeviceFile:
    """A file that was accepted here, and what its values are held against.

    Attributes:
        row: What was found of it here.
        artifact: The file, without a runner.
        network: The network that it came from.
        reference: That network's outputs.
        tolerance: How far it may lie from them.
        beside: What its metrics are held against.
    """

    row: Row
    artifact: Artifact
    network: Deployable
    reference: Reference
    tolerance: Tolerance
    beside: Beside

    @classmethod
    def of(
        cls,
        row: Row,
        artifact: Artifact,
        network: Deployable,
        reference: Reference,
        tolerance: Tolerance,
        beside: Beside,
    ) -> DeviceFile:
        """Keep a file for devices, and let go of what runs it here."""
        waiting = NotRun(artifact.path.name, artifact.contents, "it runs on devices")
        return cls(row, replace(artifact, runner=waiting), network, reference, tolerance, beside)


def limited(validation: Validation, reference: Reference, samples: int | None) -> Validation:
    """Give a loop over the first batches of a split, as many as hold so many samples; all of it for ``None``."""
    if samples is None or not reference.calls:
        return validation
    first: Inputs = reference.calls[0]
    batches = ceil(samples / max(1, first.batch_size))
    before = validation.limit_batches
    if isinstance(before, float) and before < 1.0:
        with suppress(TypeError):  # a loader without a length
            before = int(len(validation.dataloaders) * before)
    if isinstance(before, int):
        batches = min(batches, before)
    return replace(validation, limit_batches=batches)
