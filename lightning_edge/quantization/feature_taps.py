"""Read the outputs of the user's layers inside a quantized graph, where those layers are no longer called.

A tap is a branch without a reader: it changes no value, is not in the state_dict, stays silent in copies, and what
converts a copy of the graph removes it as dead code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lightning_edge.errors import CompressionError
from lightning_edge.quantization.capture.nodes import SCALED
from lightning_edge.quantization.network import QuantizedForward
from lightning_edge.quantization.train.layers import GraphDropout, LiveBatchNorm

aten = torch.ops.aten

# Takes a layer's name and its output.
Sink = Callable[[str, Tensor], None]

_PREFIX = "edge_tap_"


class Tap(nn.Module):
    """Gives what passes by to a sink.

    Args:
        name: Name of the layer whose output this is.
        sink: Who takes it; ``None``: nobody.
        batch_norm: The BatchNorm behind the layer whose statistics may still learn, if there is one.
        scaled: (factor, shift) that `decompose` gave the layer's weights, to be taken off again.
    """

    def __init__(
        self,
        name: str,
        sink: Sink | None,
        batch_norm: LiveBatchNorm | None = None,
        scaled: tuple[float, float] = (1.0, 0.0),
    ) -> None:
        super().__init__()
        self.name = name
        self.sink = sink
        self._scaled = scaled
        # A tuple, so that it is read and not owned: it is a module of the graph already.
        self._batch_norm = (batch_norm,)

    def forward(self, y: Tensor, *parts: Any) -> Tensor:
        """Give ``y`` to the sink.

        Args:
            y: Output of the layer; where a BatchNorm is in its weights, of the two together.
            parts: What takes such a BatchNorm off again, if the layer's own output is wanted: its scale, gamma /
                sqrt(variance + eps); the bias that came with it; the bias that the layer had before; and the output
                before that bias, where the statistics may still learn.
        """
        if self.sink is not None:
            self.sink(self.name, self._without_batch_norm(y, *parts) if parts else self._unscaled(y))
        return y

    def _unscaled(self, y: Tensor) -> Tensor:
        factor, shift = self._scaled
        return y if (factor, shift) == (1.0, 0.0) else (y - shift) / factor

    def _without_batch_norm(
        self, y: Tensor, scale: Tensor, bias: Tensor, before: Tensor | None, unbiased: Tensor | None = None
    ) -> Tensor:
        shape = [1, -1] + [1] * (y.dim() - 2)
        (batch_norm,) = self._batch_norm
        # While statistics learn, y is normalized by the batch, which cannot be taken off.
        if unbiased is None or batch_norm is None or not batch_norm.learns:
            unbiased = y - bias.view(shape)
        # A channel whose gamma is zero has no scale to divide by; its output is lost.
        y = unbiased / torch.where(scale == 0, 1.0, scale).view(shape)
        return y if before is None else y + before.view(shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        """Copy without the sink: who listens to a network does not listen to its copies."""
        return Tap(self.name, None)


def add_taps(child: QuantizedForward, names: Sequence[str], sink: Sink) -> None:
    """Give the output of each named layer to ``sink`` whenever the quantized network runs.

    The output is that of the int8 network: behind the layer's fake-quantizer where it has one, with gradients, and for
    a layer called several times each of its calls in order. A convolution whose BatchNorm is in its weights gives the
    value before that BatchNorm, as it does in float.

    Args:
        child: What was attached to the network.
        names: Names of submodules in the network.
        sink: Called with a name and an output, inside the network's call.

    Raises:
        CompressionError: If a name is none of the network's, or nothing of that submodule is in the graph.
    """
    graph: GraphModule = child._graph  # type: ignore[assignment]
    outputs = _Outputs(child._network, graph)  # type: ignore[arg-type]
    found = [(name, arguments) for name in names for arguments in outputs.of(name)]
    for index, (name, arguments) in enumerate(found):
        norm = outputs.module(arguments[0]) if len(arguments) > 1 else None
        tap = Tap(name, sink, norm if isinstance(norm, LiveBatchNorm) else None, outputs.scaled(arguments))
        graph.add_module(f"{_PREFIX}{index}", tap)
        last = max((a for a in arguments if a is not None), key=outputs.order.__getitem__)
        with graph.graph.inserting_after(last):
            graph.graph.call_module(f"{_PREFIX}{index}", tuple(arguments))
    graph.graph.lint()
    graph.recompile()


def remove_taps(child: QuantizedForward) -> None:
    """Leave the graph as it was before `add_taps`."""
    graph: GraphModule = child._graph  # type: ignore[assignment]
    taps = [node for node in graph.graph.nodes if node.op == "call_module" and str(node.target).startswith(_PREFIX)]
    for node in taps:
        graph.graph.erase_node(node)
        delattr(graph, str(node.target))
    if taps:
        graph.recompile()


class _Outputs:
    """Finds the nodes that hold the outputs of a network's layers."""

    def __init__(self, network: nn.Module, graph: GraphModule) -> None:
        self.network = network
        self.graph = graph
        self.order = {node: index for index, node in enumerate(graph.graph.nodes)}
        # By layer, then by call: the last node computed in it.
        self.last: dict[str, dict[str, Node]] = {}
        self.norms = dict(self._folded_batch_norms())
        # A folded BatchNorm has no node of its own; to what contains it, its layer's node is its node.
        owners: dict[Node, list[str]] = {}
        for layer, (name, _) in self.norms.items():
            owners.setdefault(layer, []).append(name)
        for node in graph.graph.nodes:
            for key, path in (node.meta.get("nn_module_stack") or {}).items():
                self.last.setdefault(path[0], {})[str(key)] = node
            added = self.module(node)
            names = [added.owner] if isinstance(added, GraphDropout | LiveBatchNorm) else owners.get(node, [])
            for name in filter(None, names):
                self._belongs(node, name)

    def of(self, name: str) -> Iterator[list[Node | None]]:
        """Give the arguments of a `Tap` for each call of a layer."""
        names = self._names(name)
        last = next((self.last[other] for other in names if other in self.last), None)
        if last is None:
            there = sorted(path for path in self.last if path)
            raise CompressionError(
                f"layer {name!r} computes nothing in the quantized graph of {type(self.network).__name__}, so that its "
                f"output cannot be found there. Name a layer that does: {', '.join(map(repr, there))}."
            )
        for node in sorted(last.values(), key=self.order.__getitem__):
            norm, parts = self.norms.get(node, ("", []))
            if norm and not any(norm == other or norm.startswith(f"{other}.") for other in names):
                yield parts
            else:
                yield [self._passed_on(node, names)]

    def scaled(self, arguments: list[Node | None]) -> tuple[float, float]:
        """What the weights of the layer that a tap reads were scaled by, if the tap reads it behind its BatchNorm."""
        node = arguments[0] if len(arguments) == 1 else None
        while node is not None and node.op == "call_module":  # its fake-quantizer, dropout or live BatchNorm
            node = cast(Node, node.args[0])
        # A layer with ReLU or the like behind it is not scaled, and of a clip the output is the user's own.
        factor, shift = node.meta.get(SCALED, (1.0, 0.0)) if node is not None else (1.0, 0.0)
        return factor, shift

    def _names(self, name: str) -> list[str]:
        """Every name of the same submodule."""
        named = dict(self.network.named_modules(remove_duplicate=False))
        if not name or name not in named:
            raise CompressionError(
                f"{type(self.network).__name__} has no layer {name!r}; it has: "
                f"{', '.join(repr(other) for other in named if other and not other.startswith('edge_'))}."
            )
        return [other for other, module in named.items() if module is named[name]]

    def _belongs(self, node: Node, name: str) -> None:
        # Nodes come in the order of the graph, so that a container's latest call is the one that this node is part of.
        parts = name.split(".")
        for size in range(1, len(parts) + 1):
            calls = self.last.setdefault(".".join(parts[:size]), {})
            calls[next(reversed(calls), "")] = node

    def _passed_on(self, node: Node, names: list[str]) -> Node:
        """The value that the layer's readers have: behind its fake-quantizer, and behind a dropout inside the layer."""
        while True:
            for reader in sorted(node.users, key=self.order.__getitem__):
                module = self.module(reader)
                inside = isinstance(module, GraphDropout) and any(
                    module.owner == name or module.owner.startswith(f"{name}.") for name in names
                )
                if reader.args[0] is node and (inside or hasattr(module, "observing")):
                    node = reader
                    break
            else:
                return node

    def _folded_batch_norms(self) -> Iterator[tuple[Node, tuple[str, list[Node | None]]]]:
        """Each layer with a BatchNorm in its weights: the BatchNorm's name, and the arguments of a `Tap` before it.

        Read off the expression that `capture` writes: (bias - mean) * scale + beta.
        """
        for node in self.graph.graph.nodes:
            if node.op != "get_attr" or not str(node.target).endswith(".running_mean"):
                continue
            name = str(node.target).rpartition(".")[0]
            live = [reader for reader in node.users if isinstance(self.module(reader), LiveBatchNorm)]
            for norm in live:
                layer, scale, bias, before = norm.args[:4]
                yield cast(Node, layer), (name, cast(list[Node | None], [norm, scale, bias, before, layer]))
            for centered in node.users:
                if live or centered.target not in (aten.neg.default, aten.sub.Tensor):
                    continue
                product = next(iter(centered.users))
                before = centered.args[0] if centered.target is aten.sub.Tensor else None
                for layer in _readers_of_bias(product):
                    yield layer, (name, cast(list[Node | None], [layer, product.args[1], layer.args[2], before]))

    def module(self, node: Node | None) -> nn.Module | None:
        return self.graph.get_submodule(str(node.target)) if node and node.op == "call_module" else None


def _readers_of_bias(node: Node) -> Iterator[Node]:
    """The layers that a computed bias ends in."""
    for reader in node.users:
        if len(reader.args) > 2 and reader.op == "call_function" and reader.args[2] is node:
            yield reader
        elif reader.op == "call_module" or reader.target is aten.add.Tensor:
            yield from _readers_of_bias(reader)
