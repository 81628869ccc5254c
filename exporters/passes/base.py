"""What a pass is, and the one function that runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx, nn

from lightning_edge.exporters.passes.graph import graphs_in
from lightning_edge.surgery import copy_of

# Changes a graph in place and returns whether it did.
Pass = Callable[[fx.GraphModule], bool]


def run_passes(network: nn.Module, passes: Sequence[Pass]) -> nn.Module:
    """Run passes in order over every captured graph of a network.

    A pass edits nodes and nothing else: this function alone copies the network, removes dead nodes, checks the graph
    and recompiles it.

    Args:
        network: A module that is a graph or holds graphs; it stays as it is.
        passes: The passes, first to last.

    Returns:
        A copy with the passes applied; ``network`` itself if it holds no graph or no pass changed one.
    """
    if not graphs_in(network):
        return network
    copied, changed = copy_of(network), False
    for graph in graphs_in(copied):
        for apply in passes:
            if apply(graph):
                changed = True
                graph.graph.eliminate_dead_code()
                graph.graph.lint()
                graph.recompile()
    return copied if changed else network
