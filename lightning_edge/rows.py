"""What was found of an exported file, put into its row of the report."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from lightning_edge.exporters import Artifact, ExportWarning
from lightning_edge.measure import Agreement, Latency
from lightning_edge.report import Row


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Collect what an export warns of, and warn of it all the same; what converters say to each other is dropped."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExportWarning)
        try:
            yield messages
        finally:
            messages += [str(entry.message) for entry in caught if issubclass(entry.category, ExportWarning)]
    for message in messages:
        warnings.warn(message, ExportWarning, stacklevel=2)


def described(row: Row, artifact: Artifact) -> Row:
    """Add what a loaded file says of itself."""
    contents = artifact.contents
    weights = contents.int8_weight_bytes + contents.float_weight_bytes
    return replace(
        row,
        size_bytes=artifact.size_bytes,
        compressed_bytes=artifact.compressed_bytes,
        load_ms=artifact.load_ms,
        planned_memory_bytes=contents.planned_memory_bytes,
        int8_weight_share=contents.int8_weight_bytes / weights if weights else None,
        float_ops=(*contents.float_compute_ops, *contents.float_ops) if row.precision == "int8" else None,
        delegated_ops=contents.delegated_ops,
        undelegated_ops=contents.undelegated_ops,
        runtime=artifact.runner.runtime,
        is_reference=artifact.runner.is_reference,
    )


def compared(row: Row, agreement: Agreement) -> Row:
    """Add how far it lay from the network it came from."""
    return replace(
        row,
        samples=agreement.samples,
        top1=agreement.top1,
        max_steps=agreement.max_steps,
        mean_steps=agreement.mean_steps,
        most_steps=agreement.most_steps,
        max_relative=agreement.max_relative,
    )


def timed(row: Row, latency: Latency) -> Row:
    """Add how long one call takes."""
    return replace(
        row, p50_ms=latency.p50_ms, p95_ms=latency.p95_ms, p99_ms=latency.p99_ms, throughput=latency.throughput
    )
