"""What was found of an exported file, put into its row of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lightning_edge.contents import Endpoint, Precision
from lightning_edge.errors import ExportError
from lightning_edge.exporters import Artifact, ExportWarning
from lightning_edge.exporters.micro.sources import footprint
from lightning_edge.exporters.target import target
from lightning_edge.exporters.writer import export_warnings
from lightning_edge.measure import Agreement, Latency
from lightning_edge.reporting.budget import DEVICE, Budget, Excess, Verdict
from lightning_edge.reporting.devices import DeviceRow
from lightning_edge.reporting.manifest import Manifest
from lightning_edge.reporting.monitor import Monitor
from lightning_edge.reporting.provenance import commit_of
from lightning_edge.reporting.report import Report, Row, Source, digest, installed_versions
from lightning_edge.user_warnings import warn
from lightning_edge.verdict import Judgement

# Medians of calls in turn lie closer to each other than this where two files are equally fast.
_SLOWER = 1.1
# Where the weights of a file come from that was exported by itself.
SOURCES: dict[Precision, Source] = {"fp32": "float", "int8": "trained"}


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Collect what an export warns of, and warn of it all the same; what converters say to each other is dropped."""
    with export_warnings() as messages:
        yield messages
    for message in messages:
        warn(message, ExportWarning)


def described(row: Row, artifact: Artifact) -> Row:
    """Add what a loaded file says of itself."""
    contents = artifact.contents
    # Nothing is handed to a delegate there; what the delegate here would take says nothing of a microcontroller.
    plain = artifact.runner.is_reference and target(artifact.target).has_reference_kernels
    weights = contents.int8_weight_bytes + contents.float_weight_bytes
    return replace(
        row,
        size_bytes=artifact.size_bytes,
        compressed_bytes=artifact.compressed_bytes,
        load_ms=artifact.load_ms,
        planned_memory_bytes=contents.planned_memory_bytes,
        arena_bytes=_arena_bytes(artifact),
        int8_weight_share=contents.int8_weight_bytes / weights if weights else None,
        float_ops=(*contents.float_compute_ops, *contents.float_ops) if row.precision == "int8" else None,
        delegated_ops=contents.delegated_ops,
        undelegated_ops=contents.undelegated_ops,
        runtime=artifact.runner.runtime,
        is_reference=artifact.runner.is_reference,
        inputs=contents.inputs,
        outputs=contents.outputs,
        sample=sample_of(artifact),
        placements=None if plain else contents.placements,
        interface=contents.interface,
        not_run=artifact.not_run,
    )


def _arena_bytes(artifact: Artifact) -> int | None:
    """The arena of a file that TensorFlow Lite Micro runs."""
    if artifact.target != "tflite" or artifact.precision != "int8":
        return None
    try:
        return footprint(artifact.path).arena_bytes
    except ExportError:
        return None


def sample_of(artifact: Artifact) -> tuple[Endpoint, ...]:
    """What a loaded file is called with for one sample."""
    return tuple(Endpoint(None, spec.shape, str(spec.dtype).removeprefix("torch.")) for spec in artifact.inputs)


def of_artifact(artifact: Artifact, scheme: str | None = None) -> Row:
    """Give the row of a file that was exported by itself, from a network as it is."""
    # A scheme's integers are a float network's: its row is that of one, as in a report.
    precision: Precision = artifact.precision if scheme is None else "fp32"
    row = described(Row(artifact.target, precision, SOURCES[precision], scheme=scheme), artifact)
    if artifact.agreement is not None:
        row = compared(row, artifact.agreement)
    if artifact.judgement is not None:
        row = given_verdict(row, artifact.judgement)
    return replace(row, path=artifact.path.name, sha256=digest(artifact.path))


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


def given_verdict(row: Row, judgement: Judgement) -> Row:
    """Add what was made of how far it lay from that network."""
    return replace(row, verdict=judgement.grade, verdict_reason="; ".join(judgement.reasons) or None)


def timed(row: Row, latency: Latency) -> Row:
    """Add how long one call takes."""
    return replace(
        row,
        p50_ms=latency.p50_ms,
        p95_ms=latency.p95_ms,
        p99_ms=latency.p99_ms,
        throughput=latency.throughput,
        quantiles_ms=latency.quantiles_ms,
    )


