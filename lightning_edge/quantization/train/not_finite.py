"""Find the layer whose values are not finite, once a quantizer has refused them."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from lightning_edge.quantization.plan import layer_name
from lightning_edge.quantization.train.ranges import LARGEST_RANGE


def explain_not_finite(graph: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Say which operation of a prepared graph is the first to give values without an int8 range.

    Args:
        graph: The prepared graph, its attributes those of the network.
        args: One call's positional arguments, in the graph's order.
        kwargs: Its keyword arguments.

    Returns:
        One sentence with the layer and the ``skip`` that keeps it in float; empty if every value is finite.
    """
    finder = _Finder(graph)
    try:
        with torch.no_grad():
            finder.run(*pytree.arg_tree_leaves(*args, **kwargs))
    except _FoundError as found:
        node = found.node
        name = layer_name(node)
        operation = str(node.target).removeprefix("aten.").split(".")[0]
        if node.op == "placeholder":
            return f"The network's input {node.name!r} holds it."
        if not name:
            return f"It comes from {operation!r} in forward(), outside any submodule."
        return f"It comes from {operation!r} in {name!r}; skip=[{name!r}] keeps that layer in float."
    return ""


class _FoundError(Exception):
    def __init__(self, node: Node) -> None:
        super().__init__(node.name)
        self.node = node


@final
class _Finder(Interpreter):
    """Runs a prepared graph with its ranges standing still, and stops at the first value that has no range."""

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point() and result.numel() and n.op != "get_attr":
            smallest, largest = torch.aminmax(result.detach())
            if not bool(largest - smallest < LARGEST_RANGE):
                raise _FoundError(n)
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module of the graph; a quantizer rounds and does not observe."""
        module: Any = self.fetch_attr(str(target))
        if not hasattr(module, "observing"):
            return super().call_module(target, args, kwargs)
        before, module.training = module.training, False
        try:
            return super().call_module(target, args, kwargs)
        finally:
            module.training = before
