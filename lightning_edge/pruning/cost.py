"""What a network costs, as a function of how many channels its layers keep: MACs, parameters, bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Measure = Literal["macs", "params", "size_bytes"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
Floats = NDArray[np.float64]


@dataclass
class Positions:
    """At how many positions each weight is multiplied, in one call of the network with one sample."""

    batch_size: int
    by_weight: dict[int, float] = field(default_factory=dict)

    @contextmanager
    def counted(self, network: nn.Module) -> Iterator[None]:
        """Count during the calls of ``network`` that the context holds; a shared module counts each time."""
        kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
        handles = [
            layer.register_forward_hook(self._count, with_kwargs=True)
            for layer in network.modules()
            if isinstance(layer, kinds)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        result = output[0] if isinstance(output, tuple) else output
        if isinstance(given, nn.utils.rnn.PackedSequence):
            given, result = given.data, result.data
        if isinstance(layer, nn.modules.conv._ConvNd):
            seen, channels = (given, layer.in_channels) if layer.transposed else (result, layer.out_channels)
        elif isinstance(layer, nn.Linear):
            seen, channels = result, layer.out_features
        else:
            # A recurrent layer multiplies all of its matrices at each step; attention projects each token.
            seen, channels = given, given.shape[-1]
        for weight in layer.parameters() if layer._modules else layer._parameters.values():
            if weight is not None and weight.dim() >= 2:
                count = seen.numel() / max(1, channels) / self.batch_size
                self.by_weight[id(weight)] = self.by_weight.get(id(weight), 0.0) + count


def coefficients(tensors: Mapping[str, Tensor], positions: Positions) -> dict[Measure, dict[str, float]]:
    """Give what one element of each parameter costs.

    MACs are those of layers with weights, for one sample: positions times elements. Size is that of an int8 file's
    weights: one byte for an element of a matrix or kernel, four for one of a vector (biases have 32 bits).

    Args:
        tensors: The network's parameters, each once.
        positions: Where they were used.
    """
    return {
        "macs": {name: positions.by_weight.get(id(tensor), 0.0) for name, tensor in tensors.items()},
        "params": dict.fromkeys(tensors, 1.0),
        "size_bytes": {name: 1.0 if tensor.dim() >= 2 else 4.0 for name, tensor in tensors.items()},
    }


class Cost:
    """A network's cost for many choices of kept channels at once.

    A parameter has as many elements as the product of its sizes, and each size falls by a fixed number for each unit
    of channels that goes from a group.

    Args:
        shapes: Shape of each parameter.
        coefficient: Cost of one element of each.
        removals: For each parameter and dimension that groups shorten, by how much one unit of each group does.
        units: Units of each group before the cut.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        coefficient: Mapping[str, float],
        removals: Mapping[tuple[str, int], Mapping[int, int]],
        units: NDArray[np.int64],
    ) -> None:
        self._units = units
        touched: dict[str, list[int]] = {}
        for name, dimension in removals:
            touched.setdefault(name, []).append(dimension)
        names = [name for name in touched if coefficient[name] > 0]
        self._constant = sum(coefficient[name] * shape.numel() for name, shape in shapes.items() if name not in touched)
        depth = max((len(touched[name]) for name in names), default=0)
        self._factor = np.array([coefficient[name] for name in names])
        self._sizes = np.ones((depth, len(names)))
        self._removals = np.zeros((depth, len(units), len(names)))
        for row, name in enumerate(names):
            for dimension, size in enumerate(shapes[name]):
                if dimension not in touched[name]:
                    self._factor[row] *= size
            for level, dimension in enumerate(touched[name]):
                self._sizes[level, row] = shapes[name][dimension]
                for group, count in removals[name, dimension].items():
                    self._removals[level, group, row] = count

    def __call__(self, kept: NDArray[np.int64]) -> Floats:
        """Give the cost for kept units (choices, groups), as (choices,)."""
        gone = (self._units - kept).astype(np.float64)
        elements = np.ones((len(kept), len(self._factor)))
        for size, removal in zip(self._sizes, self._removals, strict=True):
            elements *= size - gone @ removal
        costs: Floats = self._constant + elements @ self._factor
        return costs
