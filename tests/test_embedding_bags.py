"""Embedding bags of equal length are rows that are looked up and summed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_edge.exporters.program import deployable
from lightning_edge.plain_calls import PlainCalls


@pytest.mark.parametrize("padding", [None, 3, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_values_are_those_of_torch(mode: str, padding: int | None) -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(20, 8, mode=mode, padding_idx=padding)
    ids = torch.randint(0, 20, (4, 6))
    ids[0], ids[1, :3] = (padding or 0) % 20, (padding or 0) % 20
    wanted = bag(ids)
    with PlainCalls():
        torch.testing.assert_close(bag(ids), wanted)
    if mode == "sum":
        factors = torch.rand(4, 6)
        wanted = bag(ids, per_sample_weights=factors)
        with PlainCalls():
            torch.testing.assert_close(bag(ids, per_sample_weights=factors), wanted)


def test_bags_of_different_lengths_stay() -> None:
    bag = nn.EmbeddingBag(20, 8)
    ids, offsets = torch.arange(6), torch.tensor([0, 2])
    with PlainCalls():
        assert torch.equal(bag(ids, offsets), torch.stack([bag.weight[:2].mean(0), bag.weight[2:6].mean(0)]))


def test_programs_hold_embeddings() -> None:
    network = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 2))
    graph = deployable(network, torch.randint(0, 20, (1, 6))).program().graph
    found = {str(node.target) for node in graph.nodes}
    assert "aten.embedding.default" in found
    assert not any("embedding_bag" in name for name in found)
