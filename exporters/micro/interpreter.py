"""What TensorFlow Lite Micro's interpreter keeps in the arena beside the activations, structure by structure.

Sizes are those of its structures in 2025 (``micro_allocator.cc``, ``micro_interpreter.cc``, ``c/common.h`` with
``TF_LITE_STATIC_MEMORY``, the ``OpData`` of each kernel), for pointers of a given width. Where versions and kernels
differ, the larger is taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning_edge.exporters.micro import arena
from lightning_edge.exporters.tflite.graph import op_name

# A microcontroller's; a desktop's, where the Python package tflite-micro runs, is 8.
POINTER_BYTES = 4
_WORD_BYTES = 4


class _Structure(NamedTuple):
    """A C structure: how many words of 32 bits it has, and how many pointers."""

    words: int
    pointers: int = 0

    def size_bytes(self, pointer_bytes: int) -> int:
        words = (
            -(-self.words * _WORD_BYTES // pointer_bytes) * pointer_bytes if self.pointers else self.words * _WORD_BYTES
        )
        return words + self.pointers * pointer_bytes


# The allocators, the planner, the reader of options, and the list of graphs.
_BASE = _Structure(16, 28)
_EVAL_TENSOR = _Structure(1, 2)
# A node and its registration.
_NODE = _Structure(1, 7)
# A tensor as callers see it, with its quantization but for the zero points.
_END_TENSOR = _Structure(7, 3)
_QUANTIZATION = _Structure(1, 2)
_SCRATCH_HANDLE = _Structure(0, 1)

# Options of an operation, parsed. Those of operations that are not here take a pair of words.
_OPTIONS = {
    "AVERAGE_POOL_2D": _Structure(10),
    "CONV_2D": _Structure(7),
    "DEPTHWISE_CONV_2D": _Structure(7),
    "FULLY_CONNECTED": _Structure(8),
    "MAX_POOL_2D": _Structure(10),
    "RESHAPE": _Structure(9),
    "STRIDED_SLICE": _Structure(6),
    "TRANSPOSE": _Structure(0),
    "TRANSPOSE_CONV": _Structure(5),
}
_OTHER_OPTIONS = _Structure(2)

# What the kernel of an operation keeps, with the index of one scratch buffer more for optimized kernels.
_KERNELS = {
    "AVERAGE_POOL_2D": _Structure(9),
    "CONV_2D": _Structure(15, 2),
    "DEPTHWISE_CONV_2D": _Structure(15, 2),
    "EXPAND_DIMS": _Structure(0),
    "FULLY_CONNECTED": _Structure(14, 4),
    "MAX_POOL_2D": _Structure(9),
    "RESHAPE": _Structure(0),
    "SLICE": _Structure(0),
    "SQUEEZE": _Structure(0),
    "TRANSPOSE": _Structure(0),
    "TRANSPOSE_CONV": _Structure(25, 2),
}
_OTHER_KERNEL = _Structure(24)
_CONVOLUTIONS = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"})

# What is in the activations' place for a while: requests for scratch memory, of which twelve are kept free; what is
# known of each tensor and buffer, while it plans; a tensor with its quantization, while a kernel prepares.
_REQUEST = _Structure(2, 1)
_FREE_REQUESTS = 12
_LIFETIME = _Structure(4, 2)
_PLANNED = _Structure(10)
_ZERO_POINT_BYTES = 4
# What alignment between them takes.
_BETWEEN_BYTES = 64


def persistent_bytes(model: Any, scratch_count: int = 0, *, pointer_bytes: int = POINTER_BYTES) -> int:
    """Count what TensorFlow Lite Micro keeps in the arena from ``AllocateTensors`` on, beside the activations.

    An upper bound for the reference kernels and CMSIS-NN's. ``MicroInterpreter::arena_used_bytes()``, on the device,
    is this and the activations.

    Args:
        model: A file as `parse` gives it, of one graph.
        scratch_count: How many scratch buffers the kernels ask for (`scratch.scratch`).
        pointer_bytes: Bytes of a pointer.
    """
    graph = model.subgraphs[0]

    def size(structure: _Structure) -> int:
        return structure.size_bytes(pointer_bytes)

    first = size(_BASE) + len(graph.tensors) * size(_EVAL_TENSOR) + len(graph.operators) * size(_NODE)
    first += scratch_count * size(_SCRATCH_HANDLE)
    kept = 0
    for op in graph.operators:
        name = op_name(model, op)
        first += size(_OPTIONS.get(name, _OTHER_OPTIONS))
        kept += arena.aligned(size(_KERNELS.get(name, _OTHER_KERNEL)))
        kept += 2 * arena.aligned(_WORD_BYTES * _channels(name, op, graph.tensors))
    for indices in (graph.inputs, graph.outputs):
        kept += arena.aligned(pointer_bytes * len(indices))
        kept += sum(_end_bytes(graph.tensors[int(index)], pointer_bytes) for index in indices)
    return arena.aligned(first) + arena.aligned(kept) + arena.variable_bytes(model)


def setup_bytes(model: Any, buffer_count: int, scratch_count: int = 0, *, pointer_bytes: int = POINTER_BYTES) -> int:
    """Count what TensorFlow Lite Micro takes of the activations' place before the first inference.

    It plans with notes of every tensor and buffer, or it prepares an operation with a structure for each of that one's
    tensors and the zero points of their channels, whichever takes more. All of it is gone when inference begins.

    Args:
        model: A file as `parse` gives it, of one graph.
        buffer_count: How many buffers are planned, those of kernels included.
        scratch_count: How many of them are of kernels.
        pointer_bytes: Bytes of a pointer.
    """
    graph = model.subgraphs[0]
    requests = (_FREE_REQUESTS + scratch_count) * _REQUEST.size_bytes(pointer_bytes)
    planning = (len(graph.tensors) + scratch_count) * _LIFETIME.size_bytes(pointer_bytes)
    planning += buffer_count * _PLANNED.size_bytes(pointer_bytes)
    preparing = [
        sum(_end_bytes(graph.tensors[index], pointer_bytes) for index in (*op.inputs, *op.outputs) if index >= 0)
        for op in graph.operators
    ]
    return arena.aligned(requests) + arena.aligned(max(planning, *preparing, 0)) + _BETWEEN_BYTES


def _channels(name: str, op: Any, tensors: list[Any]) -> int:
    """For how many output channels a kernel keeps a multiplier and a shift."""
    output = tensors[int(op.outputs[0])]
    if name in _CONVOLUTIONS:
        return int(output.shape[-1])
    if name != "FULLY_CONNECTED":
        return 0
    # CMSIS-NN computes a layer over rows as a convolution, which has them by channel always.
    over_rows = len(output.shape) > 2
    return int(output.shape[-1]) if over_rows or _scales(tensors[int(op.inputs[1])]) > 1 else 0


def _end_bytes(tensor: Any, pointer_bytes: int) -> int:
    found = _END_TENSOR.size_bytes(pointer_bytes)
    if _scales(tensor):
        zero_points = _ZERO_POINT_BYTES * (1 + _scales(tensor))
        found += _QUANTIZATION.size_bytes(pointer_bytes) + -(-zero_points // pointer_bytes) * pointer_bytes
    return found


def _scales(tensor: Any) -> int:
    return 0 if tensor.quantization is None or tensor.quantization.scale is None else len(tensor.quantization.scale)
