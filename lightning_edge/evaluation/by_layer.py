"""A network layer by layer: the bytes of its weights before and after, and what each layer costs in int8."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lightning_edge.errors import EdgeError, first_line
from lightning_edge.evaluation.original import original_of
from lightning_edge.network import Deployable, Inputs
from lightning_edge.quantization import sensitivity
from lightning_edge.quantization.plan import layer_name
from lightning_edge.reporting.layers import LayerRow

# Enough to tell layers apart.
_SAMPLES = 32
_LONGEST_S = 20.0

# Bytes of a layer, and how its weights are stored.
_Stored = tuple[int, Literal["int8", "float"]]


def layer_rows(
    trained: nn.Module, floats: nn.Module, calls: Sequence[Inputs], int8: Deployable | None
) -> tuple[list[LayerRow], str | None]:
    """Look at every layer with weights, in the order of the network.

    Args:
        trained: The network as it was trained, with its record.
        floats: The float network to compare with, in eval mode on the CPU.
        calls: What it was fed, at least one batch.
        int8: The int8 network to ship, if there is one.

    Returns:
        The layers, and why sensitivities were not measured, if they were not.
    """
    before = _float_bytes(original_of(trained))
    stored: dict[str, _Stored] = {name: (size, "float") for name, size in _float_bytes(floats).items()}
    increases: dict[str, float] = {}
    told: str | None = None
    if int8 is not None:
        stored = _stored_bytes(int8.graph)
        increases, told = _increases(floats, calls)
    # A layer that was factorized is several now, inside the one it was.
    parts: dict[str, list[str]] = {}
    for name in stored:
        if (owner := _owner(name, before)) is not None:
            parts.setdefault(owner, []).append(name)
    rows = []
    for owner in before:
        if owner not in parts:
            continue
        precision: Literal["int8", "float"] = (
            "float" if any(stored[name][1] == "float" for name in parts[owner]) else "int8"
        )
        costs = [increases[name] for name in parts[owner] if name in increases]
        size = sum(stored[name][0] for name in parts[owner])
        rows.append(LayerRow(owner, precision, size, before[owner], sum(costs) if costs else None))
    return rows, told


def _float_bytes(network: nn.Module) -> dict[str, int]:
    """Sum the bytes of the parameters of every layer with weights, a shared layer's once."""
    found: dict[str, int] = {}
    for name, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        # A weight has two dimensions or more; norms and scales have one.
        if not any(parameter.dim() > 1 for parameter in own.values()):
            continue
        if name:
            found[name] = sum(parameter.numel() * 4 for parameter in own.values())
        else:
            found |= {key: parameter.numel() * 4 for key, parameter in own.items() if parameter.dim() > 1}
    return found


def _stored_bytes(network: nn.Module) -> dict[str, _Stored]:
    """Sum the bytes of weights and biases of a converted network by the layer that takes them."""
    assert isinstance(network, GraphModule)
    found: dict[str, _Stored] = {}
    seen: set[str] = set()
    for node in network.graph.nodes:
        if node.op != "call_function" or "quantize" in str(node.target):
            continue
        for source in map(_constant, node.all_input_nodes):
            name = layer_name(node)
            if source is None or not name or str(source.target) in seen:
                continue
            seen.add(str(source.target))
            tensor = _attribute(network, str(source.target))
            if tensor is None:
                continue
            size, precision = found.get(name, (0, "int8"))
            # Biases have one dimension, and are float numbers in torch wherever the weights are int8.
            floating = tensor.dim() > 1 and tensor.is_floating_point()
            found[name] = size + tensor.numel() * tensor.element_size(), "float" if floating else precision
    return found


def _constant(node: Node) -> Node | None:
    """The attribute that an operand is, behind its dequantization."""
    while node.op == "call_function" and "dequantize" in str(node.target):
        node = node.all_input_nodes[0]
    return node if node.op == "get_attr" else None


def _attribute(network: nn.Module, name: str) -> Tensor | None:
    owner, _, last = name.rpartition(".")
    value = getattr(network.get_submodule(owner), last, None)
    return value if isinstance(value, Tensor) else None


def _owner(name: str, names: Mapping[str, int]) -> str | None:
    """The layer that a name is of: itself, or the nearest that holds it."""
    while name and name not in names:
        name = name.rpartition(".")[0]
    return name or None


def _increases(network: nn.Module, calls: Sequence[Inputs]) -> tuple[dict[str, float], str | None]:
    """Measure what each layer costs in int8 alone, where that is quick; else say why not."""
    # A copy: those of a validation loop were made in inference mode, in which nothing can be captured.
    fed = calls[0].sample(size=_SAMPLES).map(Tensor.clone)
    layers = len(_float_bytes(network))
    begun = time.monotonic()
    with torch.no_grad():
        network(*fed.args, **fed.kwargs)
    expected_s = (time.monotonic() - begun) * 2 * layers
    if expected_s > _LONGEST_S:
        return {}, (
            f"What each layer costs in int8 was not measured: it takes about {expected_s:.0f} s here. "
            "lightning_edge.quantization.sensitivity measures it."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to warn of was said when it was quantized
            return {layer.name: layer.increase for layer in sensitivity(network, [fed], [fed]).layers}, None
    except EdgeError as error:
        return {}, f"What each layer costs in int8 could not be measured: {first_line(error)}"
