"""Adapt a file's inputs to the network's: names, layout and pixels.

`Front` does it inside the exported graph. The functions do the reverse for a caller who has the network's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from lightning_edge.exporters.passes.graph import operation
from lightning_edge.interface import IMAGE_DIMENSIONS, Interface, Pixels
from lightning_edge.network import Deployable, flatten_outputs
from lightning_edge.user_warnings import warn

_WHITE = 255
# How far beyond black and white a value may lie, in pixels: by as much resizing overshoots.
_OVERSHOOT = 1.0
# A value this near to a whole pixel is that pixel, rounded in float32; one that is further off was resized or is none.
_WHOLE = 0.01
_SHARE_OFF = 0.05
# Pixels as int8: 1 a step, 128 lower.
_PIXELS_AS_INT8 = (1.0, -128, -128, 127, torch.int8)
_LARGEST_WEIGHT = 127


@final
class Front(nn.Module):
    """Makes of one input of a file what the network takes.

    Pixels are scaled in float, or, for a network that quantizes its images anyway, by an int8 convolution with one
    weight for each channel: an int8 file stays one, and the quantizer behind it is the network's own.

    Args:
        interface: How the file is called.
        channels: Of the images.
        int8: Whether the network quantizes its images.
    """

    scale: Tensor
    shift: Tensor
    bias: Tensor
    weight: Tensor
    steps: Tensor
    zeros: Tensor

    def __init__(self, interface: Interface, channels: int = 1, *, int8: bool = False) -> None:
        super().__init__()
        self.channels_last = interface.layout == "nhwc"
        self.pixels = interface.pixels
        self.int8 = int8
        # A converted graph refuses eval(), so nothing around it is in training mode to begin with.
        self.training = False
        if self.pixels is not None:
            scale, shift = (_each(values, channels) for values in (self.pixels.scale(), self.pixels.shift()))
            self.register_buffer("scale", scale.view(1, -1, 1, 1))
            self.register_buffer("shift", shift.view(1, -1, 1, 1))
            if int8:
                self.register_buffer("bias", shift)
                whole = torch.full((channels, 1, 1, 1), _LARGEST_WEIGHT, dtype=torch.int8)
                self.register_buffer("weight", whole)
                self.register_buffer("steps", scale / _LARGEST_WEIGHT)
                self.register_buffer("zeros", torch.zeros(channels, dtype=torch.int64))

    def forward(self, tensor: Tensor) -> Tensor:
        """Give 4-D tensors in the network's own layout, NCHW, and as its values; others as they are."""
        if tensor.dim() != IMAGE_DIMENSIONS:
            return tensor
        if self.pixels is not None:  # first: XNNPACK has no transpose of uint8
            tensor = tensor.to(self.scale.dtype)
        if self.channels_last:
            tensor = tensor.permute(0, 3, 1, 2)
        if self.pixels is None:
            return tensor
        return self._convolved(tensor) if self.int8 else tensor * self.scale + self.shift

    def _convolved(self, tensor: Tensor) -> Tensor:
        quantized = torch.ops.quantized_decomposed
        tensor = quantized.quantize_per_tensor(tensor, *_PIXELS_AS_INT8)
        tensor = quantized.dequantize_per_tensor(tensor, *_PIXELS_AS_INT8)
        channels = (self.steps, self.zeros, 0, -_LARGEST_WEIGHT, _LARGEST_WEIGHT, torch.int8)
        weight = quantized.dequantize_per_channel(self.weight, *channels)
        return functional.conv2d(tensor, weight, self.bias, groups=len(weight))


def front_of(network: Deployable, interface: Interface) -> Front:
    """Make the front of a network's files."""
    channels = next((tensor.shape[1] for tensor in network.inputs.tensors if tensor.dim() == IMAGE_DIMENSIONS), 1)
    return Front(interface, channels, int8=_quantizes_images(network))


