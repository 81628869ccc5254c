"""The operations of MIL the reference interpreter knows: a literal table from an operation's name to a function.

A function takes an operation's inputs by their MIL names. Values that a program computes are tensors. Constants
arrive decoded once: scalars as Python numbers, strings and bools, arrays of integers and bools (shapes, strides,
axes) as Python lists, arrays of floats and of 8-bit integers as tensors. A function computes in the type of what it
is given; the executor says which that is, and rounds to half where the program says ``fp16``.

Convolutions, pools, normalizations and resizing are in `mil_layers`, 8-bit integers and compressed weights in
`mil_values`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_edge.exporters.coreml.mil import layers
from lightning_edge.exporters.coreml.mil.values import DTYPES, WEIGHTS, along, dequantize, quantize, tensor


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: function(tensor(x))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: function(tensor(x), tensor(y))


def _cast(x: Any, dtype: str) -> Tensor:
    return tensor(x).to(DTYPES[dtype])


def _division(x: Tensor, y: Tensor) -> Tensor:
    """Divide; of integers coremltools gives integers, cut off towards zero."""
    whole = not (x.is_floating_point() or y.is_floating_point())
    return torch.div(x, y, rounding_mode="trunc" if whole else None)


def _whole_division(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


def _reduction(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Any, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
        value = tensor(x)
        every = list(range(value.dim()))
        return function(value, dim=every if axes is None else axes, keepdim=keep_dims).to(value.dtype)

    return reduce


def _product(value: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((axis % value.dim() for axis in dim), reverse=True):
        value = value.prod(axis, keepdim=keepdim)
    return value


def _argument(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Any, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
        return function(tensor(x), dim=axis, keepdim=keep_dims).to(DTYPES[output_dtype])

    return reduce


def _integers(value: Any) -> list[int]:
    return [int(element) for element in (value.tolist() if isinstance(value, Tensor) else value)]


def _reshape(x: Any, shape: Any) -> Tensor:
    value, target = tensor(x), _integers(shape)
    # A zero takes the size of the dimension that lies as far from the right end, or one where there is none.
    for back in range(1, len(target) + 1):
        if target[-back] == 0:
            target[-back] = value.shape[-back] if back <= value.dim() else 1
    return value.reshape(target)


def _expand_dims(x: Any, axes: list[int]) -> Tensor:
    value = tensor(x)
    rank = value.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        value = value.unsqueeze(axis)
    return value


def _squeeze(x: Any, axes: list[int] | None = None) -> Tensor:
    value = tensor(x)
    return value.squeeze() if axes is None else value.squeeze(tuple(axes))


def _concat(values: Sequence[Any], axis: int, interleave: bool = False) -> Tensor:
    tensors = [tensor(value) for value in values]
    if not any(value.dim() for value in tensors):
        return torch.stack(tensors, axis)  # numbers become a row of them, as of a shape
    if not interleave:
        return torch.cat(tensors, axis)
    axis = axis % tensors[0].dim()
    return torch.stack(tensors, axis + 1).flatten(axis, axis + 1)


def _split(x: Any, axis: int, num_splits: int | None = None, split_sizes: Any = None) -> tuple[Tensor, ...]:
    value = tensor(x)
    sizes = [value.shape[axis] // num_splits] * num_splits if split_sizes is None and num_splits else split_sizes
    return torch.split(value, _integers(sizes), axis)


def _slice_by_index(
    x: Any,
    begin: Any,
    end: Any,
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    value, first, last = tensor(x), _integers(begin), _integers(end)
    squeezed = []
    for axis in range(value.dim()):
        size = value.shape[axis]
        if squeeze_mask is not None and squeeze_mask[axis]:
            value = value.narrow(axis, first[axis] % size, 1)
            squeezed.append(axis)
            continue
        window = slice(
            None if begin_mask is not None and begin_mask[axis] else first[axis],
            None if end_mask is not None and end_mask[axis] else last[axis],
            1 if stride is None else stride[axis],
        )
        start, stop, step = window.indices(size)
        if step == 1:
            value = value.narrow(axis, start, max(stop - start, 0))
        else:
            value = value.index_select(axis, torch.arange(start, stop, step))
    return value.squeeze(tuple(squeezed)) if squeezed else value


def _slice_by_size(x: Any, begin: Any, size: Any) -> Tensor:
    value = tensor(x)
    for axis, (start, length) in enumerate(zip(_integers(begin), _integers(size), strict=True)):
        value = value.narrow(axis, start, value.shape[axis] - start if length == -1 else length)
    return value


def _crop(x: Any, crop_height: Any, crop_width: Any) -> Tensor:
    value = tensor(x)
    for axis, (before, after) in ((-2, _integers(crop_height)), (-1, _integers(crop_width))):
        value = value.narrow(axis, before, value.shape[axis] - before - after)
    return value


def _pad(x: Any, pad: Any, mode: str = "constant", constant_val: Any = 0.0) -> Tensor:
    value, widths = tensor(x), _integers(pad)
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    if mode == "constant":
        return functional.pad(value, [width for pair in reversed(pairs) for width in pair], value=constant_val)
    for axis, (before, after) in enumerate(pairs, start=value.dim() - len(pairs)):
        if before or after:
            size = value.shape[axis]
            index = torch.arange(-before, size + after)
            index = index.clamp(0, size - 1) if mode == "replicate" else (size - 1 - (size - 1 - index.abs()).abs())
            value = value.index_select(axis, index)
    return value


def _gather(x: Any, indices: Any, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    value, index = tensor(x), tensor(indices).to(torch.int64)
    axis = axis % value.dim()
    if batch_dims:
        rows = [_gather(row, positions, axis - 1, batch_dims - 1) for row, positions in zip(value, index, strict=True)]
        return torch.stack(rows)
    index = torch.where(index < 0, index + value.shape[axis], index)
    shape = (*value.shape[:axis], *index.shape, *value.shape[axis + 1 :])
    return value.index_select(axis, index.flatten()).reshape(shape)


def _gather_nd(x: Any, indices: Any, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    value, index = tensor(x), tensor(indices).to(torch.int64)
    if batch_dims:
        rows = [_gather_nd(row, places, batch_dims - 1) for row, places in zip(value, index, strict=True)]
        return torch.stack(rows)
    return value[index.unbind(-1)]


def _gather_along_axis(x: Any, indices: Any, axis: int = 0, validate_indices: bool = False) -> Tensor:
    value, index = tensor(x), tensor(indices).to(torch.int64)
    return value.gather(axis, torch.where(index < 0, index + value.shape[axis], index))


def _cumsum(x: Any, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    value = tensor(x).flip(axis) if reverse else tensor(x)
    total = value.cumsum(axis).to(value.dtype)
    total = total - value if exclusive else total
    return total.flip(axis) if reverse else total


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def _prelu(x: Tensor, alpha: Any) -> Tensor:
    return torch.where(x > 0, x, x * along(tensor(alpha), x.dim(), 1))


OPS: Mapping[str, Callable[..., Any]] = {
    **layers.LAYERS,
    **WEIGHTS,
    # constants and 8-bit integers
    "constexpr_cast": lambda source_val, output_dtype: _cast(source_val, output_dtype),
    "quantize": quantize,
    "dequantize": dequantize,
    "cast": _cast,
    "identity": lambda x: x,
    # activations
    "clamped_relu": lambda x, alpha, beta: torch.where(x >= 0, x, alpha * x).clamp(max=beta),
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "elu": lambda x, alpha: functional.elu(x, alpha),
    "gelu": _gelu,
    "leaky_relu": lambda x, alpha: torch.where(x >= 0, x, alpha * x),
    "linear_activation": lambda x, alpha, beta: alpha * x + beta,
    "prelu": _prelu,
    "relu": lambda x: functional.relu(x),
    "relu6": lambda x: x.clamp(0, 6),
    "scaled_tanh": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "silu": lambda x: functional.silu(x),
    "softplus": lambda x: functional.softplus(x),
    "softsign": lambda x: functional.softsign(x),
    "threshold": lambda x, alpha: x.clamp(min=alpha),
    "thresholded_relu": lambda x, alpha: torch.where(x >= alpha, x, 0.0),
    # elementwise
    "abs": _unary(torch.abs),
    "acos": _unary(torch.acos),
    "asin": _unary(torch.asin),
    "atan": _unary(torch.atan),
    "atanh": _unary(torch.atanh),
    "ceil": _unary(torch.ceil),
    "cos": _unary(torch.cos),
    "cosh": _unary(torch.cosh),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "floor": _unary(torch.floor),
    "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
    "log": lambda x, epsilon=1e-45: torch.log(x + epsilon),
    "logical_not": _unary(torch.logical_not),
    "round": _unary(torch.round),
    "rsqrt": lambda x, epsilon=1e-12: 1 / torch.sqrt(x + epsilon),
    "sign": _unary(torch.sign),
    "sin": _unary(torch.sin),
    "sinh": _unary(torch.sinh),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "tan": _unary(torch.tan),
    "tanh": _unary(torch.tanh),
    "add": _binary(torch.add),
    "equal": _binary(torch.eq),
    "floor_div": _binary(_whole_division),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mod": _binary(torch.remainder),
    "mul": _binary(torch.mul),
    "not_equal": _binary(torch.ne),
    "pow": _binary(torch.pow),
    "real_div": _binary(_division),
    "select": lambda cond, a, b: torch.where(tensor(cond), tensor(a), tensor(b)),
    "sub": _binary(torch.sub),
    # reductions
    "reduce_argmax": _argument(torch.argmax),
    "reduce_argmin": _argument(torch.argmin),
    "reduce_l1_norm": _reduction(lambda x, dim, keepdim: x.abs().sum(dim, keepdim)),
    "reduce_l2_norm": _reduction(lambda x, dim, keepdim: x.square().sum(dim, keepdim).sqrt()),
    "reduce_log_sum_exp": _reduction(torch.logsumexp),
    "reduce_max": _reduction(torch.amax),
    "reduce_mean": _reduction(torch.mean),
    "reduce_min": _reduction(torch.amin),
    "reduce_prod": _reduction(_product),
    "reduce_sum": _reduction(torch.sum),
    "reduce_sum_square": _reduction(lambda x, dim, keepdim: x.square().sum(dim, keepdim)),
    "cumsum": _cumsum,
    "softmax": lambda x, axis=-1: torch.softmax(x, axis),
    # shapes
    "concat": _concat,
    "crop": _crop,
    "expand_dims": _expand_dims,
    "fill": lambda shape, value=0.0: torch.full(_integers(shape), value),
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "gather_nd": _gather_nd,
    "pad": _pad,
    "reshape": _reshape,
    "reverse": lambda x, axes=None: tensor(x).flip(axes if axes is not None else list(range(x.dim()))),
    "shape": lambda x: torch.tensor(x.shape, dtype=torch.int32),
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "split": _split,
    "squeeze": _squeeze,
    "stack": lambda values, axis: torch.stack([tensor(value) for value in values], axis),
    "tile": lambda x, reps: tensor(x).repeat(_integers(reps)),
    "transpose": lambda x, perm: tensor(x).permute(_integers(perm)),
}

MOVES = frozenset(
    {
        "concat",
        "crop",
        "expand_dims",
        "gather",
        "gather_along_axis",
        "gather_nd",
        "identity",
        "pad",
        "pixel_shuffle",
        "pixel_unshuffle",
        "reshape",
        "resize_nearest_neighbor",
        "reverse",
        "slice_by_index",
        "slice_by_size",
        "split",
        "squeeze",
        "stack",
        "tile",
        "transpose",
        "upsample_nearest_neighbor",
    }
)
"""Operations that only move values about."""
