"""Values of the reference interpreter of MIL: types, 8-bit integers, and weights that are stored compressed.

See `mil_ops` for the conventions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES: Mapping[str, torch.dtype] = {
    "fp16": torch.float32,
    "fp32": torch.float32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.int32,
    "int32": torch.int32,
    "uint32": torch.int64,
    "bool": torch.bool,
}
"""What holds a MIL type here: half-precision values live in float32, wide unsigned ones in the next wider integer."""

FLOATS = frozenset({"fp16", "fp32"})
"""The MIL types of real numbers."""


def tensor(value: Any) -> Tensor:
    """Read an operand as a tensor: a tensor as it is, Python integers as int32, floats as float32."""
    if isinstance(value, Tensor):
        return value
    result = torch.as_tensor(value)
    return result.to(torch.int32) if result.dtype == torch.int64 else result


def along(value: Any, rank: int, axis: int | None) -> Any:
    """Give one number for each channel a shape that broadcasts over a value of ``rank`` dimensions; others stay."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    shape = [1] * rank
    shape[0 if axis is None else axis] = -1
    return value.to(torch.float32).view(shape)


def quantize(input: Tensor, scale: Any, output_dtype: str, zero_point: Any = 0, axis: int | None = None) -> Tensor:
    """Round half to even onto the grid, shift by the zero point and clip to the 8-bit type."""
    low, high = (-128, 127) if output_dtype == "int8" else (0, 255)
    steps = torch.round(input / along(scale, input.dim(), axis)).add_(along(zero_point, input.dim(), axis))
    return steps.clamp_(low, high).to(DTYPES[output_dtype])


def dequantize(input: Tensor, scale: Any, zero_point: Any = 0, axis: int | None = None) -> Tensor:
    """Give the real value of 8-bit integers, in float64: ``scale * (input - zero_point)``."""
    shifted = input.to(torch.float64).sub_(along(zero_point, input.dim(), axis))
    return shifted.mul_(along(scale, input.dim(), axis))


def _dense_affine(quantized_data: Tensor, zero_point: Any, scale: Any, axis: int) -> Tensor:
    return dequantize(quantized_data, scale, zero_point, axis)


def _blocks(value: Tensor, shape: Sequence[int]) -> Tensor:
    for axis, size in enumerate(shape):
        if value.shape[axis] != size:
            value = value.repeat_interleave(size // value.shape[axis], dim=axis)
    return value


def _dense_blockwise(data: Any, scale: Tensor, offset: Any = None) -> Tensor:
    data = tensor(data).to(torch.float32)
    if offset is not None:
        data = data - _blocks(tensor(offset).to(torch.float32), data.shape)
    scaled: Tensor = data * _blocks(scale, data.shape)
    return scaled


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    stream = (packed.to(torch.int64).unsqueeze(-1) >> torch.arange(8)) & 1
    return (stream.flatten()[: count * bits].view(count, bits) << torch.arange(bits)).sum(-1)


def _dense_palette(indices: Any, lut: Tensor, shape: list[int] | None = None, vector_axis: int | None = None) -> Tensor:
    if shape is not None:
        bits = int(math.log2(lut.numel()))
        return lut[_unpack(tensor(indices), bits, math.prod(shape))].view(shape)
    indices = tensor(indices).to(torch.int64)
    table = _blocks(lut, indices.shape)
    vectors = table.gather(-2, indices[..., None, None].expand(*indices.shape, 1, table.shape[-1])).squeeze(-2)
    if vector_axis is None:
        return vectors.squeeze(-1)
    axis = vector_axis % indices.dim()
    return vectors.movedim(-1, axis + 1).flatten(axis, axis + 1)


def _dense_sparse(nonzero_data: Any, mask: Any, shape: list[int] | None = None) -> Tensor:
    mask, values = tensor(mask), tensor(nonzero_data)
    where = (_unpack(mask, 1, math.prod(shape)).view(shape) if shape is not None else mask) != 0
    result = torch.zeros(where.shape, dtype=values.dtype)
    result[where] = values
    return result


def _sparse_blockwise(data_mask: Any, nonzero_data: Any, scale: Tensor, offset: Any = None) -> tuple[Tensor, Tensor]:
    mask = tensor(data_mask)
    return mask, _dense_blockwise(_dense_sparse(nonzero_data, mask), scale, offset)[mask != 0]


WEIGHTS: Mapping[str, Callable[..., Any]] = {
    "constexpr_affine_dequantize": _dense_affine,
    "constexpr_blockwise_shift_scale": _dense_blockwise,
    "constexpr_lut_to_dense": _dense_palette,
    "constexpr_sparse_blockwise_shift_scale": _sparse_blockwise,
    "constexpr_sparse_to_dense": _dense_sparse,
}
