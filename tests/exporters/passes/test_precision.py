"""What a graph computes in float."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_edge.exporters.passes.precision import float_layers


class Positions(nn.Module):
    """Adds a layer's encoding of positions, which are constants (XCiT has it)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.layer = nn.Linear(2, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).float()
        encoded = self.encode(torch.stack([places.sin(), places.cos()], 1))
        y: Tensor = self.layer(x + encoded.repeat(x.shape[0], 1, 1))
        return y


def test_layers_of_constants_are_none_that_a_file_must_hold() -> None:
    shapes = {"x": {0: torch.export.Dim("batch", min=1)}}
    graph = torch.export.export(Positions(), (torch.randn(2, 5, 4),), dynamic_shapes=shapes).module()
    assert [node.name for node in float_layers(graph)] == ["linear_1"]
