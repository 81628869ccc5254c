"""Numbers with their nouns."""

from __future__ import annotations

from lightning_edge.wording import counted


def test_a_noun_follows_its_number() -> None:
    assert [counted(number, "layer") for number in (0, 1, 2, 1200)] == [
        "0 layers",
        "1 layer",
        "2 layers",
        "1,200 layers",
    ]
    assert (counted(1, "batch", "batches"), counted(3, "batch", "batches")) == ("1 batch", "3 batches")
