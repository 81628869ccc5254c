"""Convert a network by LiteRT's converter, and rewrite the file: the passes before and after, in their order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any, Literal

import torch
from torch import fx, nn

from lightning_edge.errors import ExportError, require
from lightning_edge.exporters.passes.activations import write_out_log_sigmoid
from lightning_edge.exporters.passes.base import apply_passes
from lightning_edge.exporters.passes.float_barriers import separate_float_layers
from lightning_edge.exporters.passes.fold_constants import fold_constants
from lightning_edge.exporters.passes.resizes import pick_nearest
from lightning_edge.exporters.passes.transposed_convolutions import convolve_transposed
from lightning_edge.exporters.passes.trim_kernels import trim_kernels
from lightning_edge.exporters.target import explain
from lightning_edge.exporters.tflite.graph import pack, parse
from lightning_edge.exporters.tflite.metadata import add_metadata, with_labels
from lightning_edge.exporters.tflite.passes.broadcasts import drop_expansions
from lightning_edge.exporters.tflite.passes.choices import choose_by_where
from lightning_edge.exporters.tflite.passes.crops import crop_transposed, has_no_kernel
from lightning_edge.exporters.tflite.passes.ends import float_ends, name_ends
from lightning_edge.exporters.tflite.passes.float_kernels import use_float_kernels
from lightning_edge.exporters.tflite.passes.int8_layers import quantize_layers
from lightning_edge.exporters.tflite.passes.reshapes import reshape_results
from lightning_edge.exporters.tflite.passes.simplify import simplify
from lightning_edge.exporters.tflite.passes.sorts import sort_by_top_k
from lightning_edge.exporters.tflite.passes.storage import share_empty_buffers, shorten_names, widen_biases
from lightning_edge.exporters.tflite.passes.unfold_weights import unfold_weights
from lightning_edge.network import Deployable, Inputs
from lightning_edge.plain_calls import PlainCalls

EXTRA = "tflite"

Io = Literal["int8", "float"]
Scheme = Literal["fp16", "int8_weight_only", "int4_weight_only", "int8_dynamic", "int4_dynamic"]

# On the converted graph, before it is exported: the export finds the shapes of what is new.
CAPTURED_PASSES = (
    partial(convolve_transposed, wanted=has_no_kernel),  # LiteRT has int8 kernels for some of them only
)
# On the exported program, in this order.
PASSES = (
    trim_kernels,  # weights that only meet padding are left out; first, while they are stored as they were trained
    unfold_weights,  # before all that moves quantized constants about
    write_out_log_sigmoid,  # the converter mixes up the axes of the minimum that it writes
    choose_by_where,  # it also mixes up those of where() with operands of fewer dimensions; gives views of constants
    pick_nearest,  # LiteRT rounds the rows of a resize otherwise than torch
    sort_by_top_k,  # LiteRT has no other sort
    fold_constants,  # later passes look at shapes that constants give
    crop_transposed,  # LiteRT crops as SAME only
    drop_expansions,  # the converter mixes up the axes of expand and repeat
    reshape_results,  # the converter would do it, with the wrong scale
    separate_float_layers,  # last: a barrier hides what a layer is fed
)

# What the converter reads from the environment only, some of it once, when it is imported: whether it prints progress
# and notes, and the note that oneDNN is on, which converting has no use for.
_QUIET = {"LITERT_TORCH_SHOW_PROGRESS": "n", "TF_CPP_MIN_LOG_LEVEL": "1", "TF_ENABLE_ONEDNN_OPTS": "0"}


def convert(network: Deployable, scheme: Scheme | None, io: Io, *, integer_only: bool) -> bytes:
    """Give the bytes of a ``.tflite`` file.

    Args:
        network: The network; its sample gives the shapes.
        scheme: How a float network's weights are stored.
        io: Type of the file's inputs and outputs.
        integer_only: Whether all operations of an int8 network are on integers.

    Raises:
        ExportError: If LiteRT refuses the network.
    """
    converted = _converted(network)
    model = parse(converted if scheme is None else _in_scheme(converted, scheme))
    _check_order(model, network.inputs)
    is_int8, interface = network.precision == "int8", network.interface
    # Passes on the file, in this order, each with what it is for.
    for is_wanted, apply in (
        (is_int8, partial(quantize_layers, network=network)),  # first: it looks for what the converter left in float
        (True, simplify),  # transposes, paddings and casts that compute nothing
        (is_int8 and not integer_only, use_float_kernels),  # what LiteRT's delegate has in float only
        (True, widen_biases),  # 16x8 kernels read biases of 64 bits
        (True, shorten_names),  # the converter writes module paths
        (io == "float", float_ends),  # quantizers at inputs and outputs
        (True, partial(name_ends, inputs=interface.inputs, outputs=interface.outputs)),  # float ones are there now
        (True, partial(add_metadata, interface=interface)),  # how apps prepare images
        (True, share_empty_buffers),  # last: numbers the buffers anew
    ):
        if is_wanted:
            apply(model)
    return with_labels(pack(model), interface.labels)


def _converted(network: Deployable) -> bytes:
    with _quiet():
        litert_torch = require("litert_torch", EXTRA)
        quantize = require("litert_torch.quantize.quant_config", EXTRA)
        quantizer = require("litert_torch.quantize.pt2e_quantizer", EXTRA)
    inputs, config = network.inputs, None
    try:
        graph = _apply_passes(network)
        if network.precision == "int8":
            # The converter needs the config only to know that the graph is quantized.
            scheme = quantizer.get_symmetric_quantization_config(is_per_channel=True)
            config = quantize.QuantConfig(pt2e_quantizer=quantizer.PT2EQuantizer().set_global(scheme))
        with torch.no_grad(), _quiet(), PlainCalls():
            converted = litert_torch.convert(graph, inputs.args, dict(inputs.kwargs) or None, quant_config=config)
            return bytes(converted.model_content())
    except ExportError:
        raise
    except Exception as error:
        raise explain("tflite", error, "LiteRT") from error


def _apply_passes(network: Deployable) -> nn.Module:
    """Return what the converter is given: the exported program with `PASSES` applied."""
    exported = network.program().module()
    assert isinstance(exported, fx.GraphModule)
    return exported if apply_passes(exported, PASSES) else network.graph


def _in_scheme(model: bytes, scheme: Scheme) -> bytes:
    """Rewrite a float file's weights with ai-edge-quantizer; whole channels share a scale."""
    quantizer = require("ai_edge_quantizer.quantizer", EXTRA)
    types = require("ai_edge_quantizer.qtyping", EXTRA)
    every = types.TFLOperationName.ALL_SUPPORTED
    try:
        work = quantizer.Quantizer(bytearray(model))
        if scheme == "fp16":
            half = types.TensorQuantizationConfig(num_bits=16, dtype=types.TensorDataType.FLOAT)
            config = types.OpQuantizationConfig(weight_tensor_config=half, explicit_dequantize=True)
            work.update_quantization_recipe(".*", every, config, algorithm_key="float_casting")
        else:
            bits = 4 if scheme.startswith("int4") else 8
            add = work.add_dynamic_config if scheme.endswith("dynamic") else work.add_weight_only_config
            add(regex=".*", operation_name=every, num_bits=bits)
            if scheme != "int8_weight_only":
                # LiteRT's delegate has no depthwise kernel that finds ranges as it runs, nor one for 4 bits.
                depthwise = types.TFLOperationName.DEPTHWISE_CONV_2D
                work.add_weight_only_config(regex=".*", operation_name=depthwise, num_bits=8)
        with redirect_stdout(StringIO()):  # it prints sizes and times
            return bytes(work.quantize().quantized_model)
    except Exception as error:
        raise explain("tflite", error, "LiteRT", "Export without scheme=..., or choose another scheme.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter from printing notes and its progress; what the user has set in the environment stays."""
    ours = {name: value for name, value in _QUIET.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _check_order(model: Any, inputs: Inputs) -> None:
    """Make sure that the file takes its inputs in the order of the network's flattened arguments."""
    names = {int(entry.tensorIndex): entry.name.decode() for entry in model.signatureDefs[0].inputs}
    given = [names.get(int(index), "?") for index in model.subgraphs[0].inputs]
    roots = [f"args_{index}" for index in range(len(inputs.args))] + list(inputs.kwargs)
    positions = [next((at for at, root in enumerate(roots) if _belongs(name, root)), -1) for name in given]
    if len(given) != len(inputs.tensors) or positions != sorted(positions):
        raise ExportError(
            f"tflite: LiteRT gave the file the inputs {given}, but the network takes {len(inputs.tensors)} tensors in "
            f"the order {roots}. Give every input as a tensor that the network uses."
        )


def _belongs(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}_")
