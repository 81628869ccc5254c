"""The network as one program: float or converted, in the one form that every file is written from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_edge.errors import ExportError
from lightning_edge.exporters.default_names import with_names
from lightning_edge.exporters.input_adapter import Front, front_of, in_layout
from lightning_edge.exporters.passes.base import Pass, apply_passes
from lightning_edge.interface import IMAGE_DIMENSIONS, Interface
from lightning_edge.network import Deployable, Inputs, fed, sort_keywords
from lightning_edge.surgery import copy_of

_DIVERGED = "Look at the loss for divergence, and take a checkpoint from before it."


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
        interface: How the file is to be called; names that it lacks are given, see `with_names`.
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

    def given(tensor: Tensor) -> Tensor:
        if interface.pixels is not None and tensor.dim() == IMAGE_DIMENSIONS:
            tensor = torch.zeros_like(tensor, dtype=pixel_type)
        return in_layout(tensor.contiguous(), interface)

    # In the memory order that `conform` gives: ExecuTorch writes the order of the sample into the file, and does not
    # look at that of what it is fed.
    inputs = inputs.map(given)
    graph = _FileForm(network.graph, call, front_of(network, interface))
    scales = network.output_scales
    written = Deployable(graph, inputs, network.precision, scales, interface=interface)
    written.interface = with_names(interface, written)
    return written


def in_plain_order(network: nn.Module) -> nn.Module:
    """Have all tensors of a network in their plain order, and all buffers in its state_dict, in place.

    ExecuTorch cannot fold channels_last weights, and takes a buffer that is not in the state_dict for none of its own.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.contiguous()
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer)
    return network


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def program_after(network: Deployable, passes: Sequence[Pass]) -> torch.export.ExportedProgram:
    """Export a network with passes applied to its program; a program that changed is exported again."""
    program = network.program()
    graph = program.module(check_guards=False)
    return network.with_graph(graph).program() if apply_passes(graph, passes) else program


def deployable(model: nn.Module, inputs: Any = None) -> Deployable:
    """Make what an exporter takes of a module: its converted int8 graph, or a float copy in eval mode.

    Args:
        model: A `Deployable` (returned as it is), a module with a quantized network, or any module.
        inputs: One call's arguments: a tensor, a tuple of positional or a mapping of keyword arguments, or `Inputs`.
            Needed for a module that is not quantized; a quantized one keeps a sample of its own.

    Raises:
        CompressionError: If the module cannot be copied.
        ExportError: If a weight is not finite.
        ValueError: If inputs are needed and not given, or given beside a `Deployable`.
    """
    if isinstance(model, Deployable):
        if inputs is not None:
            raise ValueError("a Deployable holds its own sample of inputs; leave inputs out")
        return model
    from lightning_edge import quantization

    check_numbers(model)
    if any(quantization.is_quantized(part) for part in model.modules()):
        return quantization.convert(model)
    if inputs is None:
        raise ValueError(
            f"inputs are missing: to export {type(model).__name__} in float, give one call's arguments, "
            "for example inputs=images[:1] or inputs={'input_ids': ids}"
        )
    # A LightningModule holds its Trainer, and that everything else: the copy goes without.
    trainer = model.__dict__.get("_trainer")
    network = copy_of(model, {id(trainer): None}).cpu().float().eval().requires_grad_(False)
    sample = fed(model, inputs).map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    return Deployable(in_plain_order(network), sample, "fp32")


def check_numbers(network: torch.nn.Module) -> None:
    """Make sure that a network's weights are numbers: int8 turns what is none into some weight or other.

    Raises:
        ExportError: Naming the first parameter that holds a value that is not finite, or buffer that holds a NaN.
    """
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            raise ExportError(f"the parameter {name!r} holds values that are not finite (NaN or infinity). {_DIVERGED}")
    for name, buffer in network.named_buffers():
        # Masks are buffers that hold infinities on purpose.
        if buffer.is_floating_point() and buffer.isnan().any():
            raise ExportError(f"the buffer {name!r} holds NaN. {_DIVERGED}")
