"""Where the channels of a layer lie: in which dimension of which of its tensors, and in which of its attributes.

This table is all that pruning knows about layers. What is not in it is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parametrize

Side = Literal["in", "out", "both"]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    """One dimension of one tensor in which a layer's channels lie, one after the other.

    Attributes:
        tensor: Attribute of the layer, ``weight``, ``running_mean``, ...
        dimension: Which of its dimensions.
        role: ``kernel`` for weights that are multiplied and added up, ``scale`` for a norm's scale, else ``rest``.
        channels: For each index along the dimension, the layer's channel it belongs to; ``None``: the same number.
    """

    tensor: str
    dimension: int
    role: Literal["kernel", "scale", "rest"]
    channels: Integers | None = None


@dataclass(frozen=True)
class Channels:
    """The channels on one side of a layer.

    Attributes:
        count: How many.
        places: Where they lie.
        attributes: The layer's own counts of them; an entry of a tuple as ``name[index]``.
        blocks: Into how many runs of equal length they fall that must stay equally long.
    """

    count: int
    places: tuple[Place, ...]
    attributes: tuple[str, ...]
    blocks: int = 1


def channels_of(layer: nn.Module, side: Side) -> Channels | str:
    """Say where the channels of a layer lie.

    Args:
        layer: Any module.
        side: ``in`` and ``out`` for layers that map channels to others, ``both`` for those that keep them.

    Returns:
        The channels, or the reason why the layer cannot lose any.
    """
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized, so that no stored tensor has its shape"
    for kinds, describe in _TABLE:
        if isinstance(layer, kinds):
            found = describe(layer, side)
            if isinstance(found, str):
                return found
            for place in found.places:
                if place.tensor not in layer._parameters and place.tensor not in layer._buffers:
                    return f"its {place.tensor!r} is computed, not a parameter or buffer"
            return found
    return f"{type(layer).__name__} is left alone"


def is_known(layer: nn.Module) -> bool:
    """Say whether the table below has a layer's type."""
    return any(isinstance(layer, kinds) for kinds, _ in _TABLE)


def _present(layer: nn.Module, *places: Place) -> tuple[Place, ...]:
    return tuple(place for place in places if getattr(layer, place.tensor, None) is not None)


def _linear(layer: nn.Module, side: Side) -> Channels:
    linear = cast(nn.Linear, layer)
    if side == "in":
        return Channels(linear.in_features, (Place("weight", 1, "kernel"),), ("in_features",))
    places = _present(linear, Place("weight", 0, "kernel"), Place("bias", 0, "rest"))
    return Channels(linear.out_features, places, ("out_features",))


def _convolution(layer: nn.Module, side: Side) -> Channels | str:
    convolution = cast(nn.modules.conv._ConvNd, layer)
    groups, transposed = convolution.groups, convolution.transposed
    inputs, outputs = convolution.in_channels, convolution.out_channels
    if groups == inputs == outputs and groups > 1:
        places = _present(convolution, Place("weight", 0, "kernel"), Place("bias", 0, "rest"))
        return Channels(outputs, places, ("in_channels", "out_channels", "groups"))
    if groups > 1 and groups in (inputs, outputs):
        return f"it has one input or output channel in each of its {groups} groups, but not both"
    if groups > 1 and side == "both":
        return "it is grouped"
    # Of a grouped convolution, one dimension of the weight spans all groups and the other the channels of one group.
    # A transposed one stores its inputs first.
    first = (side == "in") == transposed
    count = inputs if side == "in" else outputs
    place = Place("weight", 0, "kernel") if first else Place("weight", 1, "kernel", np.arange(count // groups))
    if side == "in":
        return Channels(count, (place,), ("in_channels",), groups)
    return Channels(count, (place, *_present(convolution, Place("bias", 0, "rest"))), ("out_channels",), groups)


def _batch_norm(layer: nn.Module, side: Side) -> Channels:
    places = _present(
        layer,
        Place("weight", 0, "scale"),
        Place("bias", 0, "rest"),
        Place("running_mean", 0, "rest"),
        Place("running_var", 0, "rest"),
    )
    return Channels(cast(nn.BatchNorm2d, layer).num_features, places, ("num_features",))


def _group_norm(layer: nn.Module, side: Side) -> Channels:
    norm = cast(nn.GroupNorm, layer)
    places = _present(norm, Place("weight", 0, "scale"), Place("bias", 0, "rest"))
    if norm.num_groups == norm.num_channels:
        return Channels(norm.num_channels, places, ("num_channels", "num_groups"))
    return Channels(norm.num_channels, places, ("num_channels",), norm.num_groups)


def _layer_norm(layer: nn.Module, side: Side) -> Channels | str:
    norm = cast(nn.LayerNorm, layer)
    shape = norm.normalized_shape
    if len(shape) != 1:
        return f"it normalizes over {len(shape)} dimensions"
    places = _present(norm, Place("weight", 0, "scale"), Place("bias", 0, "rest"))
    return Channels(shape[0], places, ("normalized_shape[0]",))


def _prelu(layer: nn.Module, side: Side) -> Channels:
    slopes = cast(nn.PReLU, layer).num_parameters
    # One slope for all channels: nothing of it goes with any of them.
    return Channels(slopes, (Place("weight", 0, "rest"),) if slopes > 1 else (), ("num_parameters",) * (slopes > 1))


def _embedding(layer: nn.Module, side: Side) -> Channels:
    return Channels(cast(nn.Embedding, layer).embedding_dim, (Place("weight", 1, "rest"),), ("embedding_dim",))


_TABLE: tuple[tuple[tuple[type[nn.Module], ...], Callable[[nn.Module, Side], Channels | str]], ...] = (
    ((nn.Linear,), _linear),
    ((nn.modules.conv._ConvNd,), _convolution),
    ((nn.modules.batchnorm._NormBase,), _batch_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.LayerNorm,), _layer_norm),
    ((nn.PReLU,), _prelu),
    ((nn.Embedding,), _embedding),
)
