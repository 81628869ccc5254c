"""Convert a network into an ONNX model by torch.onnx, and write the model in the one form of every file."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any, Literal, final

import onnx
import onnx.inliner
import onnx_ir as ir
import torch
from torch import nn

from lightning_edge.exporters.onnx.passes import rewrite
from lightning_edge.exporters.onnx.passes.runtime_bugs import padded_maxima
from lightning_edge.exporters.onnx.schemes import store_in_int8
from lightning_edge.exporters.onnx.tidy import name_ends, tidy
from lightning_edge.exporters.passes.activations import write_out_log_sigmoid
from lightning_edge.exporters.passes.base import run_passes
from lightning_edge.exporters.passes.transposed_convolutions import convolve_transposed
from lightning_edge.exporters.passes.trim_kernels import trim_kernels
from lightning_edge.exporters.program import program_after
from lightning_edge.network import Deployable, Inputs

# On the converted graph of an int8 network, before it is exported.
CAPTURED_PASSES = (
    convolve_transposed,  # ONNX Runtime has no int8 kernel for transposed convolutions
)
# On the exported program, before it is converted.
PROGRAM_PASSES = (
    trim_kernels,  # weights that only meet padding are left out
    write_out_log_sigmoid,  # torch.onnx writes one that is -inf where it is not
)

# The oldest that torch.onnx writes without converting down from another one.
_OPSET = 20


def convert(
    network: Deployable,
    scheme: Literal["fp16", "int8_weight_only", "int8_dynamic"] | None,
    weights: Literal["int8", "uint8"],
) -> bytes:
    """Give the bytes of an ``.onnx`` file.

    Args:
        network: The network; its sample gives the shapes.
        scheme: How a float network's weights are stored.
        weights: Type of an int8 network's weights.

    Raises:
        ExportError: If the scheme finds no layer.
    """
    model = _model_of(_in_half(network) if scheme == "fp16" else network)
    name_ends(model.graph, network.output_names(), network.interface.inputs)
    if network.precision == "int8":
        rewrite(model, unsigned_last=weights == "uint8")
    elif scheme is not None and scheme != "fp16":
        store_in_int8(model.graph, scheme)
    padded_maxima(model.graph)
    tidy(model)
    model.metadata_props.update(network.interface.notes())
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def _model_of(network: Deployable) -> ir.Model:
    """Convert a network; the shapes of the model's values are inferred."""
    if network.precision == "int8":
        network = network.with_graph(run_passes(network.graph, CAPTURED_PASSES))
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            program_after(network, PROGRAM_PASSES), dynamo=True, opset_version=_OPSET, verbose=False
        )
    assert program is not None
    model = onnx.inliner.inline_local_functions(program.model_proto)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter from telling which optional packages it does without, and what it deprecates of itself."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(before)
