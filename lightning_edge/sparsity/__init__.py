"""Sparsity: single weights that are zero and stay zero, without a change of structure."""

from __future__ import annotations

from lightning_edge.sparsity.phase import Sparsify

__all__ = ["Sparsify"]
