"""What was found: one row per candidate, as JSON, metrics, Markdown, a page and a terminal table. Knows no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from lightning_edge.contents import Endpoint, Placements
from lightning_edge.files import replace_text
from lightning_edge.interface import Interface
from lightning_edge.reporting import rendering
from lightning_edge.reporting.budget import Verdict
from lightning_edge.reporting.classes import ClassChanges
from lightning_edge.reporting.devices import DeviceRow
from lightning_edge.reporting.html.fit import report_page
from lightning_edge.reporting.layers import LayerRow
from lightning_edge.reporting.network_size import NetworkSize
from lightning_edge.reporting.provenance import Commit
from lightning_edge.reporting.terminal import ReportTable
from lightning_edge.verdict import Grade, Judgement, Strict
from lightning_edge.wording import counted

Source = Literal["float", "post-training", "trained"]

# Verdicts as numbers, for loggers.
_VERDICTS: dict[Grade, int] = {"exact": 3, "close": 2, "differs": 1, "broken": 0}
_FAILED = -1.0

_PACKAGES = (
    "lightning-edge",
    "torch",
    "torchao",
    "lightning",
    "torchmetrics",
    "executorch",
    "coremltools",
    "litert-torch",
    "ai-edge-litert",
    "onnx",
    "onnxruntime",
)


@dataclass(frozen=True)
class Row:
    """One candidate: the network in torch, or one exported file. ``None`` is what could not be known.

    Attributes:
        target: ``"torch"`` or the name of the export target.
        precision: ``"fp32"`` or ``"int8"``.
        source: Where the weights and ranges come from: ``"float"`` training, ``"post-training"`` quantization or
            ``"trained"`` with quantizers.
        error: Why there is no such file; the other fields hold what was found before that.
        path: File, relative to the report.
        sha256: SHA-256 of the file, see `digest`.
        metrics: The user's own metrics.
        size_bytes: Bytes on disk; in torch, of parameters and buffers.
        compressed_bytes: Bytes of a zip of it.
        load_ms: Milliseconds from the path to a runner that is ready.
        p50_ms: Median latency of one sample, milliseconds.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        throughput: Samples per second, one at a time.
        planned_memory_bytes: Memory the file plans for activations, bytes.
        arena_bytes: Arena of TensorFlow Lite Micro, an upper bound, of an int8 ``.tflite`` file that it runs.
        peak_memory_bytes: By how much the file made the resident memory of its runtime's own process grow at its peak,
            over the whole split; Linux only.
        samples: Samples compared with the network it came from.
        top1: Share of them with the same largest output.
        max_steps: Largest difference in quantization steps.
        mean_steps: Mean difference in quantization steps, of the output that lies furthest off.
        most_steps: Difference that 99.9 % of the values stay within, in quantization steps, of that output.
        max_relative: Largest difference over the largest absolute output.
        int8_weight_share: Share of the weight bytes that are int8.
        float_ops: Operations of an int8 file that compute in float.
        delegated_ops: Operations handed to the target's delegate.
        undelegated_ops: Names of operations left to the runtime's own kernels.
        runtime: What ran it.
        is_reference: Whether that is a reference interpreter, whose latency means nothing for the target.
        scheme: How a float network's weights are stored, if in fewer bits.
        inputs: What the file takes, read from the file.
        outputs: What it gives.
        sample: What `load` takes for one sample, in the network's own layout.
        placements: Where the file's operations run.
        budget: Whether it keeps its budget, if there is one.
        interface: How the file is called, as it says.
        not_run: Why nothing on this machine could run the file, so that there is no number of what it computes.
        verdict: What its agreement comes to: ``"exact"``, ``"close"``, ``"differs"`` or ``"broken"``; ``None`` where
            nothing was compared.
        verdict_reason: Why it is that, one line.
        quantiles_ms: Quantiles of the latency of one sample from 0 to 1 in equal steps, milliseconds.
        classes: Which samples are in another class than in the float network, where there are class scores.
    """

    target: str
    precision: Literal["fp32", "int8"]
    source: Source
    error: str | None = None
    path: str | None = None
    sha256: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    size_bytes: int | None = None
    compressed_bytes: int | None = None
    load_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    throughput: float | None = None
    planned_memory_bytes: int | None = None
    arena_bytes: int | None = None
    peak_memory_bytes: int | None = None
    samples: int | None = None
    top1: float | None = None
    max_steps: float | None = None
    mean_steps: float | None = None
    most_steps: float | None = None
    max_relative: float | None = None
    int8_weight_share: float | None = None
    float_ops: Sequence[str] | None = None
    delegated_ops: int | None = None
    undelegated_ops: Sequence[str] | None = None
    runtime: str | None = None
    is_reference: bool = False
    scheme: str | None = None
    inputs: Sequence[Endpoint] = ()
    outputs: Sequence[Endpoint] = ()
    sample: Sequence[Endpoint] = ()
    placements: Placements | None = None
    budget: Verdict | None = None
    interface: Interface | None = None
    not_run: str | None = None
    verdict: Grade | None = None
    verdict_reason: str | None = None
    quantiles_ms: Sequence[float] = ()
    classes: ClassChanges | None = None

    @property
    def judgement(self) -> Judgement | None:
        """The verdict and its reason as one."""
        if self.verdict is None:
            return None
        return Judgement(self.verdict, () if self.verdict_reason is None else (self.verdict_reason,))

    @property
    def label(self) -> str:
        """What this row is, in words."""
        if self.precision == "fp32":
            return f"{self.target} fp32"
        return f"{self.target} int8 (quantized {self.when_quantized})"

    @property
    def when_quantized(self) -> str:
        """When an int8 network got its ranges, in words."""
        return "in training" if self.source == "trained" else "after training"

    @property
    def fallback_share(self) -> float | None:
        """Share of the multiply-accumulates that run outside the target's delegate or accelerator."""
        return None if self.placements is None else self.placements.fallback_share

    @property
    def within_budget(self) -> bool | None:
        """Whether it keeps its budget; ``None`` where there is none or it cannot be told."""
        if self.budget is None or self.budget.status == "not measurable":
            return None
        return self.budget.status == "within"


