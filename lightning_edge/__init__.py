"""Compression in PyTorch Lightning training, and proof on every edge runtime.

The public names are resolved on first use, so that ``import lightning_edge`` loads no optional library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_edge import moved

if TYPE_CHECKING:
    from lightning_edge.callbacks.compression import EdgeCompressionCallback
    from lightning_edge.callbacks.evaluation import DeviceEvaluationCallback
    from lightning_edge.callbacks.tracking import OfflineFallbackWandbLogger
    from lightning_edge.callbacks.warm_start import WarmStart
    from lightning_edge.distillation.phase import Distill
    from lightning_edge.errors import (
        AgreementError,
        BudgetError,
        CompressionError,
        DeviceError,
        EdgeError,
        ExportError,
        ManifestError,
        MissingExtraError,
        RecordError,
        RunnerError,
    )
    from lightning_edge.exporters import export, load
    from lightning_edge.factorization import Factorize
    from lightning_edge.interface import Interface, Pixels
    from lightning_edge.measure import Timing, Tolerance
    from lightning_edge.pruning import Prune
    from lightning_edge.quantization import Quantize, check_calibration, convert, mixed_plan, quantize, sensitivity
    from lightning_edge.record import load_compressed
    from lightning_edge.reporting.budget import Budget
    from lightning_edge.reporting.manifest import Manifest
    from lightning_edge.reporting.verification import verify
    from lightning_edge.sparsity import Sparsify

    __version__: str

moved.install()

_HOMES = {
    "lightning_edge.reporting.budget": ("Budget",),
    "lightning_edge.callbacks.compression": ("EdgeCompressionCallback",),
    "lightning_edge.callbacks.evaluation": ("DeviceEvaluationCallback",),
    "lightning_edge.distillation.phase": ("Distill",),
    "lightning_edge.errors": (
        "AgreementError",
        "BudgetError",
        "CompressionError",
        "DeviceError",
        "EdgeError",
        "ExportError",
        "ManifestError",
        "MissingExtraError",
        "RecordError",
        "RunnerError",
    ),
    "lightning_edge.exporters": ("export", "load"),
    "lightning_edge.factorization": ("Factorize",),
    "lightning_edge.interface": ("Interface", "Pixels"),
    "lightning_edge.reporting.manifest": ("Manifest",),
    "lightning_edge.measure": ("Timing", "Tolerance"),
    "lightning_edge.pruning": ("Prune",),
    "lightning_edge.quantization": (
        "Quantize",
        "check_calibration",
        "convert",
        "mixed_plan",
        "quantize",
        "sensitivity",
    ),
    "lightning_edge.record": ("load_compressed",),
    "lightning_edge.sparsity": ("Sparsify",),
    "lightning_edge.callbacks.tracking": ("OfflineFallbackWandbLogger",),
    "lightning_edge.callbacks.warm_start": ("WarmStart",),
    "lightning_edge.reporting.verification": ("verify",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AgreementError",
    "Budget",
    "BudgetError",
    "CompressionError",
    "DeviceError",
    "DeviceEvaluationCallback",
    "Distill",
    "EdgeCompressionCallback",
    "EdgeError",
    "ExportError",
    "Factorize",
    "Interface",
    "Manifest",
    "ManifestError",
    "MissingExtraError",
    "OfflineFallbackWandbLogger",
    "Pixels",
    "Prune",
    "Quantize",
    "RecordError",
    "RunnerError",
    "Sparsify",
    "Timing",
    "Tolerance",
    "WarmStart",
    "__version__",
    "check_calibration",
    "convert",
    "export",
    "load",
    "load_compressed",
    "mixed_plan",
    "quantize",
    "sensitivity",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module it lives in, and keep it."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("lightning-edge")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported already or not."""
    return sorted({*globals(), *__all__})
