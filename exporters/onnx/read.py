"""Read an ONNX file whole, and say what it holds: which weights are integers, and what computes in float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from lightning_edge.contents import Contents, Endpoint
from lightning_edge.errors import RunnerError, require
from lightning_edge.exporters.onnx.graph import VIEWS, attribute, maker, operand
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
# What hands a weight on to its layer. Large weights of recurrent layers are joined, gate by gate, in the file.
_STORED_THROUGH = frozenset(
    {_DEQUANTIZE, "Cast", "Concat", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)


_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_FLOATS = _HALVES | {ir.DataType.FLOAT, ir.DataType.DOUBLE}


def parse(data: bytes) -> ir.Model:
    """Read a file, with the shapes and types of its values as far as they can be inferred.

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
        inferred: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    except Exception as error:
        raise ValueError(f"it is cut short or damaged ({str(error).strip().splitlines()[0]})") from error
    return inferred


def given(graph: ir.Graph) -> list[ir.Value]:
    """Give the inputs of a graph without those that are constants."""
    return [value for value in graph.inputs if not value.is_initializer()]


def contents(path: Path) -> Contents:
    """Read what a file holds.

    Raises:
        RunnerError: If its weights lie in another file.
        ValueError: If it is cut short or no ONNX file.
    """
    model = parse(path.read_bytes())
    nodes = list(model.graph.all_nodes())
    bytes_of: dict[str, dict[str, int]] = {"int8": {}, "int4": {}, "float": {}, "half": {}}
    float_compute: list[str] = []
    float_other: list[str] = []
    for node in nodes:
        name = node.op_type
        if name in _PRODUCTS and len(node.inputs) > 1:  # an Einsum of one input moves or sums
            if not _runs_in_int8(node):
                float_compute.append(name)
            for position in _PRODUCTS[name]:
                for weight in _stored(node.inputs[position]):
                    for kind in _kinds_of(weight.dtype):
                        bytes_of[kind][str(weight.name)] = weight.nbytes
        elif name not in _MOVES and not _runs_in_int8(node) and _takes_or_gives_floats(node):
            float_other.append(name)
    return Contents(
        int8_weight_bytes=sum(bytes_of["int8"].values()),
        float_weight_bytes=sum(bytes_of["float"].values()),
        ops=dict(sorted(Counter(node.op_type for node in nodes).items())),
        float_compute_ops=tuple(float_compute),
        float_ops=tuple(float_other),
        half_weight_bytes=sum(bytes_of["half"].values()),
        int4_weight_bytes=sum(bytes_of["int4"].values()),
        inputs=_endpoints(given(model.graph)),
        outputs=_endpoints(model.graph.outputs),
        interface=Interface.of_notes(model.metadata_props),
    )


def _endpoints(values: Iterable[ir.Value]) -> tuple[Endpoint, ...]:
    found = []
    for value in values:
        sizes = [size if isinstance(size, int) else -1 for size in value.shape or ()]
        dtype = "unknown" if value.dtype is None else str(value.dtype.numpy())
        found.append(Endpoint(str(value.name), of_one_sample(sizes), dtype))
    return tuple(found)


def _runs_in_int8(node: ir.Node) -> bool:
    """Whether ONNX Runtime has an int8 kernel for an operation where it stands."""
    if node.op_type in _INTEGER:
        return True
    if node.op_type not in _INT8_KERNELS:
        return False
    if node.op_type == "Resize" and attribute(node, "mode", "nearest") != "nearest":
        return False
    # A resize is told its sizes by its other inputs.
    floats = [value for value in (node.inputs[:1] if node.op_type == "Resize" else node.inputs) if value is not None]
    return all(_is_dequantized(value) for value in floats) and all(
        _is_quantized(value) for value in node.outputs if value.name
    )


def _takes_or_gives_floats(node: ir.Node) -> bool:
    """Whether one of an operation's values is float, or of a type that cannot be told."""
    values = (value for value in (*node.inputs, *node.outputs) if value is not None and value.name)
    return any(value.dtype is None or value.dtype in _FLOATS for value in values)


def _is_dequantized(value: ir.Value | None) -> bool:
    while (node := maker(value)) is not None:
        if node.op_type == _DEQUANTIZE:
            return True
        if node.op_type not in VIEWS:
            return False
        value = operand(node, 0)
    return False


def _is_quantized(value: ir.Value) -> bool:
    readers = value.consumers()
    return (
        not value.is_graph_output()
        and bool(readers)
        and all(
            node.op_type == _QUANTIZE or (node.op_type in VIEWS and all(_is_quantized(made) for made in node.outputs))
            for node in readers
        )
    )


def _stored(value: ir.Value | None) -> list[ir.TensorProtocol]:
    """The constants behind an operand; none where some of it is computed."""
    found: list[ir.TensorProtocol] = []
    pending: list[ir.Value | None] = [value]
    seen: set[ir.Value | None] = set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if value is not None and value.is_initializer() and value.const_value is not None:
            found.append(value.const_value)
            continue
        node = maker(value, *_STORED_THROUGH)
        if node is None:
            return []
        scale = operand(node, 1)
        if node.op_type == "Mul" and (scale is None or not scale.is_initializer()):  # not weights by their scale
            return []
        pending += node.inputs if node.op_type == "Concat" else [operand(node, 0)]
    return found


def _kinds_of(data_type: ir.DataType) -> tuple[str, ...]:
    if data_type in _FLOATS:
        return ("float", "half") if data_type in _HALVES else ("float",)
    return ("int4",) if data_type in (ir.DataType.INT4, ir.DataType.UINT4) else ("int8",)
