"""The fake-quantizer: rounds with the scale that conversion writes, keeps no mask, takes any float type.

It stands where torchao's own would (same base class, same state_dict keys, same observers) and differs in four
ways, each measured on the pinned versions:

- torch's fake-quantize kernels write a bool mask for the backward pass, which is not vectorized and is most of their
  cost. Here the backward pass compares the saved input with the clipping range instead.
- torchao's fused kernel rounds symmetric per-channel weights with a scale 255/254 of the one that conversion computes.
  Here both come from the same range.
- The stock kernels fail under bfloat16 autocast. Here the arithmetic is float32, whatever comes in and goes out.
- On several processes the range of an activation is that of the global batch.

Import this module only where torchao may be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.pt2e.observer import FixedQParamsObserver, MovingAverageMinMaxObserver

from lightning_edge.quantization.train import ranges, traced
from lightning_edge.quantization.train.memory_format import in_memory_order, in_order_of
from lightning_edge.quantization.train.ranges import HIGHEST, LOWEST

# Values of a large tensor that are rounded together: few enough to stay in a core's cache over the four operations.
_PIECE = 131_072


class _RoundToScale(torch.autograd.Function):
    """Clip, quantize and dequantize with one scale; the gradient passes where the value was inside the range."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: float, zero_point: int, limits: tuple[int, int], low: float, high: float
    ) -> Tensor:
        ctx.save_for_backward(x)
        levels, ctx.inside = ranges.clipping(scale, zero_point, limits, low, high)
        # mul() makes the one new tensor, the rest works in it. 1/scale as quantized_decomposed has it, to the same
        # bits; adding the zero point and taking it off again is left out: among whole numbers it changes nothing.
        row = None if x.dtype is not torch.float32 or x.numel() < 2 * _PIECE else in_memory_order(x)
        if row is None:
            rounded = x.float().mul(1.0 / scale).round_().clamp_(*levels)
            return rounded.mul_(scale).to(x.dtype)
        rounded, size = torch.empty_like(x), _PIECE * torch.get_num_threads()
        results = in_memory_order(rounded)
        assert results is not None
        for piece, result in zip(row.split(size), results.split(size), strict=True):
            torch.mul(piece, 1.0 / scale, out=result).round_().clamp_(*levels).mul_(scale)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gradient = in_order_of(gradients[0], x)
        return torch.ops.aten.hardtanh_backward(gradient, x, *ctx.inside), None, None, None, None, None


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
        # Whether several values share this range in one run of the graph, as those that are concatenated do.
        self.joint = False
        self._run: tuple[Tensor, Tensor, Tensor] | None = None
        # A Python bool beside the buffer: reading the buffer would make a GPU wait in every call.
        self.observing = True

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Compute scale and zero point from the observed range; the same numbers in training and in conversion."""
        scale, zero_point = self.activation_post_process.calculate_qparams()
        return scale, zero_point

    def observe(self, x: Tensor, low: float = LOWEST, high: float = HIGHEST) -> None:
        """Take ``x``, clipped to [``low``, ``high``], into the range, and compute scale and zero point anew.

        Raises:
            CompressionError: If ``x`` holds NaN or infinity.
        """
        x = x.detach()
        if type(self.activation_post_process) is MovingAverageMinMaxObserver:
            if self.joint and x.numel():
                x = self._ends_of_run(x, low, high)
            ranges.observe(x, self._state(), self._rule(), low, high)
            return
        if (low, high) != (LOWEST, HIGHEST):
            x = x.clamp(low, high)
        observer = self.activation_post_process
        # Torchao's histogram leaves out a batch that holds infinity, and fails on one that holds NaN.
        if x.numel() and not bool(torch.sub(*reversed(torch.aminmax(x))) < ranges.LARGEST_RANGE):
            raise ranges.NotFiniteError
        observer(x.float())
        ends = getattr(observer, "max_val", self.scale) - getattr(observer, "min_val", self.scale)
        if not bool((ends < ranges.LARGEST_RANGE).all()):
            raise ranges.NotFiniteError
        self.set_scale(*self.calculate_qparams())

    def begin_run(self) -> None:
        """Say that a new run of the graph begins: what is observed in it moves the range once."""
        self._run = None

    def _ends_of_run(self, x: Tensor, low: float, high: float) -> Tensor:
        """Give the ends of all that was observed in this run, and put the range back to what it was before it.

        One step of the average for each value would end at the mean of their ranges, and clip the widest.
        """
        observer = self.activation_post_process
        smallest, largest = (end.float().clamp(low, high) for end in torch.aminmax(x))
        if self._run is None:
            minimum, maximum = observer.min_val.clone(), observer.max_val.clone()
        else:
            minimum, maximum, ends = self._run
            smallest, largest = torch.minimum(smallest, ends[0]), torch.maximum(largest, ends[1])
            observer.min_val.copy_(minimum)
            observer.max_val.copy_(maximum)
        ends = torch.stack([smallest, largest])
        self._run = minimum, maximum, ends
        return ends

    def set_scale(self, scale: Tensor, zero_point: Tensor) -> None:
        """Write scale and zero point into the buffers, which begin with one element each."""
        if self.scale.shape != scale.shape:
            self.scale.resize_(scale.shape)
            self.zero_point.resize_(zero_point.shape)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def forward(self, x: Tensor, low: float = LOWEST, high: float = HIGHEST, observed: bool = False) -> Tensor:
        """Observe ``x`` if training and not frozen; return it rounded, in its own dtype.

        Args:
            x: Any float tensor.
            low: What smaller values are before they are observed and rounded: the activation in front, if it clips.
            high: What larger values are.
            observed: Whether ``x`` comes from values that this quantizer has observed already.
        """
        moves = self.training and self.observing and not observed
        if torch.compiler.is_compiling():
            return self._forward_compiled(x, low, high, moves)
        if moves:
            self.observe(x, low, high)
        limits = (self.quant_min, self.quant_max)
        if not self.is_per_channel and x.is_cpu:
            return _apply(_RoundToScale, x, self.scale.item(), self.zero_point.item(), limits, low, high)
        if (low, high) != (LOWEST, HIGHEST):
            x = x.clamp(low, high)
        scale, zero_point = self.scale, self.zero_point
        if self.is_per_channel:
            shape = [1] * x.dim()
            shape[self.ch_axis] = -1
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        return _apply(_RoundToScales, x, scale, zero_point, *limits)

    def enable_observer(self, enabled: bool = True) -> None:
        """Let the range move in training, or freeze it."""
        super().enable_observer(enabled)
        self.observing = enabled

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Ranges and scales go where the network goes, and stay float32 where it becomes half precision or double.
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype != tensor.dtype else result

        return super()._apply(moved, recurse)

    def _state(self) -> ranges.State:
        observer = self.activation_post_process
        return ranges.State(observer.min_val, observer.max_val, self.scale, self.zero_point)

    def _rule(self) -> ranges.Rule:
        observer = self.activation_post_process
        # The smallest scale is a buffer; it is float32's epsilon in every observer that torchao has.
        symmetric = self.qscheme == torch.per_tensor_symmetric
        return ranges.Rule(observer.averaging_constant, _EPSILON, symmetric, self.quant_min, self.quant_max)

    def _forward_compiled(self, x: Tensor, low: float, high: float, moves: bool) -> Tensor:
        """The same in operations that a compiler can take."""
        observer = self.activation_post_process
        eager = self.is_per_channel or (moves and self.joint)
        if eager or not isinstance(observer, MovingAverageMinMaxObserver | FixedQParamsObserver):
            rounded: Tensor = self._forward_eagerly(x, low, high, not moves)
            return rounded
        if moves:
            if isinstance(observer, FixedQParamsObserver):
                self.scale.copy_(observer.scale)
                self.zero_point.copy_(observer.zero_point)
            else:
                traced.observe(x.detach(), *self._state(), *self._rule(), low, high)
        return traced.round_to_scale(x, self.scale, self.zero_point, (self.quant_min, self.quant_max), low, high)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_eagerly(self, x: Tensor, low: float, high: float, observed: bool) -> Tensor:
        rounded: Tensor = self.forward(x, low, high, observed)
        return rounded

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Per-channel buffers begin with one element and have the channels' size once something was observed.
        for name in ("scale", "zero_point"):
            if prefix + name in state_dict:
                getattr(self, name).resize_(state_dict[prefix + name].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.observing = bool(self.observer_enabled[0])


_EPSILON = torch.finfo(torch.float32).eps


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result = function.apply(*args)
    assert isinstance(result, Tensor)
    return result
