"""The groups of a network, by running it; parts that cannot be traced are left alone, and the rest is not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs, flatten_outputs
from lightning_edge.pruning.channels import is_known
from lightning_edge.pruning.cost import Positions
from lightning_edge.pruning.dependency import Watch, dependency_graph, groups_of
from lightning_edge.pruning.groups import Group, Reading
from lightning_edge.pruning.opaque import as_wholes, untouched

_MAKERS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class Structure:
    """A network's groups, and what its weights are used for.

    Attributes:
        groups: All groups, those that stay as they are with the reason.
        positions: Where each weight of the traced copy is used.
        inputs: The call that was traced.
    """

    groups: list[Group]
    positions: Positions
    inputs: Inputs


@dataclass(frozen=True)
class _Run:
    """One run of a network under torch-pruning."""

    graph: Any
    watch: Watch
    positions: Positions
    found: list[Any]


def trace(network: nn.Module, inputs: Inputs) -> Structure:
    """Find a network's groups by running it.

    Where torch-pruning cannot trace the network, its smallest modules are found that it cannot trace, and their
    channels and those they are fed stay.

    Args:
        network: A copy in eval mode whose parameters all require gradients; it is left as it is.
        inputs: One call of it.

    Raises:
        CompressionError: If torch-pruning cannot trace it, whatever is left out.
    """
    untraced: dict[str, str] = {}
    try:
        run = _run(network, inputs, untraced)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        untraced = _untraced(network, inputs, reason)
        if not untraced:
            raise CompressionError(
                f"{type(network).__name__} cannot be pruned: torch-pruning cannot trace it ({reason}). Its forward "
                "must run on a batch in eval mode and give tensors that depend on its parameters. Move what cannot be "
                "traced out of the network that is compressed, or leave Prune out."
            ) from error
        run = _run(network, inputs, untraced)
    reading = Reading(network, run.graph, run.watch, untraced)
    return Structure([_by_any_way(reading, channels) for channels in run.found], run.positions, inputs)


def _by_any_way(reading: Reading, channels: Any) -> Group:
    """Read a group with its other ways; by the first of these where its channels cannot go alone."""
    group = reading.group(channels)
    others = [other for way in reading.ways(group, channels) if not (other := reading.group(channels, way)).reason]
    if group.reason and others:
        group = others.pop(0)
    group.others = others
    return group


def _run(network: nn.Module, inputs: Inputs, untraced: Mapping[str, str]) -> _Run:
    positions, watch = Positions(inputs.batch_size), Watch()

    def forward(model: nn.Module, _: Any) -> list[Tensor]:
        with watch, positions.counted(model):
            outputs = flatten_outputs(model(*inputs.args, **inputs.kwargs))
        # An operation behind each output marks it as one: torch-pruning sees no output where a layer comes last.
        return [output * 1 for output in outputs if output.requires_grad]

    graph = dependency_graph(watch)
    parts = [network.get_submodule(name) for name in untraced]
    with warnings.catch_warnings(), as_wholes(network, parts) as opaque:
        warnings.simplefilter("ignore")  # on parameters outside of layers, which are ours to judge
        graph.build_dependency(
            network,
            example_inputs=inputs.args,
            forward_fn=forward,
            unwrapped_parameters=[],
            customized_pruners={kind: untouched() for kind in opaque},
            ignored_layers=[],
            ignored_params=[],
            verbose=False,
        )
        return _Run(graph, watch, positions, groups_of(graph, _MAKERS))


def _untraced(network: nn.Module, inputs: Inputs, reason: str) -> dict[str, str]:
    """Find the smallest modules without which a network can be traced, with the reasons; none where none help."""

    def failure(wholes: Mapping[str, str]) -> str | None:
        try:
            _run(network, inputs, wholes)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    wholes = dict.fromkeys(_parts(network, ""), reason)
    if not wholes or failure(wholes) is not None:
        return {}
    for name in list(wholes):
        _narrow(network, name, wholes, failure)
    return wholes


def _narrow(network: nn.Module, name: str, wholes: dict[str, str], failure: Any) -> None:
    """Take one module apart again, as far as the network can then be traced."""
    reason = wholes.pop(name)
    found = failure(wholes)
    if found is None:
        return
    inner = dict.fromkeys(_parts(network.get_submodule(name), f"{name}."), found)
    if not inner or failure(wholes | inner) is not None:
        wholes[name] = found or reason
        return
    wholes |= inner
    for part in inner:
        _narrow(network, part, wholes, failure)


def _parts(module: nn.Module, prefix: str) -> Iterator[str]:
    """Name the modules that a module calls, but for layers that are known; lists of modules are not called."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _parts(child, f"{prefix}{name}.")
        elif not is_known(child) and any(True for _ in child.parameters()):
            yield f"{prefix}{name}"
