"""A captured graph without writes into tensors and without gradient modes. Knows torch only.

Quantizers are put between operations, so that a value which is overwritten behind their back would be trained with one
content and run with another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lightning_edge.errors import CompressionError

aten = torch.ops.aten


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


def inline_gradient_modes(graph: GraphModule) -> None:
    """Write what forward() computes under ``torch.no_grad()`` into the graph, with its results detached."""
    wrapped = torch.ops.higher_order.wrap_with_set_grad_enabled
    while found := [node for node in graph.graph.nodes if node.target is wrapped]:
        for node in found:
            _inline(graph, node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()


def _inline(graph: GraphModule, node: Node) -> None:
    enabled, body, *operands = node.args
    assert isinstance(body, Node)
    inner = getattr(graph, str(body.target)).graph
    values = dict(zip((n for n in inner.nodes if n.op == "placeholder"), operands, strict=True))
    with graph.graph.inserting_before(node):
        results: Any = graph.graph.graph_copy(inner, values)
        for reader in list(node.users):
            result = results[reader.args[1]]
            value = result.meta.get("val")
            if not enabled and isinstance(value, Tensor):
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
