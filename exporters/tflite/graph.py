"""Read and rewrite the flatbuffer of a TensorFlow Lite file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from lightning_edge.errors import require

_EXTRA = "tflite"
_IDENTIFIER = b"TFL3"
# Operations that multiply by weights or matrices, with the positions of their two factors.
PRODUCTS = {
    "CONV_2D": (0, 1),
    "DEPTHWISE_CONV_2D": (0, 1),
    "FULLY_CONNECTED": (0, 1),
    "CONV_3D": (0, 1),
    "TRANSPOSE_CONV": (2, 1),
    "CONV_3D_TRANSPOSE": (2, 1),
    "BATCH_MATMUL": (0, 1),
}
# Constants must lie at multiples of this, or a runtime that maps the file reads unaligned words.
_ALIGNMENT = 16


def parse(data: bytes) -> Any:
    """Unpack a file into the schema's object tree (a ``ModelT``).

    Raises:
        ValueError: If it is cut short or no TensorFlow Lite file.
    """
    schema = schema_module()
    if data[4:8] != _IDENTIFIER:
        raise ValueError("it does not start as a TensorFlow Lite file does")
    try:
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        _bring_constants_in(model, data)
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


def dtype_name(number: int) -> str:
    """Name a type of the schema as PyTorch does."""
    types = vars(schema_module().TensorType)
    return next((str(name).lower() for name, value in types.items() if value == number), f"type {number}")


def op_name(model: Any, op: Any) -> str:
    """Name an operation as the schema does, a custom one as the file does."""
    code = model.operatorCodes[op.opcodeIndex]
    if code.customCode:
        return str(code.customCode.decode() if isinstance(code.customCode, bytes) else code.customCode)
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    operators = vars(schema_module().BuiltinOperator)
    return next((str(name) for name, value in operators.items() if value == number), f"BUILTIN_{number}")


def maker_names(model: Any) -> dict[int, str]:
    """Name what computes each tensor of the first graph: the kind of the operation and its place among all."""
    operators = enumerate(model.subgraphs[0].operators)
    return {int(index): f"{op_name(model, op)} {place}" for place, op in operators for index in op.outputs}


def set_note(model: Any, name: str, value: bytes) -> None:
    """Keep a few bytes in the file's metadata."""
    schema = schema_module()
    model.buffers.append(schema.BufferT(data=numpy.frombuffer(value, dtype=numpy.uint8)))
    note = schema.MetadataT(name=name, buffer=len(model.buffers) - 1)
    model.metadata = [*(model.metadata or []), note]


def notes(data: bytes) -> Mapping[str, str]:
    """Read the texts of `set_note` (and what else the metadata holds) by name, and nothing else of a whole file."""
    model = schema_module().Model.GetRootAs(data, 0)
    found = {}
    for index in range(model.MetadataLength()):
        entry = model.Metadata(index)
        buffer = model.Buffers(entry.Buffer())
        text = bytes(buffer.DataAsNumpy()) if buffer.DataLength() else b""
        found[entry.Name().decode()] = text.decode("utf-8", errors="replace")
    return found


def schema_module() -> Any:
    """Import the schema's generated classes."""
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
    schema = schema_module()

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


def _bring_constants_in(model: Any, data: bytes) -> None:
    """Read the constants that lie behind the flatbuffer, where ai-edge-quantizer puts large ones, as those in it."""
    for buffer in model.buffers:
        if buffer.offset > 1:  # 0 and 1 stand for none
            if buffer.offset + buffer.size > len(data):
                raise ValueError(f"a constant ends at byte {buffer.offset + buffer.size} of {len(data)}")
            buffer.data = numpy.frombuffer(data, numpy.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0


def _check_constants(model: Any) -> None:
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            length_bytes(model, tensor)
        for op in graph.operators:
            for index in (*op.inputs, *op.outputs):
                graph.tensors[index]


def length_bytes(model: Any, tensor: Any) -> int:
    """Count the bytes of a tensor's constant; 0 if it has none."""
    data = model.buffers[tensor.buffer].data
    return 0 if data is None else len(data)


def add_float(graph: Any, index: int, name: bytes) -> int:
    """Add a float tensor of another's shape, and give its index."""
    schema, like = schema_module(), graph.tensors[index]
    added = schema.TensorT(name=name, shape=like.shape, type=schema.TensorType.FLOAT32, hasRank=like.hasRank)
    graph.tensors.append(added)
    return len(graph.tensors) - 1


def conversion(model: Any, operator: str, source: int, result: int) -> Any:
    """Make the operation QUANTIZE or DEQUANTIZE from one tensor to another; it is not in a graph yet."""
    return schema_module().OperatorT(opcodeIndex=op_code(model, operator), inputs=[source], outputs=[result])


def op_code(model: Any, operator: str) -> int:
    """Give the index of an operation's kind among those of the file, added if it is not there."""
    schema = schema_module()
    number = getattr(schema.BuiltinOperator, operator)
    for index, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == number and not code.customCode:
            return index
    version = 2 if operator == "DEQUANTIZE" else 1
    model.operatorCodes.append(
        schema.OperatorCodeT(deprecatedBuiltinCode=min(number, 127), builtinCode=number, version=version)
    )
    return len(model.operatorCodes) - 1
