"""A cut, made from its record alone: which indices of which tensors stay, and which counts of layers change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.schedule import Change
from lightning_edge.succession import Succession, cut, resize


def cuts_of(changes: Iterable[Change]) -> list[Change]:
    """Give the cuts among changes, without the trial that comes before them."""
    return [change for change in changes if change["kind"] == "cut"]


def channels_of(changes: Iterable[Change]) -> dict[str, tuple[int, int]]:
    """Give the channels that each cut layer made at first and makes in the end, by the name of the layer.

    Args:
        changes: What pruning did to a network, oldest first.
    """
    found: dict[str, tuple[int, int]] = {}
    for change in cuts_of(changes):
        for layer, counts in change["attributes"].items():
            for made in counts.keys() & {"out_channels", "out_features"}:
                before, after = counts[made]
                found[layer] = (found.get(layer, (before, after))[0], after)
    return {layer: (before, after) for layer, (before, after) in found.items() if before != after}


def make_cut(network: nn.Module, change: Change) -> Succession:
    """Take the recorded channels out of a network, in place; parameters stay the same objects.

    Args:
        network: The network, with the structure it had before the cut.
        change: The record of the cut.

    Returns:
        What became of each parameter.

    Raises:
        CompressionError: If the network does not have that structure; then nothing is changed.
    """
    tensors, modules = _checked(network, change, after=False)
    buffers = _buffer_holders(modules.values())
    succession = {}
    for name, kept in change["kept"].items():
        tensor = tensors[name]
        indices = [(dimension, index) for dimension, index, _ in kept]
        if isinstance(tensor, nn.Parameter):
            cut(tensor, indices)
            succession[tensor] = [(dimension, index.to(tensor.device)) for dimension, index in indices]
        else:
            selected = tensor
            for dimension, index in indices:
                selected = selected.index_select(dimension, index.to(tensor.device))
            for holder, key in buffers[id(tensor)]:
                holder[key] = selected
    _set_attributes(modules, change, 1)
    return Succession(cut=succession)


def undo_cut(network: nn.Module, change: Change) -> None:
    """Give a network the structure it had before a cut, in place; all elements of what was cut are zeros.

    Raises:
        CompressionError: If the network does not have the structure of after the cut; then nothing is changed.
    """
    tensors, modules = _checked(network, change, after=True)
    buffers = _buffer_holders(modules.values())
    for name, kept in change["kept"].items():
        tensor = tensors[name]
        shape = list(tensor.shape)
        for dimension, _, before in kept:
            shape[dimension] = before
        grown = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        if isinstance(tensor, nn.Parameter):
            resize(tensor, grown)
        else:
            for holder, key in buffers[id(tensor)]:
                holder[key] = grown
    _set_attributes(modules, change, 0)


def _checked(network: nn.Module, change: Change, *, after: bool) -> tuple[dict[str, Tensor], dict[str, nn.Module]]:
    """Give all tensors and modules by all of their names, if they have the sizes that the record says."""
    modules = dict(network.named_modules(remove_duplicate=False))
    tensors = {
        f"{name}.{key}" if name else key: tensor
        for name, module in modules.items()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    for name, kept in change["kept"].items():
        if name not in tensors:
            raise _misfit(network, f"it has no parameter or buffer {name!r}")
        shape = tensors[name].shape
        for dimension, index, before in kept:
            size = len(index) if after else before
            if dimension >= len(shape) or shape[dimension] != size:
                raise _misfit(
                    network, f"{name!r} has shape {tuple(shape)}, the record says {size} in dimension {dimension}"
                )
    for module_name, attributes in change["attributes"].items():
        if module_name not in modules:
            raise _misfit(network, f"it has no module {module_name!r}")
        module = modules[module_name]
        for attribute, values in attributes.items():
            found = read_attribute(module, attribute)
            if isinstance(found, bool) or found != values[int(after)]:
                raise _misfit(network, f"{module_name}.{attribute} is {found}, the record says {values[int(after)]}")
    return tensors, modules


def _misfit(network: nn.Module, what: str) -> CompressionError:
    return CompressionError(
        f"The recorded cut does not fit this {type(network).__name__}: {what}. Build the network as it was before the "
        "first cut, and repeat all of its changes in order."
    )


def _buffer_holders(modules: Iterable[nn.Module]) -> dict[int, list[tuple[dict[str, Tensor | None], str]]]:
    """Where each buffer is held: more than one place where modules share it."""
    holders: dict[int, list[tuple[dict[str, Tensor | None], str]]] = {}
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                holders.setdefault(id(buffer), []).append((module._buffers, name))
    return holders


def read_attribute(module: nn.Module, attribute: str) -> Any:
    """Read a count by its name, or by ``name[index]`` from a tuple; ``None`` where there is none."""
    name, _, index = attribute.partition("[")
    value = getattr(module, name, None)
    return value[int(index[:-1])] if index and value is not None else value


def _set_attributes(modules: Mapping[str, nn.Module], change: Change, which: int) -> None:
    for module_name, attributes in change["attributes"].items():
        module = modules[module_name]
        for attribute, values in attributes.items():
            name, _, index = attribute.partition("[")
            if index:
                counts = list(getattr(module, name))
                counts[int(index[:-1])] = values[which]
                setattr(module, name, tuple(counts))
            else:
                setattr(module, name, values[which])
