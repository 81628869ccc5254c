"""Convert a network into an ONNX model by torch.onnx, and write the model in the one form of every file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Literal

import onnx
import onnx.inliner
import onnx_ir as ir
import torch

from lightning_edge.exporters.onnx.passes import rewrite
from lightning_edge.exporters.onnx.passes.runtime_bugs import padded_maxima
from lightning_edge.exporters.onnx.schemes import store_in_int8
from lightning_edge.exporters.onnx.tidy import name_ends, tidy
from lightning_edge.exporters.passes.activations import write_out_log_sigmoid
from lightning_edge.exporters.passes.trim_kernels import trim_kernels
from lightning_edge.exporters.program import program_after
from lightning_edge.network import Deployable

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
    model = _model_of(network)
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
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            program_after(network, PROGRAM_PASSES), dynamo=True, opset_version=_OPSET, verbose=False
        )
    assert program is not None
    model = onnx.inliner.inline_local_functions(program.model_proto)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


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
