"""Constants laid out in the order of their dimensions."""

from __future__ import annotations

from torch import Tensor, fx, nn


def lay_out_constants(graph: fx.GraphModule) -> bool:
    """Store every constant contiguously.

    Given: a constant whose strides are those of another layout, as a folded position embedding has where a convolution
    over channels made it.
    Result: the same values, contiguous.
    Why: what computes with such a constant inherits its layout, and ExecuTorch's own kernels refuse two layouts in one
    operation: ``repeat`` ends the run with error 0x12.
    """
    changed = False
    for node in graph.graph.find_nodes(op="get_attr"):
        *path, name = str(node.target).split(".")
        owner = graph.get_submodule(".".join(path))
        value = getattr(owner, name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.is_contiguous():
            setattr(owner, name, value.contiguous())
            changed = True
    return changed
