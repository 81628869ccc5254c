"""Edit the graph of a TensorFlow Lite file: follow its tensors, read others instead, and drop what nothing reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from lightning_edge.exporters.tflite import graph as tflite_graph
from lightning_edge.exporters.tflite.graph import schema_module


def makers(graph: Any) -> dict[int, Any]:
    """Find the operation that computes each tensor."""
    return {int(index): op for op in graph.operators for index in op.outputs}


def readers(graph: Any) -> dict[int, list[Any]]:
    """Find the operations that read each tensor; the caller, who reads outputs, is none."""
    found: dict[int, list[Any]] = {}
    for op in graph.operators:
        for index in op.inputs:
            found.setdefault(int(index), []).append(op)
    return found


def constant(model: Any, graph: Any, index: int, dtype: str = "int32") -> Any | None:
    """Give a constant of this type, as numpy calls it, as an array of its shape; ``None`` for other tensors."""
    tensor = graph.tensors[int(index)]
    if tflite_graph.dtype_name(tensor.type) != dtype or not tflite_graph.length_bytes(model, tensor):
        return None
    data = bytes(model.buffers[tensor.buffer].data)
    return numpy.frombuffer(data, dtype=dtype).reshape(tensor.shape)


def add_constant(
    model: Any, graph: Any, values: Any, dtype: str = "int32", scales: Sequence[float] | None = None
) -> int:
    """Add a constant, integers in an array or list, and give its index.

    Args:
        model: The file.
        graph: The graph of it that gets the constant.
        values: The integers.
        dtype: Their type, as numpy calls it.
        scales: What a step of them is, of each in the first dimension or of all; zero stands for zero.
    """
    schema, values = schema_module(), numpy.asarray(values, dtype=dtype)
    model.buffers.append(schema.BufferT(data=numpy.frombuffer(values.tobytes(), dtype=numpy.uint8)))
    shape, kind = numpy.array(values.shape, dtype=numpy.int32), getattr(schema.TensorType, dtype.upper())
    added = schema.TensorT(shape=shape, type=kind, buffer=len(model.buffers) - 1, hasRank=True)
    added.name = b"constant"
    if scales is not None:
        added.quantization = schema.QuantizationParametersT(
            scale=numpy.array(scales, dtype=numpy.float32), zeroPoint=numpy.zeros(len(scales), dtype=numpy.int64)
        )
    graph.tensors.append(added)
    return len(graph.tensors) - 1


def same_scale(first: Any, second: Any) -> bool:
    """Whether an integer stands for the same number in both, so that what one pads with is the other's zero."""

    def scale(tensor: Any) -> list[list[float]]:
        found = tensor.quantization
        parts = () if found is None else (found.scale, found.zeroPoint)
        return [list(part) for part in parts if part is not None]

    return scale(first) == scale(second)


def read_instead(model: Any, graph: Any, same: Mapping[int, int]) -> None:
    """Let operations and the caller read one tensor instead of another that has the same values."""

    def final(index: int) -> int:
        while index in same:
            index = same[index]
        return index

    for holder, name in [(graph, "outputs"), *((op, "inputs") for op in graph.operators)]:
        indices = [final(int(index)) for index in getattr(holder, name)]
        setattr(holder, name, numpy.array(indices, dtype=numpy.int32))
    for entry in (entry for signature in _signatures(model, graph) for entry in signature.outputs):
        entry.tensorIndex = final(int(entry.tensorIndex))


def drop_unread(model: Any) -> None:
    """Take out operations whose results nothing reads, and then tensors and kinds of operations that nothing has."""
    for graph in model.subgraphs:
        ends, kept = {int(index) for index in graph.outputs}, []
        for op in reversed(graph.operators):  # a reader stands behind what it reads
            if not ends.isdisjoint(int(index) for index in op.outputs):
                ends.update(int(index) for index in op.inputs)
                kept.append(op)
        graph.operators = kept[::-1]
        _drop_tensors(model, graph)
    used = sorted({op.opcodeIndex for graph in model.subgraphs for op in graph.operators})
    model.operatorCodes = [model.operatorCodes[index] for index in used]
    for op in (op for graph in model.subgraphs for op in graph.operators):
        op.opcodeIndex = used.index(op.opcodeIndex)


def _drop_tensors(model: Any, graph: Any) -> None:
    """Number the tensors anew that operations and the caller have, and forget the rest."""
    holders = [(graph, "inputs"), (graph, "outputs")]
    holders += [(op, name) for op in graph.operators for name in ("inputs", "outputs")]
    used = sorted({int(index) for holder, name in holders for index in getattr(holder, name) if index >= 0})
    places = {old: new for new, old in enumerate(used)} | {-1: -1}  # -1 stands for an argument that is left out
    graph.tensors = [graph.tensors[index] for index in used]
    for holder, name in holders:
        indices = [places[int(index)] for index in getattr(holder, name)]
        setattr(holder, name, numpy.array(indices, dtype=numpy.int32))
    for signature in _signatures(model, graph):
        for entry in (*signature.inputs, *signature.outputs):
            entry.tensorIndex = places[int(entry.tensorIndex)]


def _signatures(model: Any, graph: Any) -> list[Any]:
    return [found for found in model.signatureDefs or [] if model.subgraphs[found.subgraphIndex] is graph]
