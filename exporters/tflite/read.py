"""Read from a TensorFlow Lite file what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_edge.contents import Contents, Endpoint
from lightning_edge.exporters.tflite.graph import (
    PRODUCTS,
    dtype_name,
    length_bytes,
    notes,
    op_name,
    parse,
    schema_module,
)
from lightning_edge.exporters.tflite.metadata import labels_of
from lightning_edge.interface import Interface

# Operations that only move or convert values: not computation, whatever type the values have.
_MOVES = frozenset(
    {
        "BATCH_TO_SPACE_ND",
        "BROADCAST_TO",
        "CAST",
        "CONCATENATION",
        "DEPTH_TO_SPACE",
        "DEQUANTIZE",
        "EMBEDDING_LOOKUP",
        "EXPAND_DIMS",
        "FILL",
        "GATHER",
        "GATHER_ND",
        "MIRROR_PAD",
        "PACK",
        "PAD",
        "PADV2",
        "QUANTIZE",
        "RESHAPE",
        "REVERSE_V2",
        "SELECT",
        "SELECT_V2",
        "SHAPE",
        "SLICE",
        "SPACE_TO_BATCH_ND",
        "SPACE_TO_DEPTH",
        "SPLIT",
        "SPLIT_V",
        "SQUEEZE",
        "STRIDED_SLICE",
        "TILE",
        "TRANSPOSE",
        "UNPACK",
    }
)


def contents(path: Path) -> Contents:
    """Read what a file holds.

    Raises:
        ValueError: If it is cut short or no TensorFlow Lite file.
    """
    data = path.read_bytes()
    model = parse(data)
    floats = {schema_module().TensorType.FLOAT32, schema_module().TensorType.FLOAT16}
    halves, int4 = {schema_module().TensorType.FLOAT16}, {schema_module().TensorType.INT4}
    bytes_of: dict[str, dict[int, int]] = {"int8": {}, "int4": {}, "float": {}, "half": {}}
    ops: Counter[str] = Counter()
    float_compute: list[str] = []
    float_other: list[str] = []
    for graph in model.subgraphs:
        produced = {index: op for op in graph.operators for index in op.outputs}
        for op in graph.operators:
            name = op_name(model, op)
            ops[name] += 1
            tensors = [graph.tensors[index] for index in (*op.inputs, *op.outputs) if index >= 0]
            is_float = any(tensor.type in floats for tensor in tensors)
            if name in PRODUCTS:
                if is_float:
                    float_compute.append(name)
                for position in PRODUCTS[name]:
                    weight = _stored(model, graph, produced, op.inputs[position])
                    if weight is not None:
                        kind = "float" if weight.type in floats else "int4" if weight.type in int4 else "int8"
                        for found in (kind, "half") if weight.type in halves else (kind,):
                            bytes_of[found][weight.buffer] = length_bytes(model, weight)
            elif is_float and name not in _MOVES:
                float_other.append(name)
    return Contents(
        int8_weight_bytes=sum(bytes_of["int8"].values()),
        float_weight_bytes=sum(bytes_of["float"].values()),
        ops=dict(sorted(ops.items())),
        float_compute_ops=tuple(float_compute),
        float_ops=tuple(float_other),
        half_weight_bytes=sum(bytes_of["half"].values()),
        int4_weight_bytes=sum(bytes_of["int4"].values()),
        inputs=_endpoints(model, "inputs"),
        outputs=_endpoints(model, "outputs"),
        interface=replace(Interface.of_notes(notes(data)), labels=labels_of(data)),
    )


def _endpoints(model: Any, side: str) -> tuple[Endpoint, ...]:
    """What the first graph takes or gives, by the names of its signature where it has one."""
    graph = model.subgraphs[0]
    entries = getattr(model.signatureDefs[0], side) if model.signatureDefs else []
    names = {int(entry.tensorIndex): entry.name for entry in entries}
    found = []
    for index in getattr(graph, side):
        tensor = graph.tensors[index]
        name = names.get(int(index), tensor.name)
        quantization = tensor.quantization
        scaled = quantization is not None and quantization.scale is not None and len(quantization.scale) == 1
        found.append(
            Endpoint(
                name.decode() if isinstance(name, bytes) else name,
                tuple(int(size) for size in ([] if tensor.shape is None else tensor.shape)),
                dtype_name(tensor.type),
                float(quantization.scale[0]) if scaled else None,
                int(quantization.zeroPoint[0]) if scaled else None,
            )
        )
    return tuple(found)


def _stored(model: Any, graph: Any, produced: Mapping[int, Any], index: int) -> Any:
    """The constant behind an operand, through the DEQUANTIZE of a weight that is only stored as int8."""
    tensor = graph.tensors[index]
    if length_bytes(model, tensor):
        return tensor
    maker = produced.get(index)
    if maker is not None and op_name(model, maker) == "DEQUANTIZE":
        return _stored(model, graph, produced, maker.inputs[0])
    return None
