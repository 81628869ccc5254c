"""The layers of the reference interpreter of MIL: products, pools, normalizations and resizing.

See `mil_ops` for the conventions. Tensors are ``[batch, channels, *space]`` with one to three dimensions of space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
_MAXIMA = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_MEANS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def _padding(
    pad_type: str, pad: Sequence[int] | None, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Rows to add before and after each dimension of space; ``kernel`` is counted with its dilation."""
    if pad_type == "valid" or (pad_type == "custom" and pad is None):
        return [(0, 0)] * len(size)
    if pad_type == "custom" and pad is not None:
        return list(zip(pad[::2], pad[1::2], strict=True))
    pairs = []
    for length, window, stride in zip(size, kernel, strides, strict=True):
        total = max(0, (math.ceil(length / stride) - 1) * stride + window - length)
        short, long = total // 2, total - total // 2
        pairs.append((long, short) if pad_type == "same_lower" else (short, long))
    return pairs


def _flat(pairs: Sequence[tuple[int, int]]) -> list[int]:
    return [width for pair in reversed(pairs) for width in pair]


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    space = x.dim() - 2
    strides, dilations = strides or [1] * space, dilations or [1] * space
    kernel = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilations, strict=True)]
    pairs = _padding(pad_type, pad, x.shape[2:], kernel, strides)
    if any(before != after for before, after in pairs):
        x, pairs = functional.pad(x, _flat(pairs)), [(0, 0)] * space
    return _CONVOLUTIONS[space](x, weight, bias, strides, [before for before, _ in pairs], dilations, groups)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: str = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    space = x.dim() - 2
    strides, dilations = strides or [1] * space, dilations or [1] * space
    y = _TRANSPOSED[space](x, weight, None, strides, 0, 0, groups, dilations)
    widths = []
    for i in range(space):
        full, length = y.shape[2 + i], x.shape[2 + i] * strides[i]
        before, after = (pad[2 * i], pad[2 * i + 1]) if pad is not None and pad_type == "custom" else (0, 0)
        if pad_type.startswith("same"):
            total = full - length
            before = -(-total // 2) if pad_type == "same_lower" else total // 2
            after = total - before
        size = output_shape[2 + i] if output_shape is not None else full - before - after
        widths.append((-before, size - full + before))
    # A negative width cuts off; a positive one lengthens, and beyond the reach of the kernel there is only the bias.
    y = functional.pad(y, _flat(widths))
    return y if bias is None else y + bias.view(-1, *[1] * space)


def _pool_padding(
    x: Tensor,
    kernel_sizes: Sequence[int],
    strides: Sequence[int],
    pad_type: str,
    pad: Sequence[int] | None,
    ceil_mode: bool,
) -> tuple[list[tuple[int, int]], list[int]]:
    """The padding, and the rows beyond it that a last window in ceil mode reaches into."""
    pairs = _padding(pad_type, pad, x.shape[2:], kernel_sizes, strides)
    beyond = [0] * len(pairs)
    for i, (before, after) in enumerate(pairs):
        rest = x.shape[2 + i] + before + after - kernel_sizes[i]
        windows = -(-rest // strides[i]) + 1
        starts_inside = (windows - 1) * strides[i] < x.shape[2 + i] + before
        if ceil_mode and starts_inside:
            beyond[i] = max(0, (windows - 1) * strides[i] - rest)
    return pairs, beyond


def _max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    space = x.dim() - 2
    strides = strides or [1] * space
    pairs, beyond = _pool_padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    widths = _flat([(before, after + more) for (before, after), more in zip(pairs, beyond, strict=True)])
    x = functional.pad(x, widths, value=-math.inf) if any(widths) else x
    return _MAXIMA[space](x, kernel_sizes, strides)


def _avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    space = x.dim() - 2
    strides = strides or [1] * space
    pairs, beyond = _pool_padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    mean = _MEANS[space]
    if not any(_flat(pairs)) and not any(beyond):
        return mean(x, kernel_sizes, strides)
    more = _flat([(0, width) for width in beyond])
    counted = functional.pad(
        torch.ones_like(x[:1, :1]), _flat(pairs), value=0.0 if exclude_padding_from_average else 1.0
    )
    padded = functional.pad(functional.pad(x, _flat(pairs)), more)
    return mean(padded, kernel_sizes, strides) / mean(functional.pad(counted, more), kernel_sizes, strides)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight, bias)


def _matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None) -> Tensor:
    mask = attn_mask if attn_mask is None or isinstance(attn_mask, Tensor) else torch.tensor(attn_mask)
    return functional.scaled_dot_product_attention(query, key, value, mask)


def _batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    return functional.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def _instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    return functional.instance_norm(x, weight=gamma, bias=beta, eps=epsilon)


def _layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    rank = x.dim()
    dims = sorted(axis % rank for axis in axes) if axes is not None else list(range(rank))
    shape = [x.shape[axis] for axis in dims]
    if dims == list(range(rank - len(dims), rank)):
        return functional.layer_norm(x, shape, gamma, beta, epsilon)
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + epsilon)
    wide = [x.shape[axis] if axis in dims else 1 for axis in range(rank)]
    y = y if gamma is None else y * gamma.view(wide)
    return y if beta is None else y + beta.view(wide)


def _l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x / torch.sqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


def _sample(x: Tensor, axis: int, points: Tensor) -> Tensor:
    """Read a dimension at real positions, linearly between its elements."""
    size = x.shape[axis]
    points = points.clamp(0, size - 1)
    low = points.floor().to(torch.int64)
    share = (points - low).view(-1, *[1] * (-axis - 1))
    left, right = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
    return left + (right - left) * share


def _points(size: int, target: int, mode: str) -> Tensor:
    steps = torch.arange(target, dtype=torch.float32)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if target == 1:
            return steps if mode == "STRICT_ALIGN_CORNERS" else torch.tensor([(size - 1) / 2])
        return steps * ((size - 1) / (target - 1))
    if mode == "UNALIGN_CORNERS":
        return (steps + 0.5) * (size / target) - 0.5
    if mode == "OFFSET_CORNERS":
        return (steps + 0.5) * (max(1, size - 1) / target)
    return steps * (size / target)


def _resize(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    for axis, target in ((-2, height), (-1, width)):
        x = _sample(x, axis, _points(x.shape[axis], target, mode))
    return x


def _upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    height, width = int(x.shape[-2] * scale_factor_height), int(x.shape[-1] * scale_factor_width)
    return _resize(x, height, width, mode)


def _resize_nearest(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    for axis, target in ((-2, target_size_height), (-1, target_size_width)):
        x = x.index_select(axis, torch.arange(target) * x.shape[axis] // target)
    return x


def _upsample_nearest(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    return _resize_nearest(x, int(x.shape[-2] * scale_factor_height), int(x.shape[-1] * scale_factor_width))


def _resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    return _resize(x, target_size_height, target_size_width, sampling_mode)


LAYERS: Mapping[str, Callable[..., Tensor]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "matmul": _matmul,
    "einsum": lambda values, equation: torch.einsum(equation, *values),
    "scaled_dot_product_attention": _attention,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "l2_norm": _l2_norm,
    "pixel_shuffle": lambda x, upscale_factor: functional.pixel_shuffle(x, upscale_factor),
    "pixel_unshuffle": lambda x, downscale_factor: functional.pixel_unshuffle(x, downscale_factor),
    "resize_bilinear": _resize_bilinear,
    "resize_nearest_neighbor": _resize_nearest,
    "upsample_bilinear": _upsample_bilinear,
    "upsample_nearest_neighbor": _upsample_nearest,
}
