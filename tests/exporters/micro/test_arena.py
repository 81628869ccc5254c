"""The plan of one arena: nothing that lives at one time overlaps, and lifetimes are those of TensorFlow Lite Micro."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
from flat_files import residual

from lightning_edge.exporters.micro import arena
from lightning_edge.exporters.micro.arena import ALIGNMENT_BYTES, Buffer, plan


def rounded(size_bytes: int) -> int:
    return (size_bytes + ALIGNMENT_BYTES - 1) // ALIGNMENT_BYTES * ALIGNMENT_BYTES


def collisions(buffers: list[Buffer], offsets: tuple[int, ...]) -> list[tuple[Buffer, Buffer]]:
    """Pairs that share a byte at a step, found step by step and not by comparing ends as the planner does."""
    found = []
    for (one, at), (other, beside) in combinations(zip(buffers, offsets, strict=True), 2):
        steps = set(range(one.first_use, one.last_use + 1)) & set(range(other.first_use, other.last_use + 1))
        if steps and set(range(at, at + one.size_bytes)) & set(range(beside, beside + other.size_bytes)):
            found.append((one, other))
    return found


def graph(seed: int) -> list[Buffer]:
    """A chain of operations with skips, as networks are."""
    chance = random.Random(seed)
    steps = chance.randint(1, 25)
    return [
        Buffer(chance.choice([1, 7, 16, 100, 640, 1000]), step, min(steps, step + chance.choice([0, 1, 1, 1, 4])))
        for step in range(steps)
        for _ in range(chance.choice([1, 1, 2]))
    ]


@pytest.mark.parametrize("seed", range(40))
def test_a_plan_holds(seed: int) -> None:
    buffers = graph(seed)
    found = plan(buffers)
    assert collisions(buffers, found.offsets) == []
    assert all(offset % ALIGNMENT_BYTES == 0 for offset in found.offsets)
    ends = [offset + rounded(buffer.size_bytes) for buffer, offset in zip(buffers, found.offsets, strict=True)]
    assert found.activation_bytes == max(ends)
    steps = range(max(buffer.last_use for buffer in buffers) + 1)
    alive = [sum(rounded(b.size_bytes) for b in buffers if b.first_use <= step <= b.last_use) for step in steps]
    assert (
        found.lower_bound_bytes == max(alive) <= found.activation_bytes <= sum(rounded(b.size_bytes) for b in buffers)
    )


def test_collisions_are_seen() -> None:
    buffers = [Buffer(32, 0, 1), Buffer(16, 1, 2)]
    assert len(collisions(buffers, (0, 16))) == 1
    assert collisions(buffers, (0, 32)) == []


def test_an_example_by_hand() -> None:
    # 64 goes to the bottom. 48 lives beside it: on top. 32 lives beside 48 alone: below it, where 64 was.
    # 16 lives beside 48 and 32: in the gap between them.
    buffers = [Buffer(64, 0, 1), Buffer(48, 1, 2), Buffer(32, 2, 3), Buffer(16, 2, 3)]
    found = plan(buffers)
    assert found.offsets == (0, 64, 0, 32)
    assert (found.activation_bytes, found.lower_bound_bytes) == (112, 112)


def test_of_one_size_the_last_comes_first() -> None:
    assert plan([Buffer(16, 0, 1), Buffer(16, 1, 2), Buffer(16, 2, 3)]).offsets == (0, 16, 0)
    assert plan([Buffer(16, 0, 0), Buffer(16, 0, 0)]).offsets == (16, 0)


def test_greedy_can_lie_above_the_bound() -> None:
    # 96 bytes would do, were 48 put above 48 and not beside 64.
    buffers = [Buffer(64, 0, 0), Buffer(48, 0, 1), Buffer(48, 1, 2), Buffer(64, 2, 2), Buffer(32, 1, 1)]
    found = plan(buffers)
    assert collisions(buffers, found.offsets) == []
    assert found.activation_bytes > found.lower_bound_bytes


def test_a_chain_needs_its_two_largest_neighbours() -> None:
    sizes = [160, 320, 80, 640, 16]
    found = plan([Buffer(size, step, step + 1) for step, size in enumerate(sizes)])
    assert found.activation_bytes == found.lower_bound_bytes == max(one + other for one, other in pairwise(sizes))


def test_nothing_needs_nothing() -> None:
    assert plan([]) == arena.Plan((), 0, 0)


@pytest.mark.parametrize(("arguments", "message"), [((-1, 0, 0), "given -1"), ((1, 2, 1), "before the first use 2")])
def test_no_such_buffer(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buffer(*arguments)


def test_lifetimes() -> None:
    assert arena.activations(residual()) == [
        Buffer(16, 0, 1, "t0"),
        Buffer(8, 1, 4, "t1"),
        Buffer(40, 2, 3, "t2"),
        Buffer(8, 3, 4, "t3"),
        Buffer(2, 4, 4, "t4"),
        Buffer(3, 0, 0, "t6"),
    ]


def test_a_variable_has_memory_of_its_own() -> None:
    model = residual()
    model.subgraphs[0].tensors[2].isVariable = True
    assert "t2" not in {buffer.name for buffer in arena.activations(model)}
    assert arena.variable_bytes(model) == 48


def test_bytes_follow_the_type() -> None:
    from ai_edge_litert import schema_py_generated as schema

    model = residual()
    model.subgraphs[0].tensors[2].type = schema.TensorType.INT32
    assert arena.tensor_bytes(model.subgraphs[0].tensors[2]) == 160
    model.subgraphs[0].tensors[2].type = schema.TensorType.STRING
    with pytest.raises(ValueError, match=r"tensor 't2' is of type string; allowed: .*int8"):
        arena.activations(model)


def test_an_open_batch_is_taken_as_stored_and_no_other_size() -> None:
    model = residual()
    model.subgraphs[0].tensors[2].shapeSignature = [-1, 40]
    assert arena.activations(model) == arena.activations(residual())
    model.subgraphs[0].tensors[2].shapeSignature = [1, -1]
    with pytest.raises(ValueError, match=r"'t2' is not fixed: \[1, -1\]"):
        arena.activations(model)


def test_one_graph_only() -> None:
    model = residual()
    model.subgraphs = model.subgraphs * 2
    with pytest.raises(ValueError, match="it holds 2 graphs"):
        arena.activations(model)
