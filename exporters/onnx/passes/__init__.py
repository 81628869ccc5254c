"""Passes of the ONNX target on the graph of an int8 file: one tuple, in order. No pass changes a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_edge.exporters.onnx.graph import Graph
from lightning_edge.exporters.onnx.passes import pixels
from lightning_edge.exporters.onnx.passes.averages import averages_of_rows
from lightning_edge.exporters.onnx.passes.qdq import (
    activations,
    averages,
    integer_biases,
    linears,
    paddings,
    repeats,
    unsigned,
    zero_points,
)
from lightning_edge.exporters.onnx.passes.runtime_bugs import lone_softmaxes, subtractions
from lightning_edge.exporters.onnx.passes.unsigned_weights import unsigned_weights

GraphPass = Callable[[Graph], None]

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
    pixels.keep_integers,  # uint8 pixels are the integers already
    pixels.join_colors,  # a depthwise convolution of three channels is slow
    pixels.join_pixels,  # so is one of few channels on single pixels
    averages_of_rows,  # means over tokens
    zero_points,  # last: says what is 0 in the fewest bytes
)


def rewrite(model: Any, *, unsigned_last: bool = False) -> None:
    """Run `PASSES` on the graph of an int8 model, in place.

    Args:
        model: A ``ModelProto``.
        unsigned_last: Whether `unsigned_weights` follows, which needs all others to be done.
    """
    graph = Graph(model)
    for apply in (*PASSES, unsigned_weights) if unsigned_last else PASSES:
        apply(graph)
        graph.settle()
