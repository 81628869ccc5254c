"""How a TensorFlow Lite file stores its parts: biases as wide as kernels read them, short names, one empty buffer."""

from __future__ import annotations

from typing import Any

import numpy

from lightning_edge.exporters.tflite.graph import op_name, schema_module

# Those with a bias, with the positions of what they are fed and of the bias.
_PRODUCTS_WITH_BIAS = {
    "CONV_2D": (0, 2),
    "DEPTHWISE_CONV_2D": (0, 2),
    "FULLY_CONNECTED": (0, 2),
    "TRANSPOSE_CONV": (2, 3),
}


def widen_biases(model: Any) -> None:
    """Store the biases of layers with 16-bit inputs in 64 bits.

    Given: an int32 bias of a layer that is fed int16.

    Result: the same in int64.

    Why: LiteRT's 16x8 kernels read 64 bits, and so past the end of what its converter writes (litert-torch 0.10).
    """
    schema = schema_module()
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


def shorten_names(model: Any) -> None:
    """Name tensors by their number.

    Given: tensors between inputs and outputs, whose names are whole module paths.

    Result: their numbers.

    Why: names there are for debugging only, and a good part of a small file.
    """
    for graph in model.subgraphs:
        ends = {*graph.inputs, *graph.outputs}
        for index, tensor in enumerate(graph.tensors):
            if index not in ends:
                tensor.name = str(index).encode()


def share_empty_buffers(model: Any) -> None:
    """Let all tensors without data have the schema's one empty buffer.

    Given: a buffer without data for each activation, and buffers that nothing has any more.

    Result: the first buffer, which the schema keeps empty, and those with data.

    Why: every buffer takes bytes in the file.
    """
    kept, places = [model.buffers[0]], {}
    holders = [tensor for graph in model.subgraphs for tensor in graph.tensors] + (model.metadata or [])
    for holder in holders:
        buffer = model.buffers[holder.buffer]
        if buffer.data is None or not len(buffer.data):
            holder.buffer = 0
            continue
        if holder.buffer not in places:
            places[holder.buffer] = len(kept)
            kept.append(buffer)
        holder.buffer = places[holder.buffer]
    model.buffers = kept
