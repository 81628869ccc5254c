"""Windows of images that do not overlap, taken apart and put together by views while a network is captured.

``unfold`` and ``fold`` are computed indices and scattered sums in every target, which are slow, and which some refuse
(MobileViT's patches). With a stride of the window's own size they only move values. Knows torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def unfolded(input: Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Tensor | None:
    """Images (N, C, H, W) as (N, C * window, count); ``None`` for windows that overlap, or have gaps or a frame."""
    window = _side_by_side(kernel_size, dilation, padding, stride)
    if window is None or input.dim() != 4 or not _fits(input.shape[2:], window):
        return None
    (high, wide), channels = window, input.shape[1]
    rows, columns = input.shape[2] // high, input.shape[3] // wide
    apart = input.reshape(-1, channels, rows, high, columns, wide).permute(0, 1, 3, 5, 2, 4)
    return apart.reshape(-1, channels * high * wide, rows * columns)


def folded(
    input: Tensor, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Tensor | None:
    """Windows (N, C * window, count) as images (N, C, H, W); ``None`` likewise."""
    window, size = _side_by_side(kernel_size, dilation, padding, stride), _pair(output_size)
    if window is None or input.dim() != 3 or not _fits(size, window):
        return None
    (high, wide), (height, width) = window, size
    channels, rows, columns = input.shape[1] // (high * wide), height // high, width // wide
    apart = input.reshape(-1, channels, high, wide, rows, columns).permute(0, 1, 4, 2, 5, 3)
    return apart.reshape(-1, channels, height, width)


def _fits(size: Sequence[int], window: tuple[int, int]) -> bool:
    return not any(whole % side for whole, side in zip(size, window, strict=True))


def _side_by_side(kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> tuple[int, int] | None:
    window = _pair(kernel_size)
    touches = _pair(stride) == window and _pair(dilation) == (1, 1) and _pair(padding) == (0, 0)
    return window if touches else None


def _pair(value: Any) -> tuple[int, int]:
    high, wide = (value, value) if isinstance(value, int) else value
    return high, wide
