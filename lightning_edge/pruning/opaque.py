"""Layers that pruning leaves alone although they compute with channels: seen as one operation while tracing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Their channels pass through gates or heads of fixed sizes, and what they compute is taken apart by no tracer.
OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


class _Whole(torch.autograd.Function):
    """Makes given outputs depend on given inputs, by one node of autograd."""

    @staticmethod
    def forward(ctx: Any, outputs: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("a network that is being traced has no gradients")


@contextmanager
def as_wholes(network: nn.Module, parts: Sequence[nn.Module] = ()) -> Iterator[list[type[nn.Module]]]:
    """Have each opaque layer of a copy appear as a single operation.

    Args:
        network: The copy.
        parts: Other modules of it that are to appear so; each has a type of its own while the context lasts.

    Yields:
        The types of all that appear so.
    """
    types = [type(part) for part in parts]
    layers = [module for module in network.modules() if isinstance(module, OPAQUE) or module in parts]
    for layer in layers:
        layer.__dict__["forward"] = _as_whole(layer)
    for part, own in zip(parts, types, strict=True):
        part.__class__ = type(own.__name__, (own,), {})
    try:
        yield list({type(layer): None for layer in layers})
    finally:
        for part, own in zip(parts, types, strict=True):
            part.__class__ = own
        for layer in layers:
            del layer.__dict__["forward"]


def _as_whole(layer: nn.Module) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            outputs = type(layer).forward(layer, *args, **kwargs)
        leaves, structure = pytree.tree_flatten(outputs)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Its own parameters make it part of the graph even where nothing before it has any.
        whole: Any = _Whole.apply
        results = whole([leaves[place] for place in places], *inputs, *layer.parameters())
        for place, result in zip(places, results, strict=True):
            leaves[place] = result
        return pytree.tree_unflatten(leaves, structure)

    return forward


def untouched() -> Any:
    """What torch-pruning is to do with an opaque layer: know it as one, with inputs and outputs apart."""
    from torch_pruning import BasePruningFunc

    class Untouched(BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise AssertionError("only groups are read, nothing is pruned by torch-pruning")

        def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise AssertionError("only groups are read, nothing is pruned by torch-pruning")

        def get_out_channels(self, layer: nn.Module) -> None:
            return None

        def get_in_channels(self, layer: nn.Module) -> None:
            return None

    return Untouched()
