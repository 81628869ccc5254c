"""Quantize a file's inputs and dequantize its outputs, where the file itself takes integers."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_edge.contents import Endpoint
from lightning_edge.exporters.run.calls import TensorSpec


def spec(end: Endpoint) -> TensorSpec:
    """Say what a runner takes for an input: real numbers where the file has quantized ones."""
    return TensorSpec(end.shape, torch.float32 if end.scale else dtype(end))


def dtype(end: Endpoint) -> torch.dtype:
    """The file's own type."""
    found = getattr(torch, end.dtype)
    assert isinstance(found, torch.dtype), end
    return found


def quantized(values: Tensor, end: Endpoint) -> Tensor:
    """Round real values to the integers of a quantized end; those of any other end are given as they are."""
    if not end.scale:
        return values
    limits = torch.iinfo(dtype(end))
    steps: Tensor = torch.round(values / end.scale) + (end.zero_point or 0)
    return steps.clamp(limits.min, limits.max).to(dtype(end))


def dequantized(values: Tensor, end: Endpoint) -> Tensor:
    """Give the real values of a quantized end's integers; those of any other end as they are."""
    if not end.scale:
        return values
    return (values.float() - (end.zero_point or 0)) * end.scale
