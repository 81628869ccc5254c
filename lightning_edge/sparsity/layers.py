"""Which weights of a network are masked, and the masks on it. Knows torch only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.sparsity.masks import Weight, unpack

Layer = nn.Linear | nn.modules.conv._ConvNd


def choose(network: nn.Module, ignore: Sequence[str], group: int) -> tuple[dict[str, Weight], dict[str, str]]:
    """Choose the weights of linear layers and convolutions.

    Args:
        network: The network, unchanged.
        ignore: Patterns (`fnmatch`) of names of layers to leave dense.
        group: Consecutive inputs that a pattern groups; 1 where there is none.

    Returns:
        The weights, by parameter name; and for each layer that cannot be masked, by its name, the reason.

    Raises:
        CompressionError: If a pattern matches nothing, or a weight is not finite.
    """
    layers = {name: layer for name, layer in network.named_modules(remove_duplicate=False) if isinstance(layer, Layer)}
    every = [name for name, _ in network.named_modules(remove_duplicate=False)]
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise CompressionError(
                f"ignore={pattern!r} matches nothing in {type(network).__name__}. Linear layers and convolutions in "
                f"it: {', '.join(layers) or 'none'}."
            )
    ignored = {name for name in layers if any(fnmatchcase(name, pattern) for pattern in ignore)}
    # A weight that two layers share is masked once, and left dense if either is ignored.
    seen = {id(layers[name].weight) for name in ignored}
    weights, left_alone = {}, {}
    for name, layer in layers.items():
        if id(layer.weight) in seen:
            continue
        if "weight" not in layer._parameters or hasattr(layer, "parametrizations"):
            left_alone[name] = "its weight is computed from other parameters"
            continue
        seen.add(id(layer.weight))
        weight = _weight(layer)
        if weight.inputs % group:
            left_alone[name] = f"its {weight.inputs} inputs are not whole groups of {group}"
        elif not torch.isfinite(weight.data).all():
            raise CompressionError(f"{name}.weight is not finite, so it has no order. Training has diverged.")
        else:
            weights[f"{name}.weight" if name else "weight"] = weight
    return weights, left_alone


def _weight(layer: Layer) -> Weight:
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return Weight(layer.weight, 0, layer.weight.shape[0] // layer.groups)
    return Weight(layer.weight, 1, layer.weight.shape[1])


def unpack_all(
    network: nn.Module, packed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Give recorded masks for a network's weights, each on its weight's device.

    Raises:
        CompressionError: If a weight is not there, or has another shape than when it was masked.
    """
    masks = {}
    for name, bits in packed.items():
        parameter = parameter_of(network, name)
        if list(parameter.shape) != list(shapes[name]):
            raise CompressionError(
                f"the mask of {name} is for a weight of shape {tuple(shapes[name])}, and the weight's shape is "
                f"{tuple(parameter.shape)} now. Factorize and prune first, then sparsify."
            )
        masks[name] = unpack(bits.cpu(), parameter.shape).to(parameter.device)
    return masks


def parameter_of(network: nn.Module, name: str) -> nn.Parameter:
    """Give a parameter by name.

    Raises:
        CompressionError: If there is none.
    """
    try:
        return network.get_parameter(name)
    except AttributeError as error:
        raise CompressionError(
            f"{type(network).__name__} has no parameter {name!r}, for which there is a mask: {error}. Factorize and "
            "prune first, then sparsify."
        ) from error
