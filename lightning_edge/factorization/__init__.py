"""Low-rank factorization: a linear layer or 1x1 convolution as two smaller ones, by singular value decomposition."""

from __future__ import annotations

from lightning_edge.factorization.phase import Factorize

__all__ = ["Factorize"]
