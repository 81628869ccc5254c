"""Decompose operations that coremltools' converter lacks, or writes in a form that loses values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_ATEN = torch.ops.aten


def _number(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype)


def _log_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """``log(softmax(x))``, as the converter writes it, is -inf where a share is too small for the type."""
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def _gelu(x: Tensor, *, approximate: str = "none") -> Any:
    """The converter reads no keyword, and takes one form for the other; it finds the tanh form by its operations."""
    if approximate == "none":
        return NotImplemented  # it stays as it is
    inner = (x.pow(3.0) * 0.044715 + x) * math.sqrt(2 / math.pi)
    return x * (0.5 * (inner.tanh() + 1.0))


def _reciprocal(x: Tensor) -> Tensor:
    """The converter's own is ``1 / (x + 0.0001)``."""
    return _number(1.0, x) / x


def _rms_norm(x: Tensor, sizes: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """The converter's own takes four arguments only, divides by zero for zeros, and adds ``eps`` to scaled values.

    Values are scaled by the largest first, since squares above 256 are infinite in float16; ``eps`` is scaled along.
    """
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    axes = list(range(-len(sizes), 0))
    root = math.sqrt(eps)
    largest = x.abs().amax(axes, keepdim=True).clamp(min=max(root, torch.finfo(torch.float16).tiny))
    scaled = x / largest
    small = root / largest
    result = scaled * (scaled.square().mean(axes, keepdim=True) + small * small).rsqrt()
    return result if weight is None else result * weight


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """The converter writes out squares, which above 256 are infinite in float16; Core ML has an operation for them."""
    grouped = x.unflatten(1, (groups, x.shape[1] // groups)).flatten(2)
    result = functional.layer_norm(grouped, grouped.shape[2:], eps=eps).reshape(x.shape)
    each = [x.shape[1], *[1] * (x.dim() - 2)]
    result = result if weight is None else result * weight.reshape(each)
    return result if bias is None else result + bias.reshape(each)


def _adaptive_avg_pool3d(x: Tensor, size: Sequence[int]) -> Any:
    """The converter knows averages of windows of one size only."""
    if any(before % after for before, after in zip(x.shape[-3:], size, strict=True)):
        return NotImplemented
    if all(after == 1 for after in size):
        return x.mean((-3, -2, -1), keepdim=True)
    return functional.avg_pool3d(x, [before // after for before, after in zip(x.shape[-3:], size, strict=True)])


def _logaddexp(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y) + functional.softplus(-(x - y).abs())


def _cdist(x: Tensor, y: Tensor, p: float = 2.0, mode: int | None = None) -> Tensor:
    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)  # type: ignore[no-any-return]


def _with_mean(spread: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def both(
        x: Tensor,
        dim: list[int] | None = None,
        unbiased: bool = True,
        keepdim: bool = False,
        correction: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        less = int(unbiased) if correction is None else correction
        return spread(x, dim, correction=less, keepdim=keepdim), x.mean(dim, keepdim=keepdim)

    return both


def _of_booleans(logical: Callable[[Tensor, Tensor], Tensor], bitwise: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """``&``, ``|`` and ``^`` of two tensors have names that the converter does not know."""

    def combine(x: Tensor, y: Tensor) -> Tensor:
        return (logical if x.dtype is y.dtype is torch.bool else bitwise)(x, y)

    return combine


# Written out by torch's own tables.
_BY_TORCH = (
    _ATEN.cosine_similarity.default,
    _ATEN.hardshrink.default,
    _ATEN.logit.default,
    _ATEN.sinc.default,
)
_RECURRENT = (_ATEN.gru.input, _ATEN.lstm.input, _ATEN.rnn_tanh.input, _ATEN.rnn_relu.input)
_WRITTEN_OUT: Mapping[Any, Callable[..., Any]] = {
    # It knows where() with two tensors of one type only.
    _ATEN.where.ScalarOther: lambda condition, chosen, other: torch.where(condition, chosen, _number(other, chosen)),
    _ATEN.where.ScalarSelf: lambda condition, chosen, other: torch.where(condition, _number(chosen, other), other),
    _ATEN.addcmul.default: lambda x, one, other, value=1: x + value * one * other,
    _ATEN.addcdiv.default: lambda x, one, other, value=1: x + value * one / other,
    _ATEN.adaptive_avg_pool3d.default: _adaptive_avg_pool3d,
    _ATEN.concatenate.default: lambda tensors, dim=0: torch.cat(tensors, dim),
    _ATEN.channel_shuffle.default: lambda x, groups: x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2),
    _ATEN.celu.default: lambda x, alpha=1.0: alpha * functional.elu(x / alpha),
    _ATEN.cdist.default: _cdist,
    _ATEN.gelu.default: _gelu,
    _ATEN.group_norm.default: _group_norm,
    _ATEN.log_sigmoid.default: lambda x: -functional.softplus(-x),
    _ATEN.log_softmax.int: _log_softmax,
    _ATEN.logaddexp.default: _logaddexp,
    _ATEN.reciprocal.default: _reciprocal,
    _ATEN.rms_norm.default: _rms_norm,
    _ATEN.std_mean.correction: _with_mean(torch.std),
    _ATEN.std_mean.dim: _with_mean(torch.std),
    _ATEN.var_mean.correction: _with_mean(torch.var),
    _ATEN.var_mean.dim: _with_mean(torch.var),
    _ATEN.__and__.Tensor: _of_booleans(torch.logical_and, torch.bitwise_and),
    _ATEN.__or__.Tensor: _of_booleans(torch.logical_or, torch.bitwise_or),
    _ATEN.__xor__.Tensor: _of_booleans(torch.logical_xor, torch.bitwise_xor),
}


def decompositions(graph: torch.fx.Graph) -> dict[Any, Callable[..., Any]]:
    """Give the functions to write out operations of a graph with, by the operation.

    Recurrent layers are in it only where the graph has some.
    """
    known: Mapping[Any, Callable[..., Any]] = torch.export.default_decompositions()
    named = {node.target for node in graph.nodes}
    return {target: known[target] for target in (*_BY_TORCH, *_RECURRENT) if target in named} | dict(_WRITTEN_OUT)
