"""What a written file must hold, from its own contents and those of the network it was written from."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Set
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_edge.anatomy import Placements
from lightning_edge.errors import ExportError
from lightning_edge.exporters.base import Artifact, Contents
from lightning_edge.exporters.graphs import CLIPS, VIEWS, operation
from lightning_edge.network import Deployable


class ExportWarning(UserWarning):
    """A file runs, but not all of it the way an int8 file for this target should."""


_TOLD = {
    "the file": "the file says",
    "the runtime": "the runtime says",
    "compute plan": "the compute plan says",
    "op support": "the runtime's list of supported operations says",
}
_DIVERGED = "Look at the loss for divergence, and take a checkpoint from before it."
# How many matrix products one operation is, and the position of its first factor.
_PRODUCTS = {
    "conv1d": 1,
    "conv2d": 1,
    "conv3d": 1,
    "convolution": 1,
    "conv_transpose1d": 1,
    "conv_transpose2d": 1,
    "conv_transpose3d": 1,
    "linear": 1,
    "matmul": 1,
    "mm": 1,
    "bmm": 1,
    "addmm": 1,
    "baddbmm": 1,
    "einsum": 1,
    "scaled_dot_product_attention": 2,
}
_LAYERS = frozenset({"conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "linear"})
_RECURRENT = frozenset({"gru", "lstm", "rnn_tanh", "rnn_relu"})
_ADDED_FIRST = frozenset({"addmm", "baddbmm"})
_OF_STACKS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})


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


def check_activations(network: Deployable, target: str, widths: Set[int]) -> None:
    """Make sure that a target has kernels for the network's quantized activations, before anything is written.

    Raises:
        ExportError: If some are wider than the target can compute with.
    """
    missing = activation_bits(network.graph) - widths
    if missing:
        raise ExportError(
            f"{target}: layers of the network have {max(missing)}-bit activations ('int8_a16' in its plan), and this "
            f"target's kernels take {', '.join(map(str, sorted(widths)))} bits only. Make these layers 'int8' or "
            "'float', or export to a target that has them: tflite."
        )


def check_contents(network: Deployable, contents: Contents, target: str, *, wants_delegate: bool = True) -> None:
    """Make sure that the file is of the network's precision and is delegated at all.

    Args:
        network: What was exported.
        contents: What the file says of itself.
        target: Name of the target, for the message.
        wants_delegate: Whether a delegate was asked for at all.

    Raises:
        ExportError: If an int8 network became a file without int8 weights, or with more products in float than
            `float_products` of the network, where none are of recurrent layers; or if nothing is handed to the
            target's delegate.
    """
    if wants_delegate and contents.delegated_ops == 0:
        raise ExportError(
            f"{target}: none of the file's operations ({_counted(contents.undelegated_ops or ())}) is handed to the "
            "delegate, so it would run on slow reference kernels. Use layers that the delegate has, or another target."
        )
    if wants_delegate and contents.undelegated_ops:
        names = _counted(contents.undelegated_ops)
        _warn(target, f"these operations run outside the delegate, on slower kernels: {names}")
    if network.precision == "fp32":
        return
    if not contents.int8_weight_bytes:
        raise ExportError(
            f"{target}: the network is int8 but the file holds no int8 weights "
            f"({contents.float_weight_bytes} bytes are float). Operations in it: {_counted(contents.ops)}."
        )
    wanted = float_products(network.graph)
    if len(contents.float_compute_ops) > len(wanted) and not (
        has_recurrent_layers(network.graph) and _holds_int8_weights(network.graph, contents)
    ):
        allowed = f" (of the network itself, {_counted(wanted)} may stay in float)" if wanted else ""
        raise ExportError(
            f"{target}: the network is int8 but the file computes in float: {_counted(contents.float_compute_ops)}"
            f"{allowed}. The target's converter made no int8 of these: keep them in float (skip=[...] of Quantize "
            "or quantize), write them in another way, leave the target out, or export the network as fp32."
        )
    kept = float_layers(network.graph)
    if len(contents.float_compute_ops) < len(kept):
        raise ExportError(
            f"{target}: {len(kept)} layers of the network are float by its plan ({', '.join(map(str, kept))}), but the "
            f"file computes only {_counted(contents.float_compute_ops)} in float. Quantize these layers, or leave the "
            "target out."
        )
    if contents.float_compute_ops or contents.float_ops:
        names = _counted((*contents.float_compute_ops, *contents.float_ops))
        _warn(target, f"an int8 file, but these operations in it compute in float: {names}")


def check_fallback(placements: Placements | None, limit: float | None, target: str) -> None:
    """Make sure that no more of a file's work than allowed falls back to the runtime's own CPU kernels.

    Args:
        placements: Where its operations run; ``None`` where nothing tells.
        limit: Largest share of the multiply-accumulates, 0 to 1; ``None`` for any.
        target: Name of the target, for the message.

    Raises:
        ExportError: If more does; with the operations, the costliest first.
    """
    share = None if placements is None else placements.fallback_share
    if placements is None or share is None:
        if limit is not None:
            _warn(
                target,
                f"max_fallback={limit} cannot be checked here: only the device's own runtime tells what it runs where",
            )
        return
    if not placements.fallback:
        return
    ops = ", ".join(f"{entry.count} x {entry.op} ({entry.macs:,} MACs)" for entry in placements.fallback)
    told = f"{share:.1%} of the multiply-accumulates run outside the delegate, as {_TOLD[placements.told_by]}"
    if limit is not None and share > limit:
        raise ExportError(
            f"{target}: {told}, and max_fallback={limit} allows {limit:.1%}: {ops}. Replace these operations by ones "
            "that the delegate has, leave the target out, or allow more."
        )
    if placements.told_by != "the file":  # check_contents has told of these
        _warn(target, f"{told}: {ops}")


def check_share(max_fallback: float | None) -> None:
    """Refuse a share that is none.

    Raises:
        ValueError: If it is not between 0 and 1.
    """
    if max_fallback is not None and not 0 <= max_fallback <= 1:
        raise ValueError(
            f"max_fallback={max_fallback!r} is not allowed; give a share from 0 to 1, or None for no limit"
        )


def float_products(graph: torch.nn.Module) -> list[str]:
    """Name the convolution, linear and matmul operations of a converted graph that a file may compute in float.

    They are those that are not quantized on all sides, and those of two activations: they have no weights, and not
    every target has int8 kernels for them.
    """
    if not isinstance(graph, fx.GraphModule):
        return []
    found: list[str] = []
    for node in graph.graph.nodes:
        name = operation(node)
        if name in _PRODUCTS:
            first = 1 if name in _ADDED_FIRST else 0
            factors = node.args[1] if name == "einsum" else node.args[first : first + 2]
            quantized = all(_is_dequantized(factor) for factor in factors) and _is_quantized(node)
            if not (quantized and _is_weight(graph, name, factors[-1])):
                # Converters split transposed convolutions into one for each group.
                groups = node.args[6] if name.startswith("conv_transpose") and len(node.args) > 6 else 1
                found += [name] * _PRODUCTS[name] * groups
    return found


def _is_weight(graph: fx.GraphModule, name: str, factor: Any) -> bool:
    """Whether a factor is the weight of a layer: a constant, but no stack of matrices, which no layer has."""
    stored = _constant(factor)
    return stored is not None and (name not in _OF_STACKS or attrgetter(str(stored.target))(graph).dim() < 3)


def has_recurrent_layers(graph: torch.nn.Module) -> bool:
    """Whether a converted graph has recurrent layers: float, and as many products as a target makes of each."""
    return isinstance(graph, fx.GraphModule) and any(operation(node) in _RECURRENT for node in graph.graph.nodes)


def _holds_int8_weights(graph: torch.nn.Module, contents: Contents) -> bool:
    """Whether a file holds the weights of all int8 layers of a converted graph as int8, if need be without zeros."""
    assert isinstance(graph, fx.GraphModule)
    weights: dict[str, Tensor] = {}
    for node in graph.graph.nodes:
        stored = _constant(node.args[1]) if operation(node) in _LAYERS else None
        if stored is not None and _is_dequantized(node.args[1]):
            weights[str(stored.target)] = attrgetter(str(stored.target))(graph)
    sparse = contents.sparse_weight_bytes > 0
    held = sum(int(weight.count_nonzero()) if sparse else weight.numel() for weight in weights.values())
    return contents.int8_weight_bytes >= held


def float_layers(graph: torch.nn.Module) -> list[fx.Node]:
    """Find the convolution and linear operations of a converted graph whose weights are float constants."""
    if not isinstance(graph, fx.GraphModule):
        return []
    layers = [node for node in graph.graph.nodes if operation(node) in _LAYERS]
    return [node for node in layers if _is_constant(node.args[1]) and not _is_dequantized(node.args[1])]


def activation_bits(graph: torch.nn.Module) -> set[int]:
    """Give the widths of the quantized activations in a converted graph."""
    if not isinstance(graph, fx.GraphModule):
        return set()
    nodes = [node for node in graph.graph.nodes if operation(node) == "quantize_per_tensor"]
    return {torch.iinfo(node.args[5]).bits for node in nodes}


def _is_dequantized(value: Any) -> bool:
    while isinstance(value, fx.Node):
        name = operation(value)
        if name.startswith("dequantize_"):
            return True
        if name not in VIEWS:
            return False
        value = value.args[0]
    return False


def _is_quantized(node: fx.Node) -> bool:
    """Whether all that reads a value reads it quantized, the activation that a layer ends with included."""
    names = [(reader, operation(reader)) for reader in node.users]
    return bool(names) and all(
        name.startswith("quantize_") or ((name in VIEWS or name in CLIPS) and _is_quantized(reader))
        for reader, name in names
    )


def _is_constant(value: Any) -> bool:
    return _constant(value) is not None


def _constant(value: Any) -> fx.Node | None:
    """The constant that a value is, moved about or converted; ``None`` for one that is computed."""
    while isinstance(value, fx.Node) and value.op != "get_attr":
        name = operation(value)
        if name not in VIEWS and not name.startswith(("quantize_", "dequantize_")):
            return None
        value = value.args[0]
    return value if isinstance(value, fx.Node) else None


def _counted(names: Iterable[str]) -> str:
    counts = names if isinstance(names, dict) else Counter(names)
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in sorted(counts.items())) or "none"


def tell_not_run(artifact: Artifact) -> None:
    """Warn of a file that cannot run here, if it is one: what it computes was not looked at."""
    if artifact.not_run is not None:
        _warn(
            artifact.target,
            f"{artifact.path.name} was written and its contents were checked, but it was NOT run: {artifact.not_run}. "
            "Nothing shows that it computes what the network does",
        )


def tell_uneven(target: str, network: nn.Module, inputs_of: Callable[[nn.Module], int], size: int, then: str) -> None:
    """Warn of the layers whose inputs are no whole number of groups.

    Args:
        target: Name of the target.
        network: A network in the form of a file.
        inputs_of: How many inputs of a layer are divided; 0 where none are.
        size: Inputs in a group.
        then: What becomes of such a layer.
    """
    uneven = [
        f"{name.removeprefix('network.')!r} ({inputs} inputs)"
        for name, module in network.named_modules()
        if (inputs := inputs_of(module)) % size
    ]
    if uneven:
        _warn(target, f"the inputs of {', '.join(uneven)} are no multiple of {size}, and {then}")


def tell_of(target: str, message: str | None) -> None:
    """Warn of something in a file, if there is something."""
    if message:
        _warn(target, message)


def _warn(target: str, message: str) -> None:
    warnings.warn(f"{target}: {message}", ExportWarning, stacklevel=4)