def as_file_takes(tensor: Tensor, interface: Interface) -> Tensor:
    """Make of what the network takes as one input what the file takes.

    Raises:
        ValueError: If the file takes pixels, and values lie beyond black and white.
    """
    if tensor.dim() != IMAGE_DIMENSIONS:
        return tensor
    if interface.pixels is not None:
        tensor = _pixels(tensor, interface.pixels).round().clamp(0, _WHITE).to(torch.uint8)
    return in_layout(tensor, interface)


def in_layout(tensor: Tensor, interface: Interface) -> Tensor:
    """Give an image in the file's own layout."""
    if tensor.dim() == IMAGE_DIMENSIONS and interface.layout == "nhwc":
        # A copy, not contiguous(): that leaves the strides of one channel as they are, and ExecuTorch reads them.
        return tensor.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    return tensor


def as_network_takes(tensor: Tensor, interface: Interface) -> Tensor:
    """Make values of an image that is given as pixels, in the network's own layout; others stay as they are."""
    if not _are_pixels(tensor, interface) or interface.pixels is None or tensor.dtype != torch.uint8:
        return tensor
    return _values(tensor.float(), interface.pixels)


def as_file_sees(tensor: Tensor, interface: Interface) -> Tensor:
    """Give one input as it is after a file has made whole pixels of it; one that is, to float32, stays the same tensor.

    Warns where many values are no whole pixels: of images that were resized as floats that is so, but it may as well
    be that `Pixels` is not what makes this network's images.

    Raises:
        ValueError: As `as_file_takes`.
    """
    if not _are_pixels(tensor, interface) or interface.pixels is None:
        return tensor
    if tensor.dtype == torch.uint8:
        return as_network_takes(tensor, interface)
    pixels = _pixels(tensor, interface.pixels)
    off = (pixels - pixels.round()).abs()
    if not off.numel() or off.max() <= _WHOLE:
        return tensor
    if (off > _WHOLE).float().mean() > _SHARE_OFF:
        warn(
            f"images of the data are no whole pixels under {interface.pixels}; they were rounded, for the file and for "
            "the network it is compared with. That is right where images are resized as floats, but the same is seen "
            "where mean, std or white are not those of the data: compare them with its Normalize"
        )
    return _values(pixels.round().clamp(0, _WHITE), interface.pixels)


def network_shape(shape: tuple[int, ...], interface: Interface) -> tuple[int, ...]:
    """Give the shape that the network takes where the file takes this one."""
    if len(shape) == IMAGE_DIMENSIONS and interface.layout == "nhwc":
        batch, height, width, channels = shape
        return batch, channels, height, width
    return shape


def network_dtype(shape: tuple[int, ...], dtype: torch.dtype, interface: Interface) -> torch.dtype:
    """Give the type that the network takes where the file takes this one."""
    return torch.float32 if len(shape) == IMAGE_DIMENSIONS and interface.pixels is not None else dtype


def check_interface(interface: Interface, network: Deployable) -> None:
    """Make sure that an interface is one of this network, before anything is written.

    Raises:
        ValueError: If it names more or fewer inputs, outputs or classes than there are, or says something of images
            to a network that takes none of that kind.
    """
    tensors = network.inputs.tensors
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
    if interface.inputs and len(interface.inputs) != len(tensors):
        raise ValueError(
            f"Interface(inputs={list(interface.inputs)}) names {len(interface.inputs)} inputs, and the network takes "
            f"{len(tensors)}: {shapes}. Name each, positional arguments before keyword arguments, those sorted by name"
        )
    outputs = network.output_names() if interface.outputs else []
    if len(interface.outputs) != len(outputs):
        raise ValueError(
            f"Interface(outputs={list(interface.outputs)}) names {len(interface.outputs)} outputs, and the network "
            f"gives {len(outputs)}: {', '.join(outputs)}. Name each, in the order in which the network gives them"
        )
    images = [tensor for tensor in tensors if tensor.dim() == IMAGE_DIMENSIONS]
    if interface.layout == "nhwc" and not images:
        raise ValueError(f"Interface(layout='nhwc') is for 4-D inputs, and the network takes {shapes}. Leave it out")
    if interface.pixels is not None:
        _check_pixels(interface.pixels, images, shapes)
    if interface.labels:
        _check_labels(interface.labels, network)


