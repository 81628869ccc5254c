"""Read an ONNX file whole, and say what it holds: which weights are integers, and what computes in float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_edge.contents import Contents, Endpoint
from lightning_edge.errors import RunnerError, require
from lightning_edge.exporters.onnx.graph import VIEWS, Graph, all_nodes, attribute
from lightning_edge.exporters.run.calls import of_one_sample
from lightning_edge.interface import Interface

_EXTRA = "onnx"
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# Operations that multiply by weights or matrices, with the positions of what they multiply by weights.
_PRODUCTS = {
    "Conv": (0, 1),
    "ConvTranspose": (0, 1),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    "Einsum": (0, 1),
    "ConvInteger": (0, 1),
    "MatMulInteger": (0, 1),
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
    "GRU": (1, 2),
    "LSTM": (1, 2),
    "RNN": (1, 2),
}
_INTEGER = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
# What runs in int8 in ONNX Runtime where all its inputs are dequantized and its output is quantized.
_INT8_KERNELS = frozenset(
    {
        "Add",
        "AveragePool",
        "Concat",
        "Conv",
        "Gemm",
        "GlobalAveragePool",
        "LeakyRelu",
        "MatMul",
        "MaxPool",
        "Mul",
        "Resize",
        "Sigmoid",
        "Softmax",
        "Where",
    }
)
# Operations that only move or convert values: not computation, whatever type the values have.
_MOVES = VIEWS | {
    "Cast",
    "CastLike",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "DepthToSpace",
    "DynamicQuantizeLinear",
    "GatherElements",
    "GatherND",
    "If",
    "Loop",
    "Pad",
    "Scan",
    "ScatterElements",
    "ScatterND",
    "Shape",
    "SpaceToDepth",
    "Where",
    _QUANTIZE,
    _DEQUANTIZE,
}
# What hands a weight on to its layer.
_STORED_THROUGH = frozenset({_DEQUANTIZE, "Cast", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "Identity"})


def parse(data: bytes) -> Any:
    """Read a file into a ``ModelProto``.

    Raises:
        RunnerError: If its weights lie in another file.
        ValueError: If it is cut short or no ONNX file.
    """
    onnx = require("onnx", _EXTRA)
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception as error:
        raise ValueError("it is cut short, or no ONNX file") from error
    if not model.graph.node:
        raise ValueError("it holds no graph")
    for value in model.graph.initializer:
        if value.data_location == onnx.TensorProto.EXTERNAL or value.external_data:
            place = next((entry.value for entry in value.external_data if entry.key == "location"), "another file")
            raise RunnerError(
                f"the weights of this .onnx file lie in {place!r}, and only a file that holds them itself is read. "
                "Save it again with the weights inside: onnx.save(model, path, save_as_external_data=False)"
            )
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise ValueError(f"it is cut short or damaged ({str(error).strip().splitlines()[0]})") from error
    return model


def contents(path: Path) -> Contents:
    """Read what a file holds.

    Raises:
        RunnerError: If its weights lie in another file.
        ValueError: If it is cut short or no ONNX file.
    """
    onnx = require("onnx", _EXTRA)
    model = parse(path.read_bytes())
    graph = Graph(model)
    types = {name: kind.elem_type for name, kind in graph.types().items()}
    types |= {name: value.data_type for name, value in graph.initializers.items()}
    kinds = onnx.TensorProto
    floats = {kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE}
    bytes_of: dict[str, dict[str, int]] = {"int8": {}, "int4": {}, "float": {}, "half": {}}
    float_compute: list[str] = []
    float_other: list[str] = []
    for node in all_nodes(graph.proto):
        name = node.op_type
        if name in _PRODUCTS:
            if not _runs_in_int8(graph, node):
                float_compute.append(name)
            for position in _PRODUCTS[name]:
                weight = _stored(graph, node.input[position])
                if weight is not None:
                    found = _kinds_of(weight.data_type, kinds, floats)
                    for kind in found:
                        bytes_of[kind][weight.name] = _length(onnx, weight, halved="int4" in found)
        elif name not in _MOVES and not _runs_in_int8(graph, node) and _takes_or_gives(node, floats, types):
            float_other.append(name)
    return Contents(
        int8_weight_bytes=sum(bytes_of["int8"].values()),
        float_weight_bytes=sum(bytes_of["float"].values()),
        ops=dict(sorted(Counter(node.op_type for node in all_nodes(graph.proto)).items())),
        float_compute_ops=tuple(float_compute),
        float_ops=tuple(float_other),
        half_weight_bytes=sum(bytes_of["half"].values()),
        int4_weight_bytes=sum(bytes_of["int4"].values()),
        inputs=_endpoints(onnx, [value for value in model.graph.input if value.name not in graph.initializers]),
        outputs=_endpoints(onnx, model.graph.output),
        interface=Interface.of_notes({entry.key: entry.value for entry in model.metadata_props}),
    )


def _endpoints(onnx: Any, values: Iterable[Any]) -> tuple[Endpoint, ...]:
    found = []
    for value in values:
        kind = value.type.tensor_type
        sizes = [int(size.dim_value) if size.HasField("dim_value") else -1 for size in kind.shape.dim]
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        found.append(Endpoint(value.name, of_one_sample(sizes), dtype))
    return tuple(found)


def _runs_in_int8(graph: Graph, node: Any) -> bool:
    """Whether ONNX Runtime has an int8 kernel for an operation where it stands."""
    if node.op_type in _INTEGER:
        return True
    if node.op_type not in _INT8_KERNELS:
        return False
    if node.op_type == "Resize" and attribute(node, "mode", b"nearest") != b"nearest":
        return False
    # A resize is told its sizes by its other inputs.
    floats = [name for name in (node.input[:1] if node.op_type == "Resize" else node.input) if name]
    return all(_is_dequantized(graph, name) for name in floats) and all(
        _is_quantized(graph, name) for name in node.output if name
    )


def _takes_or_gives(node: Any, floats: set[int], types: dict[str, int]) -> bool:
    """Whether one of an operation's values is float, or of a type that cannot be told."""
    values = [name for name in (*node.input, *node.output) if name]
    return any(types.get(name) in floats or name not in types for name in values)


def _is_dequantized(graph: Graph, name: str) -> bool:
    while (node := graph.maker(name)) is not None:
        if node.op_type == _DEQUANTIZE:
            return True
        if node.op_type not in VIEWS:
            return False
        name = node.input[0]
    return False


def _is_quantized(graph: Graph, name: str) -> bool:
    readers = graph.readers[name]
    return (
        name not in graph.outputs
        and bool(readers)
        and all(
            node.op_type == _QUANTIZE
            or (node.op_type in VIEWS and all(_is_quantized(graph, made) for made in node.output))
            for node in readers
        )
    )


def _stored(graph: Graph, name: str) -> Any:
    """The constant behind an operand."""
    while name not in graph.initializers:
        node = graph.maker(name, *_STORED_THROUGH)
        if node is None:
            return None
        if node.op_type == "Mul" and node.input[1] not in graph.initializers:  # not weights by their scale
            return None
        name = node.input[0]
    return graph.initializers[name]


def _kinds_of(data_type: int, kinds: Any, floats: set[int]) -> tuple[str, ...]:
    if data_type in floats:
        return ("float", "half") if data_type in (kinds.FLOAT16, kinds.BFLOAT16) else ("float",)
    return ("int4",) if data_type in (kinds.INT4, kinds.UINT4) else ("int8",)


def _length(onnx: Any, weight: Any, *, halved: bool) -> int:
    size = int(onnx.numpy_helper.to_array(weight).nbytes)
    return (size + 1) // 2 if halved else size
