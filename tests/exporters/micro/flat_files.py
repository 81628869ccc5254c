"""Small ``.tflite`` files, built of the schema's objects: no converter has a part in them."""

from __future__ import annotations

from typing import Any

import pytest


def file(shapes: dict[int, list[int]], *, constants: tuple[int, ...] = (), **graph: Any) -> Any:
    """A file of int8 tensors; operations are given as pairs of what they read and write."""
    pytest.importorskip("ai_edge_litert")
    from ai_edge_litert import schema_py_generated as schema

    tensors = []
    for index in range(max(shapes) + 1):
        tensor = schema.TensorT(shape=shapes[index], type=schema.TensorType.INT8, name=f"t{index}")
        tensor.buffer = 1 if index in constants else 0
        tensors.append(tensor)
    operators = [schema.OperatorT(inputs=reads, outputs=writes) for reads, writes in graph["operators"]]
    made = schema.SubGraphT(tensors=tensors, inputs=graph["inputs"], outputs=graph["outputs"], operators=operators)
    buffers = [schema.BufferT(), schema.BufferT(data=[1])]
    return schema.ModelT(subgraphs=[made], buffers=buffers)


def residual() -> Any:
    """0 -> 1 (by weights 5) -> 2 -> 3 = 2 + 1 -> 4; nothing reads the input 6, 1 and 4 are given out."""
    shapes = {0: [1, 4, 4, 1], 1: [1, 8], 2: [1, 40], 3: [1, 8], 4: [1, 2], 5: [8, 16], 6: [1, 3]}
    operators = [([0, 5, -1], [1]), ([1], [2]), ([2, 1], [3]), ([3], [4])]
    return file(shapes, constants=(5,), inputs=[0, 6], outputs=[4, 1], operators=operators)


def layers(*operations: tuple[str, list[int], list[list[int]]]) -> Any:
    """A chain of int8 operations: of each its name, the shape of what it gives, and the shapes of its constants.

    The first is the input, of no name. Weights, the first constant of a layer, have a scale for each of what it gives.
    """
    pytest.importorskip("ai_edge_litert")
    from ai_edge_litert import schema_py_generated as schema

    one = schema.QuantizationParametersT(scale=[0.1], zeroPoint=[0])
    tensors = [schema.TensorT(shape=operations[0][1], type=schema.TensorType.INT8, name="input", quantization=one)]
    codes, made, last = [], [], 0
    for name, shape, constants in operations[1:]:
        code = getattr(schema.BuiltinOperator, name)
        codes.append(schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=min(code, 127)))
        reads = [last]
        for constant in constants:
            per_channel = schema.QuantizationParametersT(scale=[0.1] * shape[-1], zeroPoint=[0] * shape[-1])
            weights = len(constant) > 1
            dtype = schema.TensorType.INT8 if weights else schema.TensorType.INT32
            tensors.append(schema.TensorT(shape=constant, type=dtype, buffer=1, name="constant"))
            tensors[-1].quantization = per_channel if weights else None
            reads.append(len(tensors) - 1)
        tensors.append(schema.TensorT(shape=shape, type=schema.TensorType.INT8, name=name, quantization=one))
        if name == "TRANSPOSE_CONV":
            reads = [reads[2], reads[1], reads[0]]
        last = len(tensors) - 1
        made.append(schema.OperatorT(opcodeIndex=len(codes) - 1, inputs=reads, outputs=[last]))
    graph = schema.SubGraphT(tensors=tensors, inputs=[0], outputs=[last], operators=made)
    return schema.ModelT(subgraphs=[graph], operatorCodes=codes, buffers=[schema.BufferT(), schema.BufferT(data=[1])])


def quickstart() -> Any:
    """The int8 network of the recipe ``quickstart``, operation by operation."""
    return layers(
        ("", [1, 1, 8, 8], []),
        ("RESHAPE", [1, 8, 8, 1], [[4]]),
        ("DEPTHWISE_CONV_2D", [1, 8, 8, 16], [[1, 3, 3, 16], [16]]),
        ("CONV_2D", [1, 8, 8, 32], [[32, 3, 3, 16], [32]]),
        ("MAX_POOL_2D", [1, 4, 4, 32], []),
        ("CONV_2D", [1, 4, 4, 16], [[16, 3, 3, 32], [16]]),
        ("TRANSPOSE", [1, 16, 4, 4], [[4]]),
        ("RESHAPE", [1, 256], [[2]]),
        ("FULLY_CONNECTED", [1, 10], [[10, 256], [10]]),
    )
