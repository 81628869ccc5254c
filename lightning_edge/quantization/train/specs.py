"""What a quantizer is given for activations and weights: type, range, scheme and observer."""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization.pt2e.observer import (
    FixedQParamsObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from lightning_edge.quantization.train.fake_quantize import FakeQuantize


def activation_spec(constructor: Any) -> QuantizationSpec:
    """8 bits, affine, one scale for the tensor, observed by what ``constructor`` makes."""
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=constructor,
    )


def wide_activation_spec(constructor: Any) -> QuantizationSpec:
    """16 bits, symmetric: the activations of LiteRT's 16x8 kernels."""
    return QuantizationSpec(
        dtype=torch.int16,
        quant_min=-32767,
        quant_max=32767,
        qscheme=torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=constructor,
    )


def fixed_spec(scale: float, zero_point: int) -> QuantizationSpec:
    """8 bits with a range that nothing observes: that of a softmax or a sigmoid, which targets ask for."""
    observer = FixedQParamsObserver.with_args(scale=scale, zero_point=zero_point)
    return activation_spec(FakeQuantize.with_args(observer=observer))


def weight_spec(axis: int | None) -> QuantizationSpec:
    """Symmetric weights, by the range they have now: a weight is known exactly, so nothing is averaged."""
    per_tensor = MovingAverageMinMaxObserver.with_args(averaging_constant=1.0)
    observer = per_tensor if axis is None else PerChannelMinMaxNow.with_args(ch_axis=axis)
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_tensor_symmetric if axis is None else torch.per_channel_symmetric,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=observer),
    )


class PerChannelMinMaxNow(PerChannelMinMaxObserver):  # type: ignore[misc]
    """Torchao's per-channel observer without its memory of larger values that the weights had before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take the range of ``x`` in place of the one so far."""
        self.reset_min_max_vals()
        observed: torch.Tensor = super().forward(x)
        return observed
