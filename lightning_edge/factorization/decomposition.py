"""One layer as two: its weight by singular value decomposition, and the way back. Knows torch only.

Denton et al. 2014 (arXiv:1404.0736) and Jaderberg et al. 2014 (arXiv:1405.3866): a matrix of ``out x in`` is nearly
the product of ``out x rank`` and ``rank x in``, nearest in squared error where the largest singular values are kept
(Eckart & Young 1936).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.surgery import CALL_HOOKS

Layer = nn.Linear | nn.Conv1d | nn.Conv2d


def matrix(weight: Tensor) -> Tensor:
    """Give a weight as a matrix of ``out x in``, on the CPU in float64, so that no device decides the factors."""
    return weight.detach().flatten(1).to("cpu", torch.float64)


def singular_values(weight: Tensor) -> Tensor:
    """Give the singular values of a weight, largest first."""
    values: Tensor = torch.linalg.svdvals(matrix(weight))
    return values


def numerical_rank(values: Tensor, weight: Tensor) -> int:
    """Count the singular values that are more than rounding of the weight's own type."""
    if values[0] == 0:
        return 0
    floor = values[0] * max(weight.flatten(1).shape) * torch.finfo(weight.dtype).eps
    return int((values > floor).sum())


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Split a weight into two of the given rank, whose product is the nearest to it in squared error.

    The singular values are shared between both, so that neither factor's gradients outgrow the other's. Signs are fixed
    (the largest entry of each column of the second factor is positive), as the decomposition leaves them open.

    Args:
        weight: ``out x in``, or ``out x in x 1 ...``.
        rank: Singular values to keep, at least 1 and at most the smaller side.

    Returns:
        ``rank x in`` and ``out x rank``, in the weight's type, on its device, with its trailing dimensions.
    """
    left, values, right = torch.linalg.svd(matrix(weight), full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign().squeeze(0)
    roots = values.sqrt()
    first, second = (roots * signs)[:, None] * right, left * (roots * signs)
    tail = (1,) * (weight.dim() - 2)
    return first.reshape(*first.shape, *tail).to(weight), second.reshape(*second.shape, *tail).to(weight)


def product(first: Tensor, second: Tensor) -> Tensor:
    """Multiply two factors back into one weight."""
    merged = matrix(second) @ matrix(first)
    return merged.reshape(*merged.shape, *first.shape[2:]).to(first)


def split(network: nn.Module, name: str, rank: int) -> tuple[nn.Parameter, tuple[nn.Parameter, nn.Parameter]]:
    """Replace a layer of a network, in place, by a pair of layers with a rank between them.

    The bias stays the same object; an accumulated gradient goes on to both factors by the chain rule.

    Returns:
        The weight that is gone, and the two that took its place.

    Raises:
        CompressionError: If the network has no such layer.
    """
    layer = _module(network, name)
    if not isinstance(layer, Layer):
        raise CompressionError(
            f"{name} is a {type(layer).__name__}, and what is recorded factorizes a Linear or convolution there: the "
            "network is not the one that was factorized."
        )
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    with torch.no_grad():
        down, up = factors(weight, rank)
    first, second = nn.Parameter(down, weight.requires_grad), nn.Parameter(up, weight.requires_grad)
    if weight.grad is not None:
        first.grad = _times(up.flatten(1).mT, weight.grad, first)
        second.grad = _times(weight.grad, down.flatten(1).mT, second)
    narrow, wide = _pair(layer, rank)
    narrow.weight, wide.weight, wide.bias = first, second, layer.bias
    _take_place(network, name, nn.Sequential(narrow, wide), layer)
    return weight, (first, second)


def merge(network: nn.Module, name: str) -> None:
    """Replace a pair of layers, in place, by the one layer that computes the same; the bias stays the same object.

    Raises:
        CompressionError: If there is no such pair.
    """
    pair = _module(network, name)
    parts = list(pair) if isinstance(pair, nn.Sequential) else []
    layers = [part for part in parts if isinstance(part, Layer)]
    if not len(parts) == len(layers) == 2:
        raise CompressionError(f"{name} is a {type(pair).__name__}, and not a pair of factors that could be merged.")
    first, second = layers
    with torch.no_grad():
        weight = nn.Parameter(product(first.weight, second.weight), first.weight.requires_grad)
    layer = _like(first, weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = weight, second.bias
    _take_place(network, name, layer, pair)


def _pair(layer: Layer, rank: int) -> tuple[Layer, Layer]:
    width_in, width_out = layer.weight.shape[1], layer.weight.shape[0]
    # Stride and padding go with the first: the second then has fewer positions to compute, and what the first makes of
    # padded zeros stays zero, as it has no bias.
    first = _like(layer, width_in, rank)
    if isinstance(layer, nn.Linear):
        return first, nn.Linear(rank, width_out, bias=False, device="meta")
    return first, type(layer)(rank, width_out, 1, bias=False, device="meta")


def _like(layer: Layer, width_in: int, width_out: int) -> Layer:
    """Make a layer of other widths, without weights of its own: filling them would move the random state."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(width_in, width_out, bias=False, device="meta")
    make: Callable[..., Layer] = type(layer)  # a 1d and a 2d convolution differ in what their tuples hold
    return make(
        width_in,
        width_out,
        1,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        bias=False,
        padding_mode=layer.padding_mode,
        device="meta",
    )


def _take_place(network: nn.Module, name: str, new: nn.Module, old: nn.Module) -> None:
    # What a caller hung onto the layer goes with the pair: called with the same input, it gives the same output.
    for attribute in CALL_HOOKS:  # the very tables, so that handles still remove what they registered
        new.__dict__[attribute], old.__dict__[attribute] = old.__dict__[attribute], OrderedDict()
    new._is_full_backward_hook = old._is_full_backward_hook
    new.train(old.training)
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)


def _times(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    return (left.flatten(1) @ right.flatten(1)).reshape(like.shape)


def _module(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise CompressionError(f"{type(network).__name__} has no layer {name!r} to factorize: {error}") from error
