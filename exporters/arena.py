"""Where TensorFlow Lite Micro puts what lives for a while: the plan of its GreedyMemoryPlanner, without TFLM.

Knows no file format: buffers with a size and a time in, offsets out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What MicroArenaBufferAlignment() returns.
ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Buffer:
    """Something that needs memory for a while.

    Attributes:
        size_bytes: Its size, rounded up to `ALIGNMENT_BYTES` where it is planned.
        first_step: The step that makes it.
        last_step: The last step that reads it; it is alive in both and between.
        offset_bytes: Where it lies, for one that was placed before (a compiler's plan); else ``None``.
    """

    size_bytes: int
    first_step: int
    last_step: int
    offset_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.size_bytes < 1:
            raise ValueError(f"size_bytes={self.size_bytes} is not allowed; give 1 or more")
        if self.first_step > self.last_step:
            raise ValueError(f"first_step={self.first_step} lies after last_step={self.last_step}; swap them")


@dataclass(frozen=True)
class Plan:
    """Where every buffer lies.

    Attributes:
        offsets_bytes: An offset for each buffer, in the order they were given.
        size_bytes: Memory that the plan takes.
        lower_bound_bytes: What is alive at once in the fullest step: no plan takes less.
    """

    offsets_bytes: tuple[int, ...]
    size_bytes: int
    lower_bound_bytes: int


def aligned(size_bytes: int) -> int:
    """Round up to a multiple of `ALIGNMENT_BYTES`."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def plan(buffers: Sequence[Buffer]) -> Plan:
    """Place buffers so that no two that are alive in one step overlap.

    Greedy by size: the largest first, each in the lowest gap that holds it between those that are alive with it; of
    equal sizes the one given last goes first. This is TensorFlow Lite Micro's GreedyMemoryPlanner
    (tensorflow/lite/micro/memory_planner/greedy_memory_planner.cc) to the byte, after "greedy by size" of Pisarchyk
    and Lee, Efficient Memory Management for Deep Neural Net Inference (arXiv:2001.03288). Buffers with an offset of
    their own keep it, are placed first, and may overlap each other.

    Args:
        buffers: What is to be placed.
    """
    sizes = [aligned(buffer.size_bytes) for buffer in buffers]
    offsets: dict[int, int] = {}
    fixed = [index for index, buffer in enumerate(buffers) if buffer.offset_bytes is not None]
    free = [index for index, buffer in enumerate(buffers) if buffer.offset_bytes is None]
    for index in fixed:
        offsets[index] = int(buffers[index].offset_bytes or 0)
    for index in sorted(free, key=lambda index: (-sizes[index], -index)):
        alive = sorted(
            (offset, sizes[other]) for other, offset in offsets.items() if _together(buffers[index], buffers[other])
        )
        lowest = 0
        for offset, size in alive:
            if offset - lowest >= sizes[index]:
                break
            lowest = max(lowest, offset + size)
        offsets[index] = lowest
    return Plan(
        offsets_bytes=tuple(offsets[index] for index in range(len(buffers))),
        size_bytes=max((offsets[index] + size for index, size in enumerate(sizes)), default=0),
        lower_bound_bytes=_lower_bound(buffers, sizes),
    )


def _together(one: Buffer, other: Buffer) -> bool:
    return one.first_step <= other.last_step and other.first_step <= one.last_step


def _lower_bound(buffers: Sequence[Buffer], sizes: Sequence[int]) -> int:
    """The fullest step is one in which something is made; what was placed before may overlap, so its end counts."""
    sized = list(zip(buffers, sizes, strict=True))
    free = [(buffer, size) for buffer, size in sized if buffer.offset_bytes is None]
    placed = [buffer.offset_bytes + size for buffer, size in sized if buffer.offset_bytes is not None]
    live = [
        sum(size for buffer, size in free if buffer.first_step <= step <= buffer.last_step)
        for step in {buffer.first_step for buffer, _ in free}
    ]
    return max([*placed, *live], default=0)
