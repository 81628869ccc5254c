"""How a file is called, put into the graph that is written: what stands between the file's inputs and the network's.

`Front` goes into the graph; `as_file_takes` is for who has what the network takes, and calls the file.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from lightning_edge.interface import Interface
from lightning_edge.network import Deployable

_IMAGES = 4  # dimensions


@final
class Front(nn.Module):
    """Makes of one input of a file what the network takes."""

    def __init__(self, interface: Interface) -> None:
        super().__init__()
        self.channels_last = interface.layout == "nhwc"
        # A converted graph refuses eval(), so nothing around it is in training mode to begin with.
        self.training = False

    def forward(self, tensor: Tensor) -> Tensor:
        """Give 4-D tensors in the network's own layout, NCHW; others as they are."""
        if tensor.dim() == _IMAGES and self.channels_last:
            return tensor.permute(0, 3, 1, 2)
        return tensor


def as_file_takes(tensor: Tensor, interface: Interface) -> Tensor:
    """Make of what the network takes as one input what the file takes."""
    if tensor.dim() == _IMAGES and interface.layout == "nhwc":
        # A copy, not contiguous(): that leaves the strides of one channel as they are, and ExecuTorch reads them.
        return tensor.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    return tensor


def network_shape(shape: tuple[int, ...], interface: Interface) -> tuple[int, ...]:
    """Give the shape that the network takes where the file takes this one."""
    if len(shape) == _IMAGES and interface.layout == "nhwc":
        batch, height, width, channels = shape
        return batch, channels, height, width
    return shape


def check_interface(interface: Interface, network: Deployable) -> None:
    """Make sure that an interface is one of this network, before anything is written.

    Raises:
        ValueError: If it names more or fewer inputs or outputs than there are, or asks for a layout of no image.
    """
    shapes = [tuple(tensor.shape) for tensor in network.inputs.tensors]
    if interface.inputs and len(interface.inputs) != len(shapes):
        raise ValueError(
            f"Interface(inputs={list(interface.inputs)}) names {len(interface.inputs)} inputs, and the network takes "
            f"{len(shapes)}: {', '.join(map(str, map(list, shapes)))}. Name each, positional arguments before keyword "
            "arguments, and those sorted by name"
        )
    outputs = network.output_names() if interface.outputs else []
    if len(interface.outputs) != len(outputs):
        raise ValueError(
            f"Interface(outputs={list(interface.outputs)}) names {len(interface.outputs)} outputs, and the network "
            f"gives {len(outputs)}: {', '.join(outputs)}. Name each, in the order in which the network gives them"
        )
    if interface.layout == "nhwc" and not any(len(shape) == _IMAGES for shape in shapes):
        raise ValueError(
            f"Interface(layout='nhwc') is for 4-D inputs, and the network takes "
            f"{', '.join(map(str, map(list, shapes)))}. Leave it out"
        )
