"""The plan of the tensor arena: nothing alive is overwritten, and it is the plan of TensorFlow Lite Micro."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from lightning_edge.exporters.arena import ALIGNMENT_BYTES, Buffer, Plan, aligned, plan


def overlapping(buffers: list[Buffer], planned: Plan) -> list[tuple[int, int]]:
    """Pairs that share a step and a byte."""
    found = []
    for one, other in combinations(range(len(buffers)), 2):
        steps = range(
            max(buffers[one].first_step, buffers[other].first_step),
            min(buffers[one].last_step, buffers[other].last_step) + 1,
        )
        starts = planned.offsets_bytes[one], planned.offsets_bytes[other]
        apart = starts[0] + buffers[one].size_bytes <= starts[1] or starts[1] + buffers[other].size_bytes <= starts[0]
        if steps and not apart:
            found.append((one, other))
    return found


def random_buffers(seed: int) -> list[Buffer]:
    """Activations of a random graph: each step makes one and reads some of the earlier."""
    chance = random.Random(seed)
    count = chance.randint(1, 40)
    last = list(range(count))
    for step in range(1, count):
        for read in chance.sample(range(step), min(step, chance.randint(1, 3))):
            last[read] = step
    return [
        Buffer(chance.choice([1, 16, 17, 100, 4096, chance.randint(1, 9999)]), made, last[made])
        for made in range(count)
    ]


@pytest.mark.parametrize("seed", range(200))
def test_what_is_alive_together_lies_apart(seed: int) -> None:
    buffers = random_buffers(seed)
    planned = plan(buffers)
    assert overlapping(buffers, planned) == []
    assert all(offset % ALIGNMENT_BYTES == 0 for offset in planned.offsets_bytes)
    assert planned.size_bytes == max(
        offset + aligned(buffer.size_bytes) for offset, buffer in zip(planned.offsets_bytes, buffers, strict=True)
    )
    assert planned.lower_bound_bytes <= planned.size_bytes <= sum(aligned(buffer.size_bytes) for buffer in buffers)


def test_an_overlap_is_seen() -> None:
    buffers = [Buffer(16, 0, 1), Buffer(16, 1, 2)]
    assert overlapping(buffers, Plan((0, 0), 16, 32)) == [(0, 1)]
    assert overlapping(buffers, Plan((0, 16), 32, 32)) == []


def test_a_small_network_by_hand() -> None:
    """A chain whose first and last activations share a place, and a shortcut that lives through it."""
    buffers = [
        Buffer(100, 0, 1),  # 112 aligned: input, read by step 1
        Buffer(200, 1, 4),  # 208: the shortcut, added at step 4
        Buffer(60, 2, 3),  # 64
        Buffer(64, 3, 4),  # 64
        Buffer(10, 4, 4),  # 16
    ]
    # By size: 208 at 0, 112 beside it at 208, then the later of the two of 64 at 208 (112 is gone), the other at
    # 272, and 16 in the first gap of step 4, behind 208 and 64.
    assert plan(buffers) == Plan((208, 0, 272, 208, 272), 336, 336)


def test_a_gap_between_two_is_used() -> None:
    buffers = [Buffer(64, 0, 9), Buffer(48, 0, 1), Buffer(32, 0, 9), Buffer(16, 5, 6)]
    assert plan(buffers).offsets_bytes == (0, 64, 112, 64)


def test_of_equal_sizes_the_later_goes_first() -> None:
    assert plan([Buffer(16, 0, 1), Buffer(16, 0, 1), Buffer(16, 0, 1)]).offsets_bytes == (32, 16, 0)


def test_greedy_may_take_more_than_is_alive() -> None:
    """Largest first is not always best: the bound says by how much."""
    found = [plan(random_buffers(seed)) for seed in range(200)]
    assert any(planned.size_bytes > planned.lower_bound_bytes for planned in found)
    assert any(planned.size_bytes == planned.lower_bound_bytes for planned in found)


def test_what_a_compiler_placed_stays() -> None:
    planned = plan([Buffer(64, 0, 3), Buffer(32, 0, 3, offset_bytes=16), Buffer(32, 0, 3, offset_bytes=16)])
    assert planned == Plan((48, 16, 16), 112, 64)


def test_nothing_takes_nothing() -> None:
    assert plan([]) == Plan((), 0, 0)


@pytest.mark.parametrize(
    ("size_bytes", "first_step", "last_step", "told"),
    [(0, 0, 1, "size_bytes=0"), (-5, 0, 1, "size_bytes=-5"), (4, 3, 2, "first_step=3 lies after last_step=2")],
)
def test_a_buffer_that_cannot_be_is_refused(size_bytes: int, first_step: int, last_step: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Buffer(size_bytes, first_step, last_step)
