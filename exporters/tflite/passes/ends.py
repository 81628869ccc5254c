"""Inputs and outputs of a TensorFlow Lite file: their names, and float ones around an int8 graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_edge.exporters.tflite.graph import add_float, conversion, schema_module


def float_ends(model: Any) -> None:
    """Let a file take and give float.

    Given: int8 or int16 inputs and outputs of the first graph.

    Result: float ones, quantized behind the inputs and dequantized in front of the outputs. All between stays.

    Why: the option ``io="float"``, for apps that have floats.
    """
    graph = model.subgraphs[0]
    graph.inputs = [int(index) for index in graph.inputs]
    graph.outputs = [int(index) for index in graph.outputs]
    inputs = _convert_ends(model, graph, graph.inputs, "QUANTIZE")
    outputs = _convert_ends(model, graph, graph.outputs, "DEQUANTIZE")
    graph.operators = [*inputs, *graph.operators, *outputs]


def name_ends(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name inputs and outputs.

    Given: the first graph with the names that the converter gave; a side for which there are no names stays.

    Result: these names, in the signature and of the tensors.

    Why: apps call files by name.

    Raises:
        ValueError: If a side has another number of ends.
    """
    graph = model.subgraphs[0]
    for side, names in (("inputs", inputs), ("outputs", outputs)):
        if not names:
            continue
        entries = list(getattr(model.signatureDefs[0], side))
        for name, index in zip(names, getattr(graph, side), strict=True):
            # One value may be given twice: each time an entry of its own.
            entry = next(entry for entry in entries if int(entry.tensorIndex) == int(index))
            entries.remove(entry)
            entry.name = graph.tensors[int(index)].name = name.encode()


def _convert_ends(model: Any, graph: Any, ends: list[int], operator: str) -> list[Any]:
    """Put a float tensor and the operation to it at each int8 end of the graph; returns the operations."""
    schema = schema_module()
    signatures = model.signatureDefs or []
    maps = [signature.inputs if operator == "QUANTIZE" else signature.outputs for signature in signatures]
    added: dict[int, int] = {}
    operators = []
    for position, inner in enumerate(ends):
        quantized = graph.tensors[inner]
        if quantized.type not in (schema.TensorType.INT8, schema.TensorType.INT16):
            continue
        if inner not in added:
            added[inner] = add_float(graph, inner, quantized.name)
            quantized.name = str(inner).encode()
            pair = (added[inner], inner) if operator == "QUANTIZE" else (inner, added[inner])
            operators.append(conversion(model, operator, *pair))
        ends[position] = added[inner]
    for entry in (entry for entries in maps for entry in entries):
        entry.tensorIndex = added.get(int(entry.tensorIndex), entry.tensorIndex)
    return operators
