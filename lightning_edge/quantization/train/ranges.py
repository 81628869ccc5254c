"""From the values of a tensor to scale and zero point: torchao's arithmetic in a few operations, to the same bits.

torchao computes a moving range and its scale in some forty operations on tensors of one element, which took 70 of the
90 microseconds of an observing fake-quantizer. Here a tensor on the CPU is read once and the rest is float32
arithmetic on numbers (numpy's, whose float32 rounds as torch's does). Knows torch and numpy only.
"""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from lightning_edge.errors import CompressionError
from lightning_edge.quantization.train.memory_format import in_memory_order

# Beyond it float32 arithmetic on the range overflows.
LARGEST_RANGE = 1e30

# No clipping; finite, because generated code has no literal for infinity.
LOWEST = torch.finfo(torch.float32).min
HIGHEST = torch.finfo(torch.float32).max


class Rule(NamedTuple):
    """How a moving range becomes scale and zero point.

    Attributes:
        averaging: Weight of the newest batch in the moving average.
        smallest_scale: What a scale is at least.
        symmetric: Whether the zero point is zero.
        quant_min: Smallest quantized value.
        quant_max: Largest quantized value.
    """

    averaging: float
    smallest_scale: float
    symmetric: bool
    quant_min: int
    quant_max: int


class State(NamedTuple):
    """The buffers of a per-tensor fake-quantizer that an observation writes."""

    min_val: Tensor
    max_val: Tensor
    scale: Tensor
    zero_point: Tensor


def observe(x: Tensor, state: State, rule: Rule, low: float = LOWEST, high: float = HIGHEST) -> None:
    """Move a per-tensor range by one batch, and compute scale and zero point anew.

    On several processes the batch is the global one: the range of all processes' ``x``.

    Args:
        x: The batch, of any shape; only its smallest and largest value matter.
        state: Written in place, each buffer of one element.
        rule: The moving average and the quantized values.
        low: What smaller values of ``x`` count as, for an activation that clips.
        high: What larger values of ``x`` count as.

    Raises:
        CompressionError: If ``x`` holds NaN or infinity, on whichever process.
    """
    ends = _ends(x, low, high)
    if ends is None:
        return
    minimum, maximum = state.min_val.item(), state.max_val.item()
    if minimum == np.inf and maximum == -np.inf:
        minimum, maximum = ends
    else:
        weight = np.float32(rule.averaging)
        minimum, maximum = (
            float(np.float32(old) + weight * (np.float32(new) - np.float32(old)))
            for old, new in zip((minimum, maximum), ends, strict=True)
        )
    scale, zero_point = scale_of(minimum, maximum, rule)
    for buffer, value in zip(state, (minimum, maximum, scale, zero_point), strict=True):
        buffer.fill_(value)


def scale_of(minimum: float, maximum: float, rule: Rule) -> tuple[float, int]:
    """Compute scale and zero point of a range, as torchao's ``calculate_qparams`` does, in float32."""
    below, above = np.float32(min(minimum, 0.0)), np.float32(max(maximum, 0.0))
    steps = rule.quant_max - rule.quant_min
    if rule.symmetric:
        return float(max(max(-below, above) / np.float32(steps / 2), np.float32(rule.smallest_scale))), 0
    scale = max((above - below) / np.float32(steps), np.float32(rule.smallest_scale))
    zero_point = rule.quant_min - int(np.rint(below / scale))
    return float(scale), min(max(zero_point, rule.quant_min), rule.quant_max)


def clipping(
    scale: float, zero_point: int, limits: tuple[int, int], low: float, high: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Say where a clip to [``low``, ``high``] and the quantized values, one after the other, end.

    Returns:
        Smallest and largest level, in steps from the zero point; and the open interval of real values that pass a
        gradient: half a step wider than the levels, as what rounds into the range is inside it.
    """
    first, last = float(limits[0] - zero_point), float(limits[1] - zero_point)
    inside = (max(low, (first - 0.5) * scale), min(high, (last + 0.5) * scale))
    # Rounding keeps order, so that clipping before it is clipping the levels after it.
    inverse = np.float32(1.0 / scale)
    if low > LOWEST:
        first = max(first, float(np.rint(np.float32(low) * inverse)))
    if high < HIGHEST:
        last = min(last, float(np.rint(np.float32(high) * inverse)))
    return (first, last), inside


@final
class NotFiniteError(CompressionError):
    """A quantizer was given values that have no int8 range.

    Args:
        where: The layer that gave the values, and how to keep it in float; one sentence, empty where it is not known.
    """

    def __init__(self, where: str = "") -> None:
        super().__init__(
            "a quantizer was given a value that is not finite (NaN or infinity), or as good as infinite (above "
            f"{LARGEST_RANGE:g}, as in masks), which has no int8 range.{where and ' ' + where} Check the network's "
            "weights and inputs, its loss for divergence, and additive masks outside softmax."
        )


def _ends(x: Tensor, low: float, high: float) -> tuple[float, float] | None:
    """Smallest and largest value of the global batch, clipped; ``None`` if it is empty."""
    row = in_memory_order(x)
    values = x if row is None else row  # of which aminmax would make a copy otherwise
    smallest, largest = (end.item() for end in torch.aminmax(values)) if x.numel() else (np.inf, -np.inf)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        smallest, largest = _over_processes(smallest, largest, x.device)
    if smallest == np.inf and largest == -np.inf:
        return None
    if not largest - smallest < LARGEST_RANGE:  # also where either is NaN
        raise NotFiniteError
    return min(max(smallest, low), high), min(max(largest, low), high)


def _over_processes(smallest: float, largest: float, device: torch.device) -> tuple[float, float]:
    """The ends over all processes: one collective of two numbers."""
    if torch.distributed.get_world_size() == 1:
        return smallest, largest
    if smallest != smallest or largest != largest:  # a maximum may lose NaN, so that only some processes would stop
        smallest, largest = -np.inf, np.inf
    ends = torch.tensor([-smallest, largest], device=device)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    negated, largest = ends.tolist()
    return -negated, largest