def _check_pixels(pixels: Pixels, images: list[Tensor], shapes: str) -> None:
    channels = {tensor.shape[1] for tensor in images}
    if not images or not all(tensor.is_floating_point() for tensor in images):
        raise ValueError(f"Interface(pixels={pixels}) is for 4-D inputs of floats, and the network takes {shapes}")
    if len(channels) > 1 or pixels.channels not in (1, *channels):
        raise ValueError(
            f"Interface(pixels={pixels}) is for {pixels.channels} channels, and the network takes {shapes}. Give mean "
            "and std one number for each channel, or one for all; all images have to have as many"
        )


def place_of_scores(ranks: Sequence[int]) -> int | None:
    """Say which output holds class scores, by the outputs' dimensions: the first of two, else the first of more."""
    return ranks.index(2) if 2 in ranks else next((place for place, rank in enumerate(ranks) if rank > 2), None)


def _check_labels(labels: tuple[str, ...], network: Deployable) -> None:
    with torch.no_grad():
        outputs = flatten_outputs(network(*network.inputs.args, **network.inputs.kwargs))
    shapes = [tuple(output.shape) for output in outputs]
    place = place_of_scores([len(shape) for shape in shapes])
    scores = None if place is None else shapes[place]
    if scores is None or scores[1] != len(labels):
        found = "no output is of the shape (batch, classes)" if scores is None else f"the network gives {scores[1]}"
        raise ValueError(
            f"Interface(labels=[{labels[0]!r}, ...]) names {len(labels)} classes, and {found}; its outputs are "
            f"{', '.join(str(list(shape)) for shape in shapes)}. Name each class, in the order of the scores"
        )


def _quantizes_images(network: Deployable) -> bool:
    """Whether all that reads an image in a converted graph is an int8 quantizer."""
    if not isinstance(network.graph, fx.GraphModule):
        return False
    given = [node for node in network.graph.graph.nodes if node.op == "placeholder"]
    images = [
        node
        for node in given
        if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dim() == IMAGE_DIMENSIONS
    ]
    readers = [reader for node in images for reader in node.users]
    return bool(readers) and all(
        operation(reader) == "quantize_per_tensor" and reader.args[5] == torch.int8 for reader in readers
    )


def _are_pixels(tensor: Tensor, interface: Interface) -> bool:
    """Whether an input is an image of pixels; one with other channels is left for who checks shapes."""
    channels = 1 if interface.pixels is None else interface.pixels.channels
    return interface.pixels is not None and tensor.dim() == IMAGE_DIMENSIONS and channels in (1, tensor.shape[1])


def _each(values: tuple[float, ...], channels: int) -> Tensor:
    tensor = torch.tensor(values, dtype=torch.float32)
    return tensor.expand(channels).clone()


def _values(pixels: Tensor, description: Pixels) -> Tensor:
    """The network's values of pixels given as floats, as torchvision computes them."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (description.mean, description.std))
    return (pixels / _WHITE * description.white - mean) / std


def _pixels(tensor: Tensor, description: Pixels) -> Tensor:
    """Pixels of the network's values, not rounded.

    Raises:
        ValueError: If some lie beyond black and white, or are no numbers.
    """
    given = (description.mean, description.std)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in given)
    pixels = (tensor.double() * std + mean) * (_WHITE / description.white)
    low, high = (float(pixels.min()), float(pixels.max())) if pixels.numel() else (0.0, 0.0)
    if not (low >= -_OVERSHOOT and high <= _WHITE + _OVERSHOOT):
        raise ValueError(
            f"it takes images made of pixels from 0 to 255, and under {description} the values given are pixels from "
            f"{low:.6g} to {high:.6g}. Give real images, and mean, std and white of the data's own Normalize"
        )
    return pixels.float()
