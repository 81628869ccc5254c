"""What a pass is, and what runs passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

from torch import fx, nn

from lightning_edge.exporters.passes.graph import graphs_in
from lightning_edge.surgery import copy_of

# Changes a graph in place and returns whether it did. A pass edits nodes and nothing else: it removes no dead nodes,
# and it does not recompile.
Pass = Callable[[fx.GraphModule], bool]


def each_node(rewrite: Callable[[fx.GraphModule, fx.Node], bool]) -> Pass:
    """Make a pass of a function that rewrites one node of a graph and returns whether it did."""

    @wraps(rewrite)
    def apply(graph: fx.GraphModule) -> bool:
        return any([rewrite(graph, node) for node in list(graph.graph.nodes)])

    return apply


def apply_passes(graph: fx.GraphModule, passes: Sequence[Pass]) -> bool:
    """Run passes in order over one graph, in place.

    Dead nodes are removed, and the graph is checked and recompiled, behind each pass that changed it.

    Args:
        graph: The graph, of no user: a copy, or one that was just exported.
        passes: The passes, first to last.

    Returns:
        Whether any pass changed the graph.
    """
    changed = False
    for apply in passes:
        if apply(graph):
            graph.graph.eliminate_dead_code()
            graph.graph.lint()
            graph.recompile()
            changed = True
    return changed


def run_passes(network: nn.Module, passes: Sequence[Pass]) -> nn.Module:
    """Run passes in order over every captured graph of a network.

    Args:
        network: A module that is a graph or holds graphs; it stays as it is.
        passes: The passes, first to last.

    Returns:
        A copy with the passes applied; ``network`` itself if it holds no graph or no pass changed one.
    """
    if not graphs_in(network):
        return network
    copied = copy_of(network)
    changed = [apply_passes(graph, passes) for graph in graphs_in(copied)]
    return copied if any(changed) else network
