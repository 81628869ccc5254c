"""Read and rewrite the flatbuffer of a TensorFlow Lite file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_edge.errors import require
from lightning_edge.exporters.base import Contents

_EXTRA = "tflite"
_IDENTIFIER = b"TFL3"
# Operations that multiply by weights or matrices, with the positions of their two factors.
_PRODUCTS = {
    "CONV_2D": (0, 1),
    "DEPTHWISE_CONV_2D": (0, 1),
    "FULLY_CONNECTED": (0, 1),
    "CONV_3D": (0, 1),
    "TRANSPOSE_CONV": (2, 1),
    "CONV_3D_TRANSPOSE": (2, 1),
    "BATCH_MATMUL": (0, 1),
}
# Those with a bias, with the positions of what they are fed and of the bias.
_PRODUCTS_WITH_BIAS = {
    "CONV_2D": (0, 2),
    "DEPTHWISE_CONV_2D": (0, 2),
    "FULLY_CONNECTED": (0, 2),
    "TRANSPOSE_CONV": (2, 3),
}
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
# Constants must lie at multiples of this, or a runtime that maps the file reads unaligned words.
_ALIGNMENT = 16


def parse(data: bytes) -> Any:
    """Unpack a file into the schema's object tree (a ``ModelT``).

    Raises:
        ValueError: If it is cut short or no TensorFlow Lite file.
    """
    schema = _schema()
    if data[4:8] != _IDENTIFIER:
        raise ValueError("it does not start as a TensorFlow Lite file does")
    try:
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        _check_constants(model)
    except Exception as error:
        raise ValueError(f"it is cut short or damaged ({error})") from error
    if not model.subgraphs:
        raise ValueError("it holds no graph")
    return model


def pack(model: Any) -> bytes:
    """Pack the object tree of `parse` into a file, constants aligned as the schema asks."""
    flatbuffers = require("flatbuffers", _EXTRA)
    for buffer in model.buffers:
        buffer.Pack = _aligned(buffer)
    builder = _sharing(flatbuffers)
    builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def contents(path: Path) -> Contents:
    """Read what a file holds.

    Raises:
        ValueError: If it is cut short or no TensorFlow Lite file.
    """
    model = parse(path.read_bytes())
    floats = {_schema().TensorType.FLOAT32, _schema().TensorType.FLOAT16}
    halves, int4 = {_schema().TensorType.FLOAT16}, {_schema().TensorType.INT4}
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
            if name in _PRODUCTS:
                if is_float:
                    float_compute.append(name)
                for position in _PRODUCTS[name]:
                    weight = _stored(model, graph, produced, op.inputs[position])
                    if weight is not None:
                        kind = "float" if weight.type in floats else "int4" if weight.type in int4 else "int8"
                        for found in (kind, "half") if weight.type in halves else (kind,):
                            bytes_of[found][weight.buffer] = _length(model, weight)
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
    )


def op_name(model: Any, op: Any) -> str:
    """Name an operation as the schema does, a custom one as the file does."""
    code = model.operatorCodes[op.opcodeIndex]
    if code.customCode:
        return str(code.customCode.decode() if isinstance(code.customCode, bytes) else code.customCode)
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    operators = vars(_schema().BuiltinOperator)
    return next((str(name) for name, value in operators.items() if value == number), f"BUILTIN_{number}")


def type_name(tensor: Any) -> str:
    """Name the type of a tensor's values as the schema does."""
    types = vars(_schema().TensorType)
    return next((str(name) for name, value in types.items() if value == tensor.type), f"TYPE_{tensor.type}")


def shorten_names(model: Any) -> None:
    """Name tensors by their number: the converter writes the whole module path into each, for debugging only."""
    for graph in model.subgraphs:
        ends = {*graph.inputs, *graph.outputs}
        for index, tensor in enumerate(graph.tensors):
            if index not in ends:
                tensor.name = str(index).encode()


def float_ends(model: Any) -> None:
    """Let the graph take and give float: quantize at its int8 inputs, dequantize at its int8 outputs.

    What lies between is not touched, so the kernels inside stay int8.
    """
    graph = model.subgraphs[0]
    graph.inputs = [int(index) for index in graph.inputs]
    graph.outputs = [int(index) for index in graph.outputs]
    inputs = _convert_ends(model, graph, graph.inputs, "QUANTIZE")
    outputs = _convert_ends(model, graph, graph.outputs, "DEQUANTIZE")
    graph.operators = [*inputs, *graph.operators, *outputs]


def widen_biases(model: Any) -> None:
    """Store the biases of layers with 16-bit inputs in 64 bits, as LiteRT's 16x8 kernels read them.

    The converter writes 32 bits, and the kernels read past their end.
    """
    import numpy

    schema = _schema()
    for graph in model.subgraphs:
        for op in graph.operators:
            data, position = _PRODUCTS_WITH_BIAS.get(op_name(model, op), (0, -1))
            if position < 0 or len(op.inputs) <= position or op.inputs[position] < 0:
                continue
            bias = graph.tensors[op.inputs[position]]
            wide = graph.tensors[op.inputs[data]].type == schema.TensorType.INT16
            if wide and bias.type == schema.TensorType.INT32:
                values = numpy.frombuffer(bytes(model.buffers[bias.buffer].data), dtype=numpy.int32)
                wider = numpy.frombuffer(values.astype(numpy.int64).tobytes(), dtype=numpy.uint8)
                model.buffers.append(schema.BufferT(data=wider))
                bias.buffer = len(model.buffers) - 1
                bias.type = schema.TensorType.INT64


