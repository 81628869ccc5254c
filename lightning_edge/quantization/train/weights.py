"""A layer's weight and bias as they are trained: BatchNorm in them, rounded; all in one step for autograd.

The graph spells this out in a dozen operations on small tensors for each layer, each with a node of autograd's behind
it, so that on small networks they cost more than the fake-quantizers of the activations. Here the same arithmetic, to
the same bits, is one function with its gradient written down. Import this module only where torchao may be imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_edge.quantization.train import ranges, traced
from lightning_edge.quantization.train.fake_quantize import FakeQuantize
from lightning_edge.quantization.train.layers import LiveBatchNorm, round_bias
from lightning_edge.quantization.train.specs import PerChannelMinMaxNow

_EPSILON = torch.finfo(torch.float32).eps


class LayerWeights(nn.Module):
    """Gives a layer its rounded weight and bias.

    With a `LiveBatchNorm` that learns, the weight is divided by BatchNorm's scale again after rounding: a division of
    the weight instead of one of the layer's output.

    Args:
        weight_quantizer: The fake-quantizer of the weight, symmetric, with one scale for each output channel.
        input_quantizer: The fake-quantizer of the layer's input, where the bias is rounded.
        eps: Of the BatchNorm in the weight.
        live: That BatchNorm, if its statistics may still learn and its input is this layer's output alone.
    """

    modules_read: tuple[FakeQuantize, FakeQuantize | None, LiveBatchNorm | None]

    def __init__(
        self,
        weight_quantizer: FakeQuantize,
        input_quantizer: FakeQuantize | None,
        eps: float = 0.0,
        live: LiveBatchNorm | None = None,
    ) -> None:
        super().__init__()
        # A tuple, so that they are read and not owned: all are modules of the graph already.
        self.modules_read = (weight_quantizer, input_quantizer, live)
        self.eps = eps

    def forward(
        self,
        weight: Tensor,
        layer_bias: Tensor | None,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        mean: Tensor | None = None,
        variance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute weight and bias; without ``mean`` and ``variance`` there is no BatchNorm in them."""
        quantizer, input_quantizer, live = self.modules_read
        unscaled = live is not None and live.learns
        parameters = (weight, layer_bias, gamma, beta, mean, variance)
        if torch.compiler.is_compiling():
            folded, bias, scale, _ = _fold(*parameters, self.eps, quantizer.ch_axis)
            moves = quantizer.training and quantizer.observing
            if moves and quantizer.scale.numel() != weight.shape[quantizer.ch_axis]:
                _size(quantizer, weight.shape[quantizer.ch_axis])
            step = _observe(quantizer, folded.detach()) if moves else quantizer.scale
            shaped = [_shaped(parameter, quantizer, weight) for parameter in (step, quantizer.zero_point)]
            limits = (quantizer.quant_min, quantizer.quant_max)
            rounded = traced.round_to_scale(folded, shaped[0], shaped[1], limits, clips=not moves)
            if unscaled and scale is not None:
                rounded = rounded / _divisor(scale, quantizer, weight)
        else:
            rounded, bias = _FoldAndRound.apply(  # type: ignore[no-untyped-call, unused-ignore]
                *parameters, self.eps, unscaled, quantizer
            )
        assert isinstance(rounded, Tensor)
        if bias is not None and input_quantizer is not None and not unscaled:
            bias = round_bias(bias, input_quantizer.scale, quantizer.scale)
        return rounded, bias


def fuses(quantizer: nn.Module) -> bool:
    """Whether `LayerWeights` computes what this fake-quantizer of a weight does."""
    return isinstance(quantizer, FakeQuantize) and type(quantizer.activation_post_process) is PerChannelMinMaxNow


