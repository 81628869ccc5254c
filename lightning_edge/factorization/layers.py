"""Which layers of a network can be factorized, and why the others cannot. Knows torch only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from lightning_edge.errors import CompressionError
from lightning_edge.factorization.decomposition import Layer


def choose(
    network: nn.Module, include: Sequence[str], ignore: Sequence[str]
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Choose the layers to factorize by the patterns of their names.

    Args:
        network: The network, unchanged.
        include: Patterns (`fnmatch`) of layers to factorize.
        ignore: Patterns of layers to leave alone.

    Returns:
        The layers, by name; and of the layers that the patterns name, the reason for each that cannot be factorized.

    Raises:
        CompressionError: If a pattern matches nothing, or a chosen layer's weight is tied to another.
    """
    found = {name: layer for name, layer in network.named_modules() if name and _is_dense(layer)}
    names = [name for name, _ in network.named_modules(remove_duplicate=False)]
    for pattern in include:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise CompressionError(
                f"include={pattern!r} matches no layer of {type(network).__name__} that can be factorized. Linear "
                f"layers and 1x1 convolutions in it: {_listed(found)}."
            )
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CompressionError(
                f"ignore={pattern!r} matches nothing in {type(network).__name__}. Linear layers and 1x1 convolutions "
                f"in it: {_listed(found)}."
            )
    layers, left_alone = {}, {}
    tied = _tied(network)
    for name, layer in found.items():
        if not _matches(name, include) or _matches(name, ignore):
            continue
        reason = _obstacle(network, name, layer)
        if reason is not None:
            left_alone[name] = reason
            continue
        others = [other for other in tied[id(layer.weight)] if other != f"{name}.weight"]
        if others:
            raise CompressionError(
                f"{name}.weight is tied: it is also {', '.join(others)}, which has no part in the factors. Untie them, "
                f"or leave the layer alone with ignore=[{name!r}]."
            )
        layers[name] = layer
    return layers, left_alone


def _is_dense(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.groups == 1 and all(size == 1 for size in layer.kernel_size)
    return isinstance(layer, nn.Linear)


def _obstacle(network: nn.Module, name: str, layer: nn.Module) -> str | None:
    parent = network.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "its MultiheadAttention reads its weight and never calls it"
    if "weight" not in layer._parameters or hasattr(layer, "parametrizations"):
        return "its weight is computed from other parameters (pruning masks, weight norm, a parametrization)"
    if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d):
        return f"it is a {type(layer).__name__}, whose forward may be of its own kind"
    if not isinstance(layer.weight, nn.Parameter) or not torch.isfinite(layer.weight).all():
        raise CompressionError(f"{name}.weight is not finite, so it has no singular values. Training has diverged.")
    return None


def _tied(network: nn.Module) -> dict[int, list[str]]:
    owners = defaultdict(list)
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return owners


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(found: dict[str, nn.Module]) -> str:
    return ", ".join(found) or "none"
