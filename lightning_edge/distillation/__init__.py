"""Knowledge distillation: `Distill`, its losses, and the teacher beside a network in training."""

from __future__ import annotations

from lightning_edge.distillation.losses import (
    DIST,
    AttentionTransfer,
    DistillationLoss,
    FeatureMatching,
    KLDivergence,
    LogitsMSE,
)
from lightning_edge.distillation.phase import Distill
from lightning_edge.distillation.runtime import Distillation

__all__ = [
    "DIST",
    "AttentionTransfer",
    "Distill",
    "Distillation",
    "DistillationLoss",
    "FeatureMatching",
    "KLDivergence",
    "LogitsMSE",
]