class _FoldAndRound(torch.autograd.Function):
    """Fold BatchNorm, observe, round; gradients as if rounding were not there, within the range."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        weight, layer_bias, gamma, beta, mean, variance, eps, unscaled, quantizer = args
        folded, bias, scale, inverse = _fold(weight, layer_bias, gamma, beta, mean, variance, eps, quantizer.ch_axis)
        inside = None
        if quantizer.training and quantizer.observing:
            shaped = _shaped(_observe(quantizer, folded), quantizer, weight)
            # The largest weight is the largest level: nothing is clipped.
            levels = folded.float().mul(1.0 / shaped).round_()
        else:
            shaped = _shaped(quantizer.scale, quantizer, weight)
            unclipped = folded.float().mul(1.0 / shaped).round_()
            levels = unclipped.clamp(quantizer.quant_min, quantizer.quant_max)
            inside = levels == unclipped
        rounded = levels.mul_(shaped).to(weight.dtype)
        if unscaled and scale is not None:
            rounded = rounded / _divisor(scale, quantizer, weight)
        # A live BatchNorm moves mean and variance before the backward pass, unseen by autograd.
        centered = None if mean is None or unscaled else (-mean if layer_bias is None else layer_bias - mean)
        ctx.save_for_backward(weight, gamma, centered, inverse, scale, inside, rounded if unscaled else None)
        ctx.unscaled, ctx.quantizer, ctx.has_bias = unscaled, quantizer, layer_bias is not None
        ctx.has_beta = beta is not None
        return rounded, bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, gamma, centered, inverse, scale, inside, rounded = ctx.saved_tensors
        g, g_bias = gradients
        assert g is not None
        passed = g if inside is None else torch.where(inside, g, 0.0)
        if scale is None:
            return passed, g_bias, *[None] * 7
        quantizer, g_layer_bias = ctx.quantizer, None
        if ctx.unscaled:
            divisor = _divisor(scale, quantizer, weight)
            passed = passed / divisor
            g_scale = _per_channel(passed * weight - g * rounded / divisor, quantizer)
        else:
            g_scale = _per_channel(passed * weight, quantizer)
        if g_bias is not None and centered is not None:
            g_scale = g_scale + g_bias * centered
            g_layer_bias = g_bias * scale if ctx.has_bias else None
        g_gamma = None if gamma is None else g_scale * inverse
        g_beta = g_bias if ctx.has_beta else None
        return passed * _shaped(scale, quantizer, weight), g_layer_bias, g_gamma, g_beta, *[None] * 5


def _fold(
    weight: Tensor,
    layer_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    axis: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Write BatchNorm into weight and bias, by the expression that `capture` writes into the graph.

    Returns:
        Weight, bias, BatchNorm's scale, and 1 / sqrt(variance + eps), each with one value for each channel.
    """
    if variance is None or mean is None:
        return weight, layer_bias, None, None
    if torch.compiler.is_compiling():
        mean, variance = traced.as_it_is_now(mean), traced.as_it_is_now(variance)
    inverse = torch.rsqrt(variance + eps)
    scale = inverse if gamma is None else inverse * gamma
    bias = (-mean if layer_bias is None else layer_bias - mean) * scale
    if beta is not None:
        bias = bias + beta
    return weight * _along(scale, weight, axis), bias, scale, inverse


def _observe(quantizer: FakeQuantize, folded: Tensor) -> Tensor:
    """Take the range that the weight has now; return the scale for each channel."""
    observer = quantizer.activation_post_process
    with torch.no_grad():
        minimum, maximum = torch.aminmax(folded.float().movedim(quantizer.ch_axis, 0).flatten(1), dim=1)
        scale = torch.maximum(-minimum, maximum) / ((quantizer.quant_max - quantizer.quant_min) / 2)
        if not torch.compiler.is_compiling() and not scale.max().item() < ranges.LARGEST_RANGE:
            raise ranges.NotFiniteError
        scale.clamp_min_(_EPSILON)
        for buffer, value in ((observer.min_val, minimum), (observer.max_val, maximum), (quantizer.scale, scale)):
            if buffer.shape != value.shape:
                buffer.resize_(value.shape)
            buffer.copy_(value)
        if quantizer.zero_point.shape != scale.shape:
            quantizer.zero_point.resize_(scale.shape).zero_()
    return scale


def _along(scale: Tensor, weight: Tensor, axis: int) -> Tensor:
    shape = [1] * weight.dim()
    shape[axis] = -1
    return scale.view(shape)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _size(quantizer: FakeQuantize, channels: int) -> None:
    """Give buffers that never held anything the size of the channels, which a compiled graph cannot."""
    observer = quantizer.activation_post_process
    for buffer in (observer.min_val, observer.max_val, quantizer.scale, quantizer.zero_point):
        buffer.resize_(channels).zero_()


def _shaped(scale: Tensor, quantizer: FakeQuantize, weight: Tensor) -> Tensor:
    return _along(scale, weight, quantizer.ch_axis)


def _divisor(scale: Tensor, quantizer: FakeQuantize, weight: Tensor) -> Tensor:
    # A channel whose gamma is zero has no scale to divide by; its weight is zero either way.
    return _shaped(torch.where(scale == 0, 1.0, scale), quantizer, weight)


def _per_channel(x: Tensor, quantizer: FakeQuantize) -> Tensor:
    return x.sum([axis for axis in range(x.dim()) if axis != quantizer.ch_axis % x.dim()])
