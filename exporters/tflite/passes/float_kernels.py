"""Compute in float, between the same int8 values, what LiteRT's delegate has no int8 kernels for.

XNNPACK multiplies stacks of matrices, takes softmax and GELU in float only. Left in int8 these run on LiteRT's own
kernels, one hand-over before and one after each, which is slower than float and rounds inside: a step more or less in
front of a LayerNorm becomes many behind it. In float between a dequantization and a quantization they stay with the
delegate, and give what the network gives: it computes so too.
"""

from __future__ import annotations

from typing import Any

from lightning_edge.exporters.tflite.graph import add_float, conversion, op_name, schema_module

_FLOAT_ONLY = {"BATCH_MATMUL", "GELU", "SOFTMAX"}


def use_float_kernels(model: Any) -> None:
    """Rewrite every graph of a ``ModelT``; linear layers stay in int8, so do 16-bit operations."""
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
