"""The memory that the activations of a TensorFlow Lite file need at once, planned as TensorFlow Lite Micro plans it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from lightning_edge.exporters.tflite.graph import dtype_name

# TensorFlow Lite Micro starts every buffer at a multiple of this, and rounds its size up to one.
ALIGNMENT_BYTES = 16
# Bytes of a value in memory; int4 activations, which TensorFlow Lite Micro unpacks, take a byte each.
_WIDTHS = {
    "bool": 1,
    "int4": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}


@dataclass(frozen=True)
class Buffer:
    """Memory that is needed from one step to another.

    Attributes:
        size_bytes: Its size.
        first_use: The step that first writes it.
        last_use: The last step that reads or writes it, itself included.
        name: What it holds, for messages.
    """

    size_bytes: int
    first_use: int
    last_use: int
    name: str = ""

    def __post_init__(self) -> None:
        """Refuse what no plan can hold.

        Raises:
            ValueError: If the size is negative, or the last use is before the first.
        """
        if self.size_bytes < 0:
            raise ValueError(f"size_bytes: given {self.size_bytes}, allowed 0 and more")
        if self.last_use < self.first_use:
            raise ValueError(f"last_use: given {self.last_use}, before the first use {self.first_use}")


@dataclass(frozen=True)
class Plan:
    """Where buffers lie in one arena.

    Attributes:
        offsets: The first byte of each buffer, in the order they were given.
        activation_bytes: The end of the buffer that lies highest: what the arena needs for all of them.
        lower_bound_bytes: The most bytes that live at one step, sizes rounded up to the alignment: no plan of such
            sizes takes less.
    """

    offsets: tuple[int, ...]
    activation_bytes: int
    lower_bound_bytes: int


def plan(buffers: Sequence[Buffer]) -> Plan:
    """Lay buffers out so that no two that live at one step overlap: the largest first, each in the lowest gap it fits.

    This is greedy by size, the method of Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference"
    (2020, arXiv:2001.03288), in the form of TensorFlow Lite Micro's ``GreedyMemoryPlanner``: sizes are rounded up to
    16 bytes, and of buffers of one size the last given comes first.

    Args:
        buffers: What to lay out.

    Returns:
        The plan; of no buffers, one of no bytes.
    """
    sizes = [aligned(buffer.size_bytes) for buffer in buffers]
    offsets = [0] * len(buffers)
    placed: list[int] = []  # by offset
    for index in sorted(range(len(buffers)), key=lambda index: (-sizes[index], -index)):
        offset = 0
        for other in placed:
            if not _together(buffers[index], buffers[other]):
                continue
            if offsets[other] - offset >= sizes[index]:
                break
            offset = max(offset, offsets[other] + sizes[other])
        offsets[index] = offset
        placed.insert(bisect_right(placed, offset, key=lambda other: offsets[other]), index)
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    return Plan(tuple(offsets), max(ends, default=0), _most_alive(buffers, sizes))


def activations(model: Any) -> list[Buffer]:
    """Read which tensors of a file need memory while it runs, and from which operation to which.

    As TensorFlow Lite Micro counts: step 0 is before the first operation and writes the inputs, step ``n`` is the n-th
    operation. A tensor lives from the operation that writes it to the last that reads it, an output of the graph to the
    end, and an input, even one that nothing reads, from the start. Constants lie in the file and variables in memory of
    their own (`variable_bytes`), so neither is here. The output of RESHAPE is a buffer as any other: the kernel copies.

    Args:
        model: A file as `parse` gives it, of one graph.

    Returns:
        A buffer for each, in the order of the file's tensors. What kernels ask for beside them is `scratch.scratch`.

    Raises:
        ValueError: If there is more than one graph, a shape is not fixed, or a type has no fixed width.
    """
    if len(model.subgraphs) != 1:
        raise ValueError(f"it holds {len(model.subgraphs)} graphs; give a file of one")
    graph = model.subgraphs[0]
    inputs = {int(index) for index in graph.inputs}
    outputs = {int(index) for index in graph.outputs}
    first = dict.fromkeys(sorted(inputs | outputs), 0)
    last = dict(first)
    for step, op in enumerate(graph.operators, start=1):
        for index in op.outputs:
            first[int(index)] = last[int(index)] = step
        for index in op.inputs:
            if index >= 0:
                last[int(index)] = step
    last |= dict.fromkeys(outputs, len(graph.operators))
    found = []
    for index, tensor in enumerate(graph.tensors):
        if index in first and not tensor.isVariable and not _is_constant(model, tensor):
            size_bytes = tensor_bytes(tensor)
            if size_bytes:
                found.append(Buffer(size_bytes, first[index], last[index], tensor_name(tensor)))
    return found


def variable_bytes(model: Any) -> int:
    """Count the bytes of variables, which keep their value from run to run and so share memory with nothing.

    Raises:
        ValueError: If a shape is not fixed, or a type has no fixed width.
    """
    tensors = [tensor for graph in model.subgraphs for tensor in graph.tensors if tensor.isVariable]
    return sum(aligned(tensor_bytes(tensor)) for tensor in tensors)


def tensor_bytes(tensor: Any) -> int:
    """Count the bytes of a tensor's values in memory.

    The shape is the one that is stored. A first size that the file lets a caller change is taken as stored, which is
    what TensorFlow Lite Micro allocates: converters leave the batch open.

    Raises:
        ValueError: If another size can change, or its type has no fixed width.
    """
    shape = [] if tensor.shape is None else [int(size) for size in tensor.shape]
    signature = shape if tensor.shapeSignature is None else [int(size) for size in tensor.shapeSignature]
    if min(shape, default=1) < 0 or min(signature[1:], default=1) < 0:
        raise ValueError(f"the shape of tensor {tensor_name(tensor)!r} is not fixed: {signature}")
    dtype = dtype_name(tensor.type)
    if dtype not in _WIDTHS:
        raise ValueError(f"tensor {tensor_name(tensor)!r} is of type {dtype}; allowed: {', '.join(_WIDTHS)}")
    return prod(shape) * _WIDTHS[dtype]


def tensor_name(tensor: Any) -> str:
    """The name of a tensor as text."""
    return tensor.name.decode(errors="replace") if isinstance(tensor.name, bytes) else str(tensor.name)


def _most_alive(buffers: Sequence[Buffer], sizes: Sequence[int]) -> int:
    """The most bytes at one step; it is reached where some buffer begins."""
    return max(
        (
            sum(size for other, size in zip(buffers, sizes, strict=True) if other.first_use <= step <= other.last_use)
            for step in {buffer.first_use for buffer in buffers}
        ),
        default=0,
    )


def _together(one: Buffer, other: Buffer) -> bool:
    return one.first_use <= other.last_use and other.first_use <= one.last_use


def aligned(size_bytes: int) -> int:
    """Round up to `ALIGNMENT_BYTES`."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _is_constant(model: Any, tensor: Any) -> bool:
    data = model.buffers[tensor.buffer].data
    return data is not None and len(data) > 0
