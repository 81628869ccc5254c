"""How much memory TensorFlow Lite Micro needs for a file: its activations to the byte, the rest as an estimate.

The activations follow AllocationInfoBuilder (tensorflow/lite/micro/micro_allocation_info.cc): every tensor without a
constant behind it lives from the operation that makes it to the last that reads it, inputs from before the first,
outputs to the end; a view such as RESHAPE is a tensor of its own, for TFLM copies it. TFLM's own structures have the
sizes of a 32-bit core.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_edge.errors import ExportError
from lightning_edge.exporters import tflite_graph
from lightning_edge.exporters.arena import Buffer, aligned, plan

# Bits of one value by the schema's name of its type.
_BITS = {
    "FLOAT32": 32,
    "FLOAT16": 16,
    "INT32": 32,
    "UINT32": 32,
    "UINT8": 8,
    "INT64": 64,
    "UINT64": 64,
    "BOOL": 8,
    "INT16": 16,
    "UINT16": 16,
    "INT8": 8,
    "INT4": 4,
    "FLOAT64": 64,
}
# Operations whose reference kernels ask for scratch memory that is not counted here, beside int4 ones.
_UNCOUNTED = frozenset({"BATCH_MATMUL", "SVDF", "UNIDIRECTIONAL_SEQUENCE_LSTM"})
_OFFLINE_PLAN = "OfflineMemoryAllocation"

# Structures on a 32-bit core, in bytes, from the headers of TFLM with TF_LITE_STATIC_MEMORY.
_ALLOCATORS = 512
_EVAL_TENSOR = 12
_NODE = 32
_END_TENSOR = 64
_KERNEL_DATA = 112
_CHANNEL_DATA = 8
_ALLOCATION_INFO = 24
_PLANNER_ENTRY = 40
_SCRATCH_REQUESTS = 12 * 12
_TEMPORARY_TENSOR = 56
# Room for what differs between releases and kernels of TFLM: chosen, not measured.
MARGIN = 0.25


@dataclass(frozen=True)
class Memory:
    """What one file needs at run time, in bytes.

    Attributes:
        activation_bytes: Activations and the scratch memory of reference kernels as TFLM plans them: exact, but for
            `uncounted_scratch_ops` and for other kernels (CMSIS-NN asks for more).
        lower_bound_bytes: What is alive at once in the fullest step; no plan takes less.
        scratch_bytes: The largest scratch memory of one operation, counted in `activation_bytes`.
        persistent_bytes: TFLM's own data that stays: tensors, nodes, kernels. An estimate.
        arena_bytes: What to give the interpreter. An estimate: the larger of activations and of what planning takes,
            and the persistent bytes with a margin of a quarter.
        uncounted_scratch_ops: Operations whose kernels ask for scratch memory that is not counted.
    """

    activation_bytes: int
    lower_bound_bytes: int
    scratch_bytes: int
    persistent_bytes: int
    arena_bytes: int
    uncounted_scratch_ops: tuple[str, ...]


def memory(model: Any, name: str) -> Memory:
    """Work out what a file needs.

    Args:
        model: What `tflite_graph.parse` gives.
        name: The file's name, for the message.

    Raises:
        ExportError: If it has several graphs, or a tensor without a fixed size.
    """
    if len(model.subgraphs) != 1:
        raise ExportError(
            f"{name} holds {len(model.subgraphs)} graphs (control flow or several signatures); memory is planned for "
            "files with one. Export one network without branches"
        )
    graph = model.subgraphs[0]
    sizes = [_size_bytes(tensor, name) for tensor in graph.tensors]
    scratch = [list(_scratch_sizes(model, graph, op)) for op in graph.operators]
    buffers = list(_activations(model, graph, sizes))
    buffers += [Buffer(size, step, step) for step, needed in enumerate(scratch, 1) for size in needed if size]
    planned = plan(buffers)
    persistent = _persistent_bytes(model, graph, sizes)
    temporary = max(
        _ALLOCATION_INFO * (len(graph.tensors) + sum(map(len, scratch))) + _PLANNER_ENTRY * len(buffers),
        max((_prepare_bytes(graph, op) for op in graph.operators), default=0),
    )
    used = max(planned.size_bytes, temporary + _SCRATCH_REQUESTS)
    uncounted = {tflite_graph.op_name(model, op) for op in graph.operators if _is_uncounted(model, graph, op)}
    return Memory(
        activation_bytes=planned.size_bytes,
        lower_bound_bytes=planned.lower_bound_bytes,
        scratch_bytes=max((sum(map(aligned, needed)) for needed in scratch), default=0),
        persistent_bytes=persistent,
        arena_bytes=used + aligned(math.ceil(persistent * (1 + MARGIN))),
        uncounted_scratch_ops=tuple(sorted(uncounted)),
    )


def _activations(model: Any, graph: Any, sizes: list[int]) -> Iterator[Buffer]:
    """Every tensor that is planned, alive from when to when; step 0 lies before the first operation."""
    first = dict.fromkeys((int(index) for index in (*graph.inputs, *graph.outputs)), 0)
    last = dict(first)
    for step, op in enumerate(graph.operators, 1):
        first.update((int(index), step) for index in op.outputs)
        last.update((int(index), step) for index in (*op.inputs, *op.outputs) if index >= 0)
    last.update((int(index), len(graph.operators)) for index in graph.outputs)
    offsets = _offline_offsets(model, len(graph.tensors))
    for index, tensor in enumerate(graph.tensors):
        if sizes[index] and not tensor.isVariable and not _constant_bytes(model, tensor):
            # What nothing makes (the scratch tensors of Vela) TFLM keeps from before the inputs.
            yield Buffer(sizes[index], first.get(index, -1), last.get(index, -1), offsets.get(index))


def _offline_offsets(model: Any, count: int) -> dict[int, int]:
    """The places that a compiler gave tensors: a version, a graph, how many, and one offset each, -1 for none."""
    for entry in model.metadata or []:
        entry_name = entry.name.decode() if isinstance(entry.name, bytes) else entry.name
        if entry_name == _OFFLINE_PLAN:
            data = bytes(model.buffers[entry.buffer].data)[12 : 12 + 4 * count]
            return {index: offset for index, (offset,) in enumerate(struct.iter_unpack("<i", data)) if offset >= 0}
    return {}


def _scratch_sizes(model: Any, graph: Any, op: Any) -> Iterator[int]:
    """What the reference kernels of quantized operations ask for (reduce_common.cc, transpose_conv.cc)."""
    kind = tflite_graph.op_name(model, op)
    if kind in ("MEAN", "SUM") and _bits(graph, op.inputs[0]) in (8, 16):
        yield 4 * _count(graph.tensors[op.outputs[0]])
    elif kind in ("REDUCE_MAX", "REDUCE_MIN"):
        yield 4 * _rank(graph.tensors[op.inputs[0]])
        yield 4 * _count(graph.tensors[op.inputs[1]])
    elif kind == "TRANSPOSE_CONV":
        yield (8 if _bits(graph, op.inputs[2]) == 16 else 4) * _count(graph.tensors[op.outputs[0]])


def _is_uncounted(model: Any, graph: Any, op: Any) -> bool:
    return tflite_graph.op_name(model, op) in _UNCOUNTED or any(
        _bits(graph, index) == 4 for index in op.inputs if index >= 0
    )


def _persistent_bytes(model: Any, graph: Any, sizes: list[int]) -> int:
    """Allocators, a record for each tensor and node, and for each kernel its data and two integers a channel."""
    ends = len(graph.inputs) + len(graph.outputs)
    variables = sum(aligned(size) for size, tensor in zip(sizes, graph.tensors, strict=True) if tensor.isVariable)
    kernels = 0
    for op in graph.operators:
        channels = max((_channels(graph.tensors[index]) for index in op.inputs if index >= 0), default=0)
        kernels += aligned(_KERNEL_DATA) + 2 * aligned(_CHANNEL_DATA // 2 * channels if channels > 1 else 0)
    return (
        _ALLOCATORS
        + _EVAL_TENSOR * len(graph.tensors)
        + _NODE * len(graph.operators)
        + _END_TENSOR * ends
        + variables
        + kernels
    )


def _prepare_bytes(graph: Any, op: Any) -> int:
    """What TFLM unpacks for a while to prepare one operation: its tensors with their zero points."""
    tensors = [graph.tensors[index] for index in (*op.inputs, *op.outputs) if index >= 0]
    return sum(_TEMPORARY_TENSOR + 4 * _channels(tensor) for tensor in tensors)


def _channels(tensor: Any) -> int:
    scales = None if tensor.quantization is None else tensor.quantization.scale
    return 0 if scales is None else len(scales)


def _constant_bytes(model: Any, tensor: Any) -> int:
    data = model.buffers[tensor.buffer].data
    return 0 if data is None else len(data)


def _rank(tensor: Any) -> int:
    return 0 if tensor.shape is None else len(tensor.shape)


def _count(tensor: Any) -> int:
    return 1 if tensor.shape is None else math.prod(int(size) for size in tensor.shape)


def _bits(graph: Any, index: int) -> int:
    return _BITS.get(tflite_graph.type_name(graph.tensors[index]), 0)


def _size_bytes(tensor: Any, name: str) -> int:
    kind = tflite_graph.type_name(tensor)
    if kind not in _BITS:
        raise ExportError(
            f"{name} has a tensor of the type {kind}; TensorFlow Lite Micro plans {', '.join(sorted(_BITS))}"
        )
    shape = [] if tensor.shape is None else [int(size) for size in tensor.shape]
    if min(shape, default=0) < 0:
        raise ExportError(f"{name} has a tensor of the shape {shape}; export it with fixed sizes")
    return -(-_count(tensor) * _BITS[kind] // 8)
