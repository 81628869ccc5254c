"""Scratch memory that kernels of TensorFlow Lite Micro request while they run: reference kernels and CMSIS-NN."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, Literal

from lightning_edge.exporters.micro.arena import Buffer, tensor_bytes, tensor_name
from lightning_edge.exporters.tflite.graph import dtype_name, op_name

Kernels = Literal["reference", "cmsis-nn"]
KERNELS: tuple[Kernels, ...] = ("reference", "cmsis-nn")

_FILTERED = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"})
_REDUCTIONS = frozenset({"MEAN", "SUM"})
_SUM_BYTES = 4
# CMSIS-NN turns a transposed convolution into one of reversed weights where it reads more channels than this.
_REVERSED_ABOVE = 16
_MOST_REVERSED_STRIDE = 2


def scratch(model: Any, kernels: Kernels = "reference") -> list[Buffer]:
    """Tell what the kernels ask for, each alive while its operation runs, in the order they ask.

    CMSIS-NN's sizes are those of its ``*_get_buffer_size`` functions for processors with the DSP extension and without
    Helium: Cortex-M4, M7 and M33 (version 7, 2025). Those of Cortex-M55 and M85, and of ESP-NN, are others.

    Args:
        model: A file as `parse` gives it, of one graph.
        kernels: Whose.

    Raises:
        ValueError: If a shape is not fixed, or a type has no fixed width.
    """
    graph = model.subgraphs[0]
    found = []
    for step, op in enumerate(graph.operators, start=1):
        name = op_name(model, op)
        given = tensor_name(graph.tensors[int(op.outputs[0])])
        for size_bytes in (
            *_reference(name, op, graph.tensors, kernels),
            *_optimized(name, op, graph.tensors, kernels),
        ):
            found.append(Buffer(size_bytes, step, step, f"scratch of {given}"))
    return found


def _reference(name: str, op: Any, tensors: list[Any], kernels: Kernels) -> Iterator[int]:
    """What a reference kernel asks for, and so an optimized one that falls back on it."""
    output = tensors[int(op.outputs[0])]
    if name in _FILTERED and dtype_name(tensors[int(op.inputs[1])].type) == "int4":
        yield prod(int(size) for size in tensors[int(op.inputs[1])].shape)  # unpacked, a byte each
    elif name in _REDUCTIONS and dtype_name(output.type) != "float32":
        yield _SUM_BYTES * prod(int(size) for size in output.shape)
    elif name == "TRANSPOSE_CONV" and dtype_name(output.type) in ("int8", "int16") and kernels == "reference":
        yield _SUM_BYTES * tensor_bytes(output)


def _optimized(name: str, op: Any, tensors: list[Any], kernels: Kernels) -> Iterator[int]:
    if kernels == "reference":
        return
    output = [int(size) for size in tensors[int(op.outputs[0])].shape]
    if name == "AVERAGE_POOL_2D":
        yield _SUM_BYTES * output[-1]
        return
    if name not in (*_FILTERED, "TRANSPOSE_CONV"):
        return
    weights = [int(size) for size in tensors[int(op.inputs[1])].shape]
    if name == "CONV_2D":
        yield _columns(weights[1:])
    elif name == "DEPTHWISE_CONV_2D":
        channels = int(tensors[int(op.inputs[0])].shape[-1])
        if channels == output[-1]:
            yield 2 * channels * weights[1] * weights[2]
    elif name == "FULLY_CONNECTED":
        if len(output) > 2 and weights[-1] % 4 == 0:
            yield 4 * weights[-1]
    else:
        yield from _transposed(op, weights, [int(size) for size in tensors[int(op.inputs[2])].shape])


def _transposed(op: Any, weights: list[int], read: list[int]) -> Iterator[int]:
    options = op.builtinOptions
    strides = (options.strideH, options.strideW)
    if read[-1] > _REVERSED_ABOVE and max(strides) <= _MOST_REVERSED_STRIDE:
        yield _columns(weights[1:])
        yield prod(weights)
        return
    height, width = max(weights[1], strides[0]), max(weights[2], strides[0])
    yield _SUM_BYTES * height * ((read[2] - 1) * strides[1] + width) * weights[0]


def _columns(weights: list[int]) -> int:
    """Two columns of what a convolution reads at one place, as int16."""
    return 4 * (-(-prod(weights) // 4) * 4)
