"""The fake-quantizer's parts as torch.compile takes them: one opaque operation that observes, and plain arithmetic.

What observes reads two numbers off a tensor and goes on in Python, which no compiled graph can hold, and it changes
state in every step, which must not be a reason to compile anew. As an operation of its own it is neither seen nor
guarded. It takes its input in whatever memory order the compiler chose: without that, inductor brings every activation
into the order of the uncompiled network first, which costs several times the rest of a step. Knows torch only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_edge.quantization.train import ranges
from lightning_edge.quantization.train.ranges import HIGHEST, LOWEST


@torch.library.custom_op(
    "lightning_edge::observe",
    mutates_args=("min_val", "max_val", "scale", "zero_point"),
    tags=(torch.Tag.flexible_layout,),
)
def observe(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging: float,
    smallest_scale: float,
    symmetric: bool,
    quant_min: int,
    quant_max: int,
    low: float,
    high: float,
) -> None:
    """Do what `ranges.observe` does."""
    rule = ranges.Rule(averaging, smallest_scale, symmetric, quant_min, quant_max)
    ranges.observe(x, ranges.State(min_val, max_val, scale, zero_point), rule, low, high)


@torch.library.custom_op("lightning_edge::in_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _in_backward(small: Tensor, gradient: Tensor) -> Tensor:
    """Copy a small tensor, not before a gradient is there.

    What depends on it is computed in the backward pass. Left to itself the compiler compares a value with its clipping
    range in the forward pass and keeps the answers as bools, and writing bools is what its loops on the CPU are slow
    at: on ResNet-8 half of a compiled step.
    """
    return small.clone()


@_in_backward.register_fake
def _(small: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(small)


@torch.library.custom_op("lightning_edge::as_it_is_now", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def as_it_is_now(small: Tensor) -> Tensor:
    """Copy a small tensor that the same graph changes later on.

    AOTAutograd may compute what follows from a running variance once more in the backward pass, from the buffer, which
    BatchNorm has moved by then: gradients of weights came out 3.5 % off. It never repeats an operation it cannot see
    into.
    """
    return small.clone()


@as_it_is_now.register_fake
def _(small: Tensor) -> Tensor:
    return torch.empty_like(small)


class _Round(torch.autograd.Function):
    """Round to whole levels between two, in steps of ``scale``; the gradient passes inside an interval."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, levels: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(*(() if inside is None else (x, inside)))
        rounded = (x.float() * (1.0 / scale)).round()
        return (torch.minimum(torch.maximum(rounded, levels[0]), levels[1]) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.saved_tensors:
            return gradients[0], None, None, None
        x, inside = ctx.saved_tensors
        low, high = _in_backward(inside, gradients[0])
        return torch.where((x > low) & (x < high), gradients[0], 0.0), None, None, None


def round_to_scale(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    limits: tuple[int, int],
    low: float = LOWEST,
    high: float = HIGHEST,
    *,
    clips: bool = True,
) -> Tensor:
    """Clip, quantize and dequantize, as `ranges.clipping` has it.

    Args:
        x: Any float tensor.
        scale: One element, or in a shape that broadcasts with ``x``.
        zero_point: In the shape of ``scale``.
        limits: Smallest and largest quantized value.
        low: What smaller values of ``x`` count as.
        high: What larger values of ``x`` count as.
        clips: Whether any value may be outside the range, so that its gradient is stopped.
    """
    with torch.no_grad():
        first, last = limits[0] - zero_point.float(), limits[1] - zero_point.float()
        inside = [(first - 0.5) * scale, (last + 0.5) * scale]
        if low > LOWEST:
            first, inside[0] = torch.maximum(first, (low * (1.0 / scale)).round()), inside[0].clamp_min(low)
        if high < HIGHEST:
            last, inside[1] = torch.minimum(last, (high * (1.0 / scale)).round()), inside[1].clamp_max(high)
        levels = torch.stack([first, last])
        ends = torch.stack(inside) if clips else None
    rounded: Tensor = _Round.apply(x, scale, levels, ends)  # type: ignore[no-untyped-call, unused-ignore]
    return rounded