def without_gain(rows: Sequence[Row]) -> list[str]:
    """Say which int8 files are no smaller or clearly slower than the float file of the same target."""
    files = [row for row in rows if row.target != "torch" and row.error is None and row.scheme is None]
    floats = {row.target: row for row in files if row.precision == "fp32"}
    messages = []
    for row in files:
        other = floats.get(row.target)
        if row.precision != "int8" or other is None:
            continue
        if row.size_bytes and other.size_bytes and row.size_bytes >= other.size_bytes:
            messages.append(
                f"{row.label} is no smaller than {other.label}: {row.size_bytes:,} bytes against {other.size_bytes:,}."
            )
        if row.p50_ms and other.p50_ms and not row.is_reference and row.p50_ms > _SLOWER * other.p50_ms:
            messages.append(
                f"{row.label} is slower than {other.label} on this machine: p50 {row.p50_ms:.3g} ms "
                f"against {other.p50_ms:.3g}. Measure both on the device before you choose."
            )
    return messages


def judged(
    rows: Sequence[Row], budget: Budget | None, monitor: Monitor | None, devices: Sequence[DeviceRow] = ()
) -> list[Row]:
    """Add to every file whether it keeps the budget.

    Its drop in the deciding metric is taken from the float network, and its energy from the device where it takes most.
    """
    if budget is None:
        return list(rows)
    board = budget.board()
    before = next((row.metrics for row in rows if row.target == "torch" and row.source == "float"), {})

    def verdict(row: Row) -> Verdict | None:
        own = [other for other in devices if (other.target, other.precision, other.source) == _identity(row)]
        energy = max((other.energy_mj for other in own if other.energy_mj is not None), default=None)
        measured = {**_measured(row, before, monitor), "energy_mj": energy}
        found = budget.judge(measured, {"peak_memory_bytes": row.planned_memory_bytes})
        if board is None or board.runs(row.target, row.scheme or row.precision):
            return found
        if row.target not in board.targets:
            return None
        return replace(found, status="exceeded", exceeded=(Excess(DEVICE, 0, 1), *found.exceeded))

    files = {id(row) for row in rows if row.target != "torch" and row.error is None}
    return [replace(row, budget=verdict(row)) if id(row) in files else row for row in rows]


def _identity(row: Row) -> tuple[str, str, str]:
    return row.target, row.precision, row.source


def _measured(row: Row, before: Mapping[str, float], monitor: Monitor | None) -> dict[str, float | None]:
    """What a budget can limit; the speed of a reference interpreter is none."""
    timed = not row.is_reference and row.not_run is None
    drop = None
    if monitor is not None and monitor.metric in before and monitor.metric in row.metrics:
        gained = row.metrics[monitor.metric] - before[monitor.metric]
        drop = -gained if monitor.mode == "max" else gained
    return {
        "size_bytes": row.size_bytes,
        "compressed_bytes": row.compressed_bytes,
        "latency_p50_ms": row.p50_ms if timed else None,
        "latency_p95_ms": row.p95_ms if timed else None,
        "latency_p99_ms": row.p99_ms if timed else None,
        "load_ms": row.load_ms if timed else None,
        "peak_memory_bytes": row.peak_memory_bytes if timed else None,
        "accuracy_drop": drop,
        "flash_bytes": row.size_bytes,
        "arena_bytes": row.arena_bytes,
        "fallback_share": row.fallback_share,
    }


def over_budget(report: Report) -> list[str]:
    """Say of every file to ship that exceeds its budget which limit and by how much."""
    return [f"{row.label} is over its budget: {row.budget}" for row in report.over_budget]


def write(report: Report, folder: Path, recipe: str | None) -> Report:
    """Write the report and the manifest of its files, what is over budget among its warnings; returns it so."""
    report = replace(report, warnings=(*report.warnings, *over_budget(report)))
    report.write(folder, recipe, commit_of())
    write_manifest(report, folder, recipe)
    return report


def write_manifest(report: Report, folder: Path, recipe: str | None) -> None:
    """Write the manifest of a report's files.

    Args:
        report: The report.
        folder: Where the files are.
        recipe: Text of the configuration, if one is known.
    """
    report = replace(report, versions=report.versions or installed_versions())
    Manifest.of(report, commit_of(), recipe).write(folder)