@dataclass(frozen=True)
class Report:
    """Every candidate's row, and how they were measured.

    Attributes:
        model: Name of the user's module.
        split: Which loop gave the metrics, ``"validate"`` or ``"test"``.
        rows: The candidates.
        parameters: Parameters of the float network: of the pruned one, where ``original`` is another.
        monitor: The metric that decides between post-training and trained quantization, if known.
        warmup: Calls before timing.
        repeats: Calls timed.
        threads: Threads asked of every runtime.
        calibration_batches: Batches that post-training quantization read.
        seed: The global seed, if one was set by ``seed_everything``.
        warnings: What the user should look at.
        notes: How something was done, or why it was not.
        versions: Versions of Python, the platform and what is installed.
        channels: Channels that each layer made before it was pruned and makes now, by the name of the layer.
        devices: What was found of the files on devices.
        layers: The layers with weights: bytes before and after, and what each costs in int8.
        macs: Multiply-accumulates of the float network's layers with weights, for one sample, if known.
        original: Size of the network before anything was taken out of it; ``None`` where nothing was.
        phases: Settings of the phases it was trained with, by name.
    """

    model: str
    split: str
    rows: Sequence[Row]
    parameters: int | None = None
    monitor: str | None = None
    warmup: int = 0
    repeats: int = 0
    threads: int = 1
    calibration_batches: int = 0
    seed: int | None = None
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    devices: Sequence[DeviceRow] = ()
    layers: Sequence[LayerRow] = ()
    macs: int | None = None
    original: NetworkSize | None = None
    phases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def failures(self) -> list[Row]:
        """Rows of files that could not be made."""
        return [row for row in self.rows if row.error is not None]

    def refused(self, strict: Strict) -> list[Row]:
        """Rows of files with a worse verdict than ``strict`` allows, see `Judgement.allowed`."""
        return [row for row in self.rows if row.judgement is not None and not row.judgement.allowed(strict)]

    @property
    def over_budget(self) -> list[Row]:
        """Rows of the files to ship that exceed their budget; a float file beside int8 ones is only their baseline."""
        files = [row for row in self.rows if row.target != "torch" and row.error is None]
        compressed = [row for row in files if row.precision == "int8" or row.scheme is not None]
        return [row for row in compressed or files if row.within_budget is False]

    def metrics(self) -> dict[str, float]:
        """Flatten to ``edge/<target>/<name>`` for int8 and ``edge/<target>/fp32_<name>`` for fp32.

        Where the int8 network was trained, its post-training baseline is ``edge/torch/post_training_<name>``. The
        verdict is a number: 3 exact, 2 close, 1 differs, 0 broken, -1 there is no file. Of rows with an error it is all
        there is; values that are not known are left out. On devices it is ``edge/<device>/<target>/<name>``, with
        what was measured before an error.
        """
        trained = any(row.source == "trained" for row in self.rows)
        flat: dict[str, float] = {}
        for row in self.rows:
            prefix = "fp32_" if row.precision == "fp32" else ""
            if trained and row.source == "post-training":
                prefix = "post_training_"
            if row.error is not None:
                flat[f"edge/{row.target}/{prefix}verdict"] = _FAILED
                continue
            values: dict[str, float | None] = {
                "size_bytes": row.size_bytes,
                "compressed_bytes": row.compressed_bytes,
                "load_ms": row.load_ms,
                "latency_p50_ms": row.p50_ms,
                "latency_p95_ms": row.p95_ms,
                "latency_p99_ms": row.p99_ms,
                "throughput": row.throughput,
                "planned_memory_bytes": row.planned_memory_bytes,
                "arena_bytes": row.arena_bytes,
                "peak_memory_bytes": row.peak_memory_bytes,
                "top1_agreement": row.top1,
                "max_steps": row.max_steps,
                "mean_steps": row.mean_steps,
                "most_steps": row.most_steps,
                "max_relative": row.max_relative,
                "int8_weight_share": row.int8_weight_share,
                "fallback_share": row.fallback_share,
                "within_budget": row.within_budget,
                "verdict": None if row.verdict is None else _VERDICTS[row.verdict],
                **row.metrics,
            }
            for name, value in values.items():
                if value is not None:
                    flat[f"edge/{row.target}/{prefix}{name}"] = float(value)
        for found in self.devices:
            flat.update(found.flat())
        return flat

    def to_json(self) -> str:
        """Write as JSON; a number that is not finite becomes ``null``."""
        return json.dumps(without_infinities(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Write as Markdown: what it costs and how well it does, how true it is to its network, how it was measured."""
        return rendering.markdown(self)

    def table(self) -> ReportTable:
        """Draw as tables of the `rich` package, as wide as the terminal."""
        return ReportTable(self)

    def metric_names(self) -> list[str]:
        """Names of the user's metrics, the monitored one first."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.metrics))
        return sorted(names, key=lambda name: name != self.monitor)

    def settings(self) -> list[str]:
        """How it was measured, one phrase each."""
        samples = max((row.samples or 0 for row in self.rows), default=0)
        phrases = [
            f"metrics of the {self.split} loop",
            f"latency of one sample: {counted(self.warmup, 'warm-up call')}, {self.repeats} timed, "
            f"{counted(self.threads, 'thread')}",
        ]
        if samples:
            phrases.insert(1, f"agreement over {counted(samples, 'sample')}")
        if self.calibration_batches:
            phrases.append(f"post-training quantization from {counted(self.calibration_batches, 'batch', 'batches')}")
        phrases.append("no seed set" if self.seed is None else f"seed {self.seed}")
        return phrases

    def float_networks(self) -> list[str]:
        """Which float network figures are of, and what it was before, one sentence each."""
        if self.parameters is None:
            return []
        macs = None if self.macs is None else f" and {self.macs:,} multiply-accumulates a sample"
        now = f"{self.parameters:,} parameters{macs or ''}"
        if self.original is None:
            return [f"fp32 is the float network, of {now}."]
        return [
            f"Before compression: {self.original} in float. What its metrics were is not known here.",
            f"fp32 is the float network after its channels or ranks were cut, of {now}; metrics, latency and files are "
            "compared with it.",
        ]

    def to_html(self, recipe: str | None = None, commit: Commit | None = None) -> str:
        """Write as a page: one file that loads nothing, for a browser, a phone and a printer.

        Args:
            recipe: Text of the configuration, if one is known.
            commit: The commit of the working directory, if there is one.
        """
        return report_page(self, recipe, commit)

    def write(self, folder: Path, recipe: str | None = None, commit: Commit | None = None) -> list[Path]:
        """Write ``report.json``, ``report.md`` and ``report.html`` into ``folder``, each whole or not at all.

        Args:
            folder: The folder.
            recipe: Text of the configuration, for the page.
            commit: The commit of the working directory, for the page.

        Raises:
            EdgeError: If a file cannot be written.
        """
        texts = (
            ("report.json", self.to_json()),
            ("report.md", self.to_markdown()),
            ("report.html", self.to_html(recipe, commit)),
        )
        return [replace_text(folder / name, text) for name, text in texts]


def without_infinities(value: Any) -> Any:
    """Give plain values in the form that JSON has: lists for tuples, ``None`` for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def installed_versions() -> dict[str, str]:
    """List Python, the platform and what is installed of the packages that take part."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "cpus": str(os.cpu_count())}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def digest(path: Path) -> str:
    """Compute the SHA-256 of a file; of a folder, that of the sorted lines ``<sha256>  <path>`` of its files."""
    if path.is_dir():
        lines = sorted(
            f"{digest(file)}  {file.relative_to(path).as_posix()}\n" for file in path.rglob("*") if file.is_file()
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
