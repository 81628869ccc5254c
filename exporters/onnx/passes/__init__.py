"""Passes of the ONNX target on the graph of an int8 file: one tuple, in order. No pass changes a value."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from lightning_edge.exporters.onnx.passes.averages import averages, averages_of_rows
from lightning_edge.exporters.onnx.passes.layers import integer_biases, linears
from lightning_edge.exporters.onnx.passes.pixels import join_colors, join_pixels, keep_integers
from lightning_edge.exporters.onnx.passes.qdq import activations, paddings, repeats, unsigned, zero_points
from lightning_edge.exporters.onnx.passes.runtime_bugs import lone_softmaxes, subtractions
from lightning_edge.exporters.onnx.passes.unsigned_weights import unsigned_weights
from lightning_edge.exporters.onnx.tidy import remove_unread

GraphPass = Callable[[ir.Graph], None]

PASSES: tuple[GraphPass, ...] = (
    repeats,  # first: a value that is quantized twice hides what made it
    averages,  # ReduceMean has no int8 kernel
    paddings,  # a padding has none either
    activations,  # before layers are looked for: a clip between a layer and its quantizer hides it
    linears,  # Gemm is the one form with an int8 kernel
    integer_biases,  # kernels read 32-bit biases
    unsigned,  # kernels take uint8 activations
    lone_softmaxes,  # ONNX Runtime computes these wrongly in int8
    subtractions,  # there is no int8 kernel for a difference
    keep_integers,  # uint8 pixels are the integers already
    join_colors,  # a depthwise convolution of three channels is slow
    join_pixels,  # so is one of few channels on single pixels
    averages_of_rows,  # means over tokens
    zero_points,  # last: says what is 0 in the fewest bytes
)


def rewrite(model: ir.Model, *, unsigned_last: bool = False) -> None:
    """Run `PASSES` on the graph of an int8 model, in place.

    Args:
        model: The model, with the shapes of its values.
        unsigned_last: Whether `unsigned_weights` follows, which needs all others to be done.
    """
    for apply in (*PASSES, unsigned_weights) if unsigned_last else PASSES:
        apply(model.graph)
        remove_unread(model)
