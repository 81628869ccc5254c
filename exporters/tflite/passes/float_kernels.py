"""Compute in float what LiteRT's delegate has no int8 kernels for."""

from __future__ import annotations

from typing import Any

from lightning_edge.exporters.tflite.graph import add_float, conversion, op_name, schema_module

_FLOAT_ONLY = {"BATCH_MATMUL", "GELU", "SOFTMAX"}


def use_float_kernels(model: Any) -> None:
    """Compute products of stacks of matrices, softmax and GELU in float.

    Given: such an operation between int8 values.

    Result: the same in float, between a dequantization and a quantization. That is what the network itself computes.

    Why: XNNPACK has these in float only. In int8 they run on LiteRT's own kernels (2.3), with a hand-over before and
    after each, slower than float, and round inside: a step in front of a LayerNorm becomes many behind it.
    """
    for graph in model.subgraphs:
        operators: list[Any] = []
        for op in graph.operators:
            ends = [graph.tensors[int(index)] for index in (*op.inputs, *op.outputs)]
            if op_name(model, op) not in _FLOAT_ONLY or not all(_is_int8(tensor) for tensor in ends):
                operators.append(op)
                continue
            floats = {int(index): add_float(graph, int(index), b"float") for index in (*op.inputs, *op.outputs)}
            read = dict.fromkeys(int(index) for index in op.inputs)
            operators += [conversion(model, "DEQUANTIZE", index, floats[index]) for index in read]
            result = int(op.outputs[0])
            op.inputs, op.outputs = [floats[int(index)] for index in op.inputs], [floats[result]]
            operators += [op, conversion(model, "QUANTIZE", floats[result], result)]
        graph.operators = operators


def _is_int8(tensor: Any) -> bool:
    return bool(tensor.type == schema_module().TensorType.INT8)
