"""A network in the one form that every file is written from."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_edge.exporters.base import sort_keywords
from lightning_edge.exporters.front import Front, front_of, in_layout
from lightning_edge.interface import IMAGE_DIMENSIONS, Interface
from lightning_edge.network import Deployable, Inputs


@final
class _FileForm(nn.Module):
    """A network as it is written: in no mode, called with tensors only, keywords in any order, giving no ``None``.

    It also keeps two faults of others away: torch.export swaps the keywords of a graph that was exported before if
    they come in another order, and ExecuTorch cannot fold the BatchNorm of a module that has a number for a name.
    """

    def __init__(self, network: nn.Module, call: Inputs, front: Front) -> None:
        super().__init__()
        self.network = network
        self.front = front
        self._constants = {
            key: value for key, value in (*enumerate(call.args), *call.kwargs.items()) if not _has_tensors(value)
        }
        # Only here: a converted graph refuses eval().
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network, its arguments that are no tensors put back in."""
        inputs = Inputs(args, kwargs).map(self.front)
        positional = list(inputs.args)
        for key, value in self._constants.items():
            if isinstance(key, int):
                positional.insert(key, value)
        named = {key: value for key, value in self._constants.items() if isinstance(key, str)}
        return _without_none(self.network(*positional, **inputs.kwargs, **named))


def _without_none(outputs: Any) -> Any:
    """Leave out what the network does not give this time, such as the loss of a call without labels: no file has it."""
    if isinstance(outputs, dict):
        return {key: _without_none(value) for key, value in outputs.items() if value is not None}
    if type(outputs) in (tuple, list):
        return type(outputs)(_without_none(value) for value in outputs if value is not None)
    return outputs


def in_file_form(
    network: Deployable, interface: Interface | None = None, pixel_type: torch.dtype = torch.uint8
) -> Deployable:
    """Give the network as every file has it: keywords sorted by name, arguments that are no tensors built in.

    Args:
        network: The network.
        interface: How the file is to be called.
        pixel_type: Type of images that are pixels.
    """
    interface = interface or Interface()
    call = sort_keywords(network.inputs)
    if network.precision == "int8":  # a copy by its making; a float network may be the user's own
        in_plain_order(network)
    inputs = Inputs(
        tuple(value for value in call.args if _has_tensors(value)),
        {name: value for name, value in call.kwargs.items() if _has_tensors(value)},
    )
    unfolded = (
        None
        if network.unfolded is None
        else _FileForm(network.unfolded, call, front_of(network, interface, folded=False))
    )

    def given(tensor: Tensor) -> Tensor:
        if interface.pixels is not None and tensor.dim() == IMAGE_DIMENSIONS:
            tensor = torch.zeros_like(tensor, dtype=pixel_type)
        return in_layout(tensor.contiguous(), interface)

    # In the memory order that `conform` gives: ExecuTorch writes the order of the sample into the file, and does not
    # look at that of what it is fed.
    inputs = inputs.map(given)
    graph = _FileForm(network.graph, call, front_of(network, interface))
    scales = network.output_scales
    return Deployable(graph, inputs, network.precision, unfolded, scales, interface=interface)


def in_plain_order(network: nn.Module) -> nn.Module:
    """Lay out all tensors of a network in their plain order, in place; ExecuTorch cannot fold channels_last weights."""
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.contiguous()
    return network


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
