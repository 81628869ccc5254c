"""Captures wait for each other, and collections pass over what is in memory already."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from lightning_edge.tracing import tracing


class Ring:
    """An object that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """Undo what conftest does for all tests, meanwhile."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_collections_look_at_what_is_new_only_and_at_all_again_afterwards() -> None:
    gc.disable()
    try:
        old = weakref.ref(Ring())
        with tracing():
            new = weakref.ref(Ring())
            with tracing():
                gc.collect()
            assert old() is not None
            assert new() is None
            assert gc.get_freeze_count() > 1000  # the inner context leaves that to the outer one
        assert gc.get_freeze_count() == 0
        gc.collect()
        assert old() is None
    finally:
        gc.enable()


def test_an_error_ends_it_too() -> None:
    with pytest.raises(KeyError), tracing():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_a_program_has_frozen_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    made = [Ring() for _ in range(1000)]
    with tracing():
        # No more than before: what is made since is not frozen. Other threads may let go of some.
        assert frozen - 900 < gc.get_freeze_count() <= frozen
    assert frozen - 900 < gc.get_freeze_count() <= frozen
    assert len(made) == 1000


def test_another_thread_waits() -> None:
    order: list[str] = []

    def other() -> None:
        with tracing():
            order.append("other")

    with tracing():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]
