"""Views and slices of any number of samples for XNNPACK, which takes a size of 0 for what is there.

ExecuTorch's lowering leaves both outside the delegate, each in its own kernel, where the first dimension is free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from lightning_edge.errors import require

SLICE = "slice_copy.Tensor"
_VIEW = "aten.view_copy.default"
_CHANNELS_LAST = (0, 2, 3, 1)


def infer_free_dimensions(module: fx.GraphModule) -> PassResult:
    """Have a view find its only free dimension itself, from the number of values; in place."""
    for node in module.graph.nodes:
        if _VIEW not in str(node.target):
            continue
        sizes = [size or -1 for size in _sizes(node)]
        if sizes.count(-1) == 1:
            node.args = (node.args[0], sizes)
    module.graph.eliminate_dead_code()
    module.recompile()
    return PassResult(module, True)


def of_any_batch(configuration: Any) -> Any:
    """Give the partitioner's configuration of slices with those that leave the free dimension whole."""

    def check_constraints(self: Any, node: fx.Node, program: Any) -> bool:
        if _sizes(node).count(0) != 1 or _sizes(node.args[0])[_dimension(node)] == 0 or _step(node) != 1:
            return bool(configuration.check_constraints(self, node, program))
        return bool(self.check_common_constraints(node, program))

    return type(configuration.__name__, (configuration,), {"check_constraints": check_constraints})


@contextmanager
def slices_of_any_batch() -> Iterator[None]:
    """Have slices written with the free dimension as what is there, while the context lasts."""
    visitors = require("executorch.backends.xnnpack.operators.node_visitor", "executorch")._node_visitor_dict
    name = f"aten.{SLICE}"
    before = visitors[name]

    def define_node(self: Any, node: fx.Node, graph: Any, *given: Any) -> None:
        before.define_node(self, node, graph, *given)
        sizes = _sizes(node)
        if 0 in sizes:
            in_order = [sizes[place] for place in _CHANNELS_LAST] if "XNN_NHWC_NODE" in node.meta else sizes
            graph.xnodes[-1].xnode_union.sizes = in_order

    visitors[name] = type(before.__name__, (before,), {"define_node": define_node})
    try:
        yield
    finally:
        visitors[name] = before


def _sizes(node: Any) -> list[int]:
    """The shape of what a node gives, with 0 for a dimension that is free."""
    return [size if isinstance(size, int) else 0 for size in node.meta["val"].shape]


def _dimension(node: fx.Node) -> int:
    return int(str(node.args[1])) if len(node.args) > 1 else 0


def _step(node: fx.Node) -> int:
    return int(str(node.args[4])) if len(node.args) > 4 else 1
