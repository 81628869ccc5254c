"""What changes in a network before it is exported as the program that torch.onnx converts. Imports no converter."""

from __future__ import annotations

import copy
from typing import Any, final

from torch import nn

from lightning_edge.exporters.passes.base import run_passes
from lightning_edge.exporters.passes.transposed_convolutions import convolve_transposed
from lightning_edge.network import Deployable, Inputs

# On the converted graph of an int8 network, before it is exported.
CAPTURED_PASSES = (
    convolve_transposed,  # ONNX Runtime has no int8 kernel for transposed convolutions
)


def prepared(network: Deployable, scheme: str | None) -> Deployable:
    """Put a network in float16 if that is its scheme; run `CAPTURED_PASSES` on an int8 one."""
    if scheme == "fp16":
        return _in_half(network)
    graph = run_passes(network.graph, CAPTURED_PASSES) if network.precision == "int8" else network.graph
    return network if graph is network.graph else network.with_graph(graph)


@final
class _Halved(nn.Module):
    """A network in float16 that takes and gives float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()
        self.training = network.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network in float16."""
        inputs = Inputs(args, kwargs).map(lambda tensor: tensor.half() if tensor.is_floating_point() else tensor)
        outputs = self.network(*inputs.args, **inputs.kwargs)
        return Inputs((outputs,)).map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor).args[0]


def _in_half(network: Deployable) -> Deployable:
    graph = _Halved(copy.deepcopy(network.graph))
    return Deployable(graph, network.inputs, network.precision, interface=network.interface)
