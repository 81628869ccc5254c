"""The network as it was before anything was taken out of it: what a user compares the size of a file with."""

from __future__ import annotations

import torch
from torch import nn

from lightning_edge.measure import module_bytes, parameter_count
from lightning_edge.network import Inputs
from lightning_edge.pruning.cost import Positions
from lightning_edge.quantization import float_copy
from lightning_edge.record import restore
from lightning_edge.reporting.network_size import NetworkSize


def original_of(network: nn.Module) -> nn.Module:
    """Copy a network in float, with the structure it had before its first change; weights that are gone are zeros."""
    original = float_copy(network)
    restore(original, [])
    return original


def size_of(network: nn.Module, call: Inputs) -> NetworkSize:
    """Measure a float network.

    Args:
        network: The network, in eval mode on the CPU.
        call: What it is fed.
    """
    positions = Positions(call.batch_size)
    macs: int | None
    try:
        with torch.no_grad(), positions.counted(network):
            network(*call.args, **call.kwargs)
        by_weight = positions.by_weight
        macs = round(sum(by_weight.get(id(weight), 0.0) * weight.numel() for weight in network.parameters()))
    except Exception:  # a network that zeros stop, or a layer that is called in an unusual way: its size is known
        macs = None
    return NetworkSize(parameter_count(network), module_bytes(network), macs)


def sizes(trained: nn.Module, floats: nn.Module, call: Inputs) -> tuple[NetworkSize, NetworkSize | None]:
    """Measure the float network, and the one it was cut from; ``None`` where nothing was cut.

    Args:
        trained: The network as it was trained, with its record.
        floats: The float network, in eval mode on the CPU.
        call: What they are fed.
    """
    now = size_of(floats, call)
    before = size_of(original_of(trained).cpu().float().eval(), call)
    return now, before if before.parameters != now.parameters else None
