"""A captured graph without writes into tensors and without gradient modes. Knows torch only.

Quantizers are put between operations, so that a value which is overwritten behind their back would be trained with one
content and run with another.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lightning_edge.errors import CompressionError
from lightning_edge.quantization.capture.nodes import LIFTED, constant

aten = torch.ops.aten

# (enabled, body, *operands) and (device_type, dtype, enabled, cache_enabled, body, *operands).
_WITH_GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
_WITH_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def functional(target: Any) -> Any:
    """The operation that returns what an in-place one (``relu_``) writes; any other target as it is."""
    if not isinstance(target, torch._ops.OpOverload):
        return target
    name = target._schema.name.split("::")[1]
    if not name.endswith("_") or name.endswith("__") or target.namespace != "aten":
        return target
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, target._overloadname, target) if packet is not None else target


def make_functional(graph: GraphModule, network: str) -> None:
    """Replace in-place operations by those that return what they wrote.

    Args:
        graph: Changed in place.
        network: Class of the network, for the message.

    Raises:
        CompressionError: If a write is seen through another tensor (a view) or lands in a buffer.
    """
    _compute_written(graph)
    position = {node: index for index, node in enumerate(graph.graph.nodes)}
    # An in-place operation returns the tensor that it wrote: both names mean one tensor.
    same: dict[Node, Node] = {}
    for node in list(graph.graph.nodes):
        if not _writes(node):
            continue
        written = node.args[0]
        tensor = same[node] = same.get(written, written)
        if tensor.op == "get_attr":
            raise CompressionError(
                f"{network} writes into its buffer {tensor.target!r} in forward() ({node.target}), which a quantized "
                "graph cannot do. Update it in training_step, outside the network."
            )
        for other in position:
            if (
                position[other] < position[node]
                and same.get(other, other) is not tensor
                and _storage(other) is not None
                and _storage(other) == _storage(tensor)
                and any(position[reader] > position[node] for reader in other.users)
            ):
                raise CompressionError(
                    f"{network} writes in place ({node.target}) into a tensor that is read through another view "
                    f"({other.name}) afterwards, as y[:, :4] = ... or y.view(...).relu_() do. A quantized graph has no "
                    "shared memory: build the result with torch.cat, torch.where or operations out of place."
                )
        node.target = functional(node.target)
        for reader in list(written.users):
            if position[reader] > position[node]:
                reader.replace_input_with(written, node)


def _compute_written(graph: GraphModule) -> None:
    """Compute what forward() makes of numbers alone and writes into, as tables of relative positions (BEiT).

    Through whatever views that goes, what others read of it is the same at every call.
    """
    known = _made_of_numbers(graph)
    written = {_storage(node) for node in known if _writes(node)} - {None}
    if not written:
        return
    values: dict[Node, Any] = {}
    read: dict[Node, Node] = {}
    depends: set[Node] = set()  # on what is written into, or has been
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and node in known:
            values[node] = getattr(graph, str(node.target)).clone()
            depends.update({node} if _storage(node) in written else ())
            continue
        if node in known:
            if _storage(node) in written or not depends.isdisjoint(node.all_input_nodes):
                depends.add(node)
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            if _writes(node):
                read.clear()  # those who read from here on see something else
            continue
        for source in node.all_input_nodes:
            if source in depends:
                if source not in read:
                    value = source.meta["val"]
                    name = f"written_in_{source.name}_for_{node.name}"
                    with graph.graph.inserting_before(node):
                        read[source] = constant(graph, name, values[source].clone(), value)
                node.replace_input_with(source, read[source])
    for node in reversed(known):
        if not node.users:
            graph.graph.erase_node(node)


def _made_of_numbers(graph: GraphModule) -> dict[Node, None]:
    """Find the operations that are fed neither inputs nor parameters nor buffers, in their order."""
    tainted: set[int | None] = set()
    while True:
        known: dict[Node, None] = {}
        before = len(tainted)
        for node in graph.graph.nodes:
            if node.op == "get_attr" and str(node.target).startswith(LIFTED) and _storage(node) not in tainted:
                known[node] = None
            if node.op != "call_function":
                continue
            sources = node.all_input_nodes
            if _is_plain(node.target) and all(source in known for source in sources) and _storage(node) not in tainted:
                known[node] = None
            elif _writes(node):
                tainted.add(_storage(sources[0]))
        if len(tainted) == before:
            return known


def _is_plain(operation: Any) -> bool:
    """Whether an operation of ATen gives the same each time, or one that picks of several results."""
    if operation is operator.getitem:
        return True
    aten_operation = isinstance(operation, torch._ops.OpOverload) and operation.namespace == "aten"
    return aten_operation and torch.Tag.nondeterministic_seeded not in operation.tags


def inline_modes(graph: GraphModule) -> None:
    """Write into the graph what forward() computes under ``torch.no_grad()`` or within ``torch.autocast``.

    Results of the first are detached.
    """
    while found := [node for node in graph.graph.nodes if node.target in (_WITH_GRADIENTS, _WITH_AUTOCAST)]:
        for node in found:
            _inline(graph, node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()


def _inline(graph: GraphModule, node: Node) -> None:
    given = list(node.args)
    at = next(position for position, arg in enumerate(given) if isinstance(arg, Node))
    body, *operands = given[at:]
    detached = node.target is _WITH_GRADIENTS and not given[0]
    assert isinstance(body, Node)
    inner = getattr(graph, str(body.target)).graph
    values = dict(zip((n for n in inner.nodes if n.op == "placeholder"), operands, strict=True))
    with graph.graph.inserting_before(node):
        results: Any = graph.graph.graph_copy(inner, values)
        for reader in list(node.users):
            result = results[reader.args[1]]
            value = result.meta.get("val")
            if detached and isinstance(value, Tensor):
                result = graph.graph.call_function(aten.detach.default, (result,))
                result.meta["val"] = value
            reader.replace_all_uses_with(result)
            graph.graph.erase_node(reader)
    graph.graph.erase_node(node)


def _writes(node: Node) -> bool:
    return node.op == "call_function" and functional(node.target) is not node.target and isinstance(node.args[0], Node)


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return int(value.untyped_storage()._cdata) if isinstance(value, Tensor) else None
