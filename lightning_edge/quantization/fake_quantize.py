"""The fake-quantizer: rounds with the scale that conversion writes, keeps no mask, takes any float type.

It stands where torchao's own would (same base class, same state_dict keys, same observers) and differs in three
ways, each measured on the pinned versions:

- torch's fake-quantize kernels write a bool mask for the backward pass, which is not vectorized and is most of their
  cost. Here the backward pass compares the saved input with the clipping range instead.
- torchao's fused kernel rounds symmetric per-channel weights with a scale 255/254 of the one that conversion computes.
  Here both come from the same observer.
- The stock kernels fail under bfloat16 autocast. Here the arithmetic is float32, whatever comes in and goes out.

Import this module only where torchao may be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

from lightning_edge.errors import CompressionError

# Beyond it float32 arithmetic on the range overflows.
_LARGEST_RANGE = 1e30


class _RoundToScale(torch.autograd.Function):
    """Quantize and dequantize with one scale; the gradient passes where the value was inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
        ctx.save_for_backward(x)
        # The range in real values, half a step wider at both ends: what rounds into the range is inside it.
        ctx.low = (quant_min - 0.5 - zero_point) * scale
        ctx.high = (quant_max + 0.5 - zero_point) * scale
        # mul() makes the one new tensor, the rest works in it. 1/scale as quantized_decomposed has it, to the same
        # bits; adding the zero point and taking it off again is left out: among whole numbers it changes nothing.
        rounded = x.float().mul(1.0 / scale).round_().clamp_(quant_min - zero_point, quant_max - zero_point)
        return rounded.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], x, ctx.low, ctx.high), None, None, None, None


class _RoundToScales(torch.autograd.Function):
    """The same with tensors for scale and zero point: one per channel, or on a device that must not be waited for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        levels = x.float().mul(1.0 / scale).round_().add_(zero_point)
        ctx.save_for_backward((levels >= quant_min) & (levels <= quant_max))
        return levels.clamp_(quant_min, quant_max).sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None


class FakeQuantize(FakeQuantizeBase):  # type: ignore[misc]
    """Observe a tensor while training, and round it to the quantized values its range gives.

    The range moves only in training mode and only until `freeze`; in eval mode it stands still, so that validation
    data never leaks into it. All state is in buffers, under torchao's names.

    Args:
        observer: Constructor of a torchao observer, which keeps the range and computes scale and zero point.
        quant_min: Smallest quantized value.
        quant_max: Largest quantized value.
        **observer_kwargs: Given to ``observer``.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, observer: Callable[..., Any], quant_min: int, quant_max: int, **observer_kwargs: Any) -> None:
        super().__init__()
        self.activation_post_process = observer(quant_min=quant_min, quant_max=quant_max, **observer_kwargs)
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.dtype = self.activation_post_process.dtype
        self.qscheme = self.activation_post_process.qscheme
        self.ch_axis = getattr(self.activation_post_process, "ch_axis", -1)
        self.is_per_channel = self.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)
        self.is_dynamic = False
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        # A Python bool beside the buffer: reading the buffer would make a GPU wait in every call.
        self.observing = True

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Compute scale and zero point from the observed range; the same numbers in training and in conversion."""
        scale, zero_point = self.activation_post_process.calculate_qparams()
        return scale, zero_point

    def observe(self, x: Tensor) -> None:
        """Take ``x`` into the range, and compute scale and zero point anew.

        Raises:
            CompressionError: If ``x`` holds NaN or infinity.
        """
        self.activation_post_process(x.detach().float())
        observer = self.activation_post_process
        ends = getattr(observer, "max_val", self.scale) - getattr(observer, "min_val", self.scale)
        if not bool((ends < _LARGEST_RANGE).all()):
            raise CompressionError(
                "a quantizer was given a value that is not finite (NaN or infinity), or as good as infinite (above "
                f"{_LARGEST_RANGE:g}, as in masks), which has no int8 range. Check the network's weights and inputs, "
                "its loss for divergence, and additive masks outside softmax."
            )
        scale, zero_point = self.calculate_qparams()
        if self.scale.shape != scale.shape:
            self.scale.resize_(scale.shape)
            self.zero_point.resize_(zero_point.shape)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` if training and not frozen; return it rounded, in its own dtype."""
        if self.training and self.observing:
            self.observe(x)
        if self.is_per_channel:
            shape = [1] * x.dim()
            shape[self.ch_axis] = -1
            scale, zero_point = self.scale.view(shape), self.zero_point.view(shape)
        elif x.is_cpu:
            single = (float(self.scale), int(self.zero_point))
            return _apply(_RoundToScale, x, *single, self.quant_min, self.quant_max)
        else:
            scale, zero_point = self.scale, self.zero_point
        return _apply(_RoundToScales, x, scale, zero_point, self.quant_min, self.quant_max)

    def enable_observer(self, enabled: bool = True) -> None:
        """Let the range move in training, or freeze it."""
        super().enable_observer(enabled)
        self.observing = enabled

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Per-channel buffers begin with one element and have the channels' size once something was observed.
        for name in ("scale", "zero_point"):
            if prefix + name in state_dict:
                getattr(self, name).resize_(state_dict[prefix + name].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.observing = bool(self.observer_enabled[0])


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result = function.apply(*args)
    assert isinstance(result, Tensor)
    return result
