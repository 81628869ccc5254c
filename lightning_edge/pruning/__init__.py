"""Structured pruning in training: `Prune`."""

from __future__ import annotations

from lightning_edge.pruning.phase import Prune

__all__ = ["Prune"]