def join_signs(model: Any) -> None:
    """Take ``sign(x) * |x|`` out, which is ``x``: it kept the converter from joining what must stay apart."""
    import numpy

    for graph in model.subgraphs:
        kinds = {index: (op_name(model, op), op) for op in graph.operators for index in op.outputs}
        same: dict[int, int] = {}
        for op in graph.operators:
            factors = [kinds.get(index, ("", None)) for index in op.inputs]
            if op_name(model, op) == "MUL" and [kind for kind, _ in factors] == ["SIGN", "ABS"]:
                sources = {int(factor.inputs[0]) for _, factor in factors}
                if len(sources) == 1:
                    same[int(op.outputs[0])] = sources.pop()
        if not same:
            continue
        for op in graph.operators:
            op.inputs = numpy.array([same.get(int(index), int(index)) for index in op.inputs], dtype=numpy.int32)
        graph.outputs = numpy.array([same.get(int(index), int(index)) for index in graph.outputs], dtype=numpy.int32)
        read = _read(graph)
        for kind in ("MUL", "SIGN", "ABS"):
            dead = [op for op in graph.operators if op_name(model, op) == kind and read.isdisjoint(op.outputs)]
            graph.operators = [op for op in graph.operators if all(op is not other for other in dead)]
            read = _read(graph)


def set_note(model: Any, name: str, value: str) -> None:
    """Keep a short text in the file's metadata."""
    schema = _schema()
    import numpy

    model.buffers.append(schema.BufferT(data=numpy.frombuffer(value.encode(), dtype=numpy.uint8)))
    note = schema.MetadataT(name=name, buffer=len(model.buffers) - 1)
    model.metadata = [*(model.metadata or []), note]


def notes(model: Any) -> Mapping[str, str]:
    """Read the texts of `set_note` (and what else the metadata holds) by name."""
    found = {}
    for entry in model.metadata or []:
        data = model.buffers[entry.buffer].data
        name = entry.name.decode() if isinstance(entry.name, bytes) else entry.name
        found[name] = "" if data is None else bytes(data).decode("utf-8", errors="replace")
    return found


def _read(graph: Any) -> set[int]:
    """Tensors that an operation or the caller reads."""
    return {int(index) for op in graph.operators for index in op.inputs} | {int(index) for index in graph.outputs}


def _schema() -> Any:
    return require("ai_edge_litert.schema_py_generated", _EXTRA)


def _sharing(flatbuffers: Any) -> Any:
    """Make a builder that writes equal vectors once: most are the zero points of channels, all zero."""
    written: dict[tuple[str, bytes], Any] = {}

    class Builder(flatbuffers.Builder):  # type: ignore[misc]
        def CreateNumpyVector(self, x: Any) -> Any:
            key = (x.dtype.str, x.tobytes())
            if key not in written:
                written[key] = super().CreateNumpyVector(x)
            return written[key]

    return Builder(1024)


def _aligned(buffer: Any) -> Any:
    """Make a buffer's own packing: the generated one ignores the schema's alignment of constants."""
    schema = _schema()

    def pack_buffer(builder: Any) -> Any:
        vector = None
        if buffer.data is not None and len(buffer.data):
            data = bytes(buffer.data)
            builder.StartVector(1, len(data), _ALIGNMENT)
            builder.head -= len(data)
            builder.Bytes[builder.head : builder.head + len(data)] = data
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)

    return pack_buffer


def _check_constants(model: Any) -> None:
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            _length(model, tensor)
        for op in graph.operators:
            for index in (*op.inputs, *op.outputs):
                graph.tensors[index]


def _length(model: Any, tensor: Any) -> int:
    data = model.buffers[tensor.buffer].data
    return 0 if data is None else len(data)


def _stored(model: Any, graph: Any, produced: Mapping[int, Any], index: int) -> Any:
    """The constant behind an operand, through the DEQUANTIZE of a weight that is only stored as int8."""
    tensor = graph.tensors[index]
    if _length(model, tensor):
        return tensor
    maker = produced.get(index)
    if maker is not None and op_name(model, maker) == "DEQUANTIZE":
        return _stored(model, graph, produced, maker.inputs[0])
    return None


def _convert_ends(model: Any, graph: Any, ends: list[int], operator: str) -> list[Any]:
    """Put a float tensor and the operation to it at each int8 end of the graph; returns the operations."""
    schema = _schema()
    signatures = model.signatureDefs or []
    maps = [signature.inputs if operator == "QUANTIZE" else signature.outputs for signature in signatures]
    added: dict[int, int] = {}
    operators = []
    for position, inner in enumerate(ends):
        quantized = graph.tensors[inner]
        if quantized.type not in (schema.TensorType.INT8, schema.TensorType.INT16):
            continue
        if inner not in added:
            outer = schema.TensorT(name=quantized.name, shape=quantized.shape, type=schema.TensorType.FLOAT32)
            outer.hasRank = quantized.hasRank
            quantized.name = str(inner).encode()
            graph.tensors.append(outer)
            added[inner] = len(graph.tensors) - 1
            pair = (added[inner], inner) if operator == "QUANTIZE" else (inner, added[inner])
            code = _op_code(model, operator)
            operators.append(schema.OperatorT(opcodeIndex=code, inputs=[pair[0]], outputs=[pair[1]]))
        ends[position] = added[inner]
    for entry in (entry for entries in maps for entry in entries):
        entry.tensorIndex = added.get(int(entry.tensorIndex), entry.tensorIndex)
    return operators


def _op_code(model: Any, operator: str) -> int:
    schema = _schema()
    number = getattr(schema.BuiltinOperator, operator)
    for index, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == number and not code.customCode:
            return index
    version = 2 if operator == "DEQUANTIZE" else 1
    model.operatorCodes.append(
        schema.OperatorCodeT(deprecatedBuiltinCode=min(number, 127), builtinCode=number, version=version)
    )
    return len(model.operatorCodes) - 1
