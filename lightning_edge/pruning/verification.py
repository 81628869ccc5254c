"""Whether a cut network computes what the whole one does with the channels zeroed, tried on copies before any cut.

Tried with random weights: with the trained ones, a channel that matters little would hide a cut at the wrong place.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_edge.network import Inputs, flatten_outputs
from lightning_edge.pruning.channels import Integers
from lightning_edge.pruning.cutting import make_cut
from lightning_edge.pruning.groups import Group
from lightning_edge.schedule import Change
from lightning_edge.surgery import in_mode

# Largest difference between the two, relative to the largest output: rounding of float32 over deep networks.
_TOLERANCE = 1e-3
# Folders whose code is not the network's.
_NOT_THE_NETWORKS = tuple(str(Path(file).parent) for file in (torch.__file__, __file__))


@torch.no_grad()
def find_fault(
    network: nn.Module, calls: Sequence[Inputs], change: Change, groups: Sequence[Group], kept: Sequence[Integers]
) -> str:
    """Make a cut and compare.

    Args:
        network: A copy of the network, in eval mode; afterwards it is cut, and its weights are not its own.
        calls: Calls of it; the first that the whole network takes is compared.
        change: The cut.
        groups: The groups that lose units.
        kept: The units that each of them keeps.

    Returns:
        What is wrong; empty: nothing.
    """
    _randomize(network)
    handles = _zero(network, groups, kept)
    expected: list[Tensor] | str = ""
    for inputs in calls:
        expected = _outputs(network, inputs)
        if not isinstance(expected, str):
            break
    for handle in handles:
        handle.remove()
    # Zeroed is only what the cut takes away: what stays is as it was.
    make_cut(network, change)
    if isinstance(expected, str):
        return f"the network does not run with random weights, which the trial needs: {expected}"
    outputs = _outputs(network, inputs)
    if isinstance(outputs, str):
        return f"its forward then fails with {outputs}"
    return _difference(outputs, expected)


def _outputs(network: nn.Module, inputs: Inputs) -> list[Tensor] | str:
    with in_mode(network, training=True):
        pass  # what modules keep in evaluation comes from other weights
    try:
        return flatten_outputs(network(*inputs.args, **inputs.kwargs))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).splitlines()[:1])}{_place(error)}"


def _place(error: Exception) -> str:
    """Say which line of the network's own code failed, if one did."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_NETWORKS)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    if [output.shape for output in outputs] != [output.shape for output in expected]:
        shapes = [tuple(output.shape) for output in outputs]
        return f"its outputs then have shapes {shapes} instead of {[tuple(output.shape) for output in expected]}"
    for output, wanted in zip(outputs, expected, strict=True):
        if not wanted.is_floating_point() or not wanted.numel():
            continue
        if not bool(torch.isfinite(wanted).all()):
            return "its output is not finite for random weights, so that a cut cannot be checked"
        scale = float(wanted.abs().max())
        error = float((output - wanted).abs().max())
        if not error <= _TOLERANCE * max(scale, 1e-6):
            return f"it then computes something else than with these channels at zero (off by {error / scale:.1%})"
    return ""


def _randomize(network: nn.Module) -> None:
    generator = torch.Generator(next(network.parameters()).device).manual_seed(0)
    for module in network.modules():
        for parameter in module._parameters.values():
            if parameter is None or not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2:
                reach = (6 * parameter.shape[0] / parameter.numel()) ** 0.5  # keeps the variance through ReLUs
                parameter.uniform_(-reach, reach, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
        for name, buffer in module._buffers.items():
            if buffer is not None and name.endswith("running_mean"):
                buffer.uniform_(-0.5, 0.5, generator=generator)
            elif buffer is not None and name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)


def _zero(
    network: nn.Module, groups: Sequence[Group], kept: Sequence[Integers]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Silence what goes: what makes it gives zero, and what reads it does not look."""
    tensors = dict(network.named_parameters())
    norms: dict[str, NDArray[np.bool_]] = {}
    for group, units in zip(groups, kept, strict=True):
        keeps = group.keeps(units)
        indices: dict[int, Tensor] = {}  # most slots of a group have one numbering of units
        for slot in group.slots:
            if slot.tensor in tensors:
                parameter = tensors[slot.tensor]
                gone = indices.get(id(slot.units))
                if gone is None:
                    gone = torch.from_numpy(np.flatnonzero(~keeps[slot.units])).to(parameter.device)
                    indices[id(slot.units)] = gone
                parameter.index_fill_(slot.dimension, gone, 0.0)
        for name, channels in group.norms.items():
            silent = norms.setdefault(name, np.zeros(len(channels), dtype=np.bool_))
            silent |= ~keeps[channels]
    return [
        (layer := network.get_submodule(name)).register_forward_hook(_WithoutChannels(layer, silent))
        for name, silent in norms.items()
    ]


class _WithoutChannels:
    """Has a layer that normalizes over channels look at those that stay only: the layer itself, with fewer of them.

    Args:
        layer: The norm, of torch's or of the network's own.
        silent: For each of its channels, whether it goes.
    """

    def __init__(self, layer: nn.Module, silent: NDArray[np.bool_]) -> None:
        self.channels = len(silent)
        self.kept = torch.from_numpy(np.flatnonzero(~silent))
        if not isinstance(layer, nn.GroupNorm):
            # A norm does not look at the order of its channels; what does shows itself by giving something else.
            self.kept = self.kept.flip(0)
        self.layer = copy.copy(layer)
        state = self.layer.__dict__
        state["_parameters"] = {
            name: None if tensor is None else nn.Parameter(tensor.index_select(0, self.kept.to(tensor.device)))
            for name, tensor in layer._parameters.items()
        }
        if getattr(layer, "normalized_shape", None) == (self.channels,):
            state["normalized_shape"] = (len(self.kept),)
        if isinstance(layer, nn.GroupNorm) and layer.num_groups == layer.num_channels:
            state["num_groups"] = len(self.kept)

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Channels come last, or second as in images: LayerNorms of the network's own are of either kind.
        for dimension in reversed(range(1, args[0].dim())):
            if args[0].shape[dimension] != self.channels:
                continue
            kept = self.kept.to(output.device)
            try:
                result = type(layer).forward(self.layer, args[0].index_select(dimension, kept), *args[1:])
                return torch.zeros_like(output).index_copy(dimension, kept, result)
            except (RuntimeError, IndexError):
                continue
        return output
