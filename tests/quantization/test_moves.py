"""Operations that only move values: one range in front and behind, which runtimes ask for, and no rounding between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_edge import quantize
from lightning_edge.exporters import export
from lightning_edge.exporters.passes.graph import operation
from lightning_edge.quantization import convert

Move = Callable[[Tensor], Tensor]

MOVES: dict[str, Move] = {
    "reshape_as": lambda x: x.flatten(2).reshape_as(x),
    "view_as": lambda x: x.flatten(2).view_as(x),
    "broadcast_to": lambda x: torch.broadcast_to(x[:, :, :1], x.shape),
    "adjoint": lambda x: x.adjoint(),
    "type_as": lambda x: x.type_as(x),
    "rot90": lambda x: torch.rot90(x, 1, [2, 3]),
    "atleast_3d": torch.atleast_3d,
    "unfold": lambda x: x.unfold(2, 2, 2),
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 1, 0])),
    "max_pool3d": lambda x: functional.max_pool3d(x.unsqueeze(1), (1, 2, 2)),
    "upsample_nearest1d": lambda x: functional.interpolate(x.flatten(2), scale_factor=2.0),
    "tensor_split": lambda x: torch.tensor_split(x, 2, 1)[1],
    "hsplit": lambda x: torch.hsplit(x, 2)[1],
    "dsplit": lambda x: torch.dsplit(x, 2)[1],
    "unsafe_chunk": lambda x: torch.unsafe_chunk(x, 2, 1)[0],
    "dstack": lambda x: torch.dstack([x, x]),
    "column_stack": lambda x: torch.column_stack([x, x]),
    "einsum": lambda x: torch.einsum("bchw->bhwc", x),
}


class Moving(nn.Module):
    """A convolution, a move, and a product that gives the outputs."""

    def __init__(self, move: Move) -> None:
        super().__init__()
        self.layer, self.move = nn.Conv2d(3, 4, 1), move

    def forward(self, x: Tensor) -> Tensor:
        """Compute."""
        return self.move(self.layer(x)).flatten(1) * 2


def _network(move: Move) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 6, 6)
    return quantize(Moving(move).eval(), [images]), images


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_values_keeps_their_range(name: str) -> None:
    network, _ = _network(MOVES[name])
    graph: Any = convert(network).graph
    ranges = [node.args[1:3] for node in graph.graph.nodes if operation(node) == "quantize_per_tensor"]
    assert len(set(ranges[1:-1])) == 1  # between the input and the product
    assert len(ranges) > 3


@pytest.mark.parametrize("equation", ["bchw->bhc", "bchh->bch", "...hw->...wh"])
def test_an_einsum_that_does_more_stays(equation: str) -> None:
    network, images = _network(lambda x: torch.einsum(equation, x))
    graph: Any = convert(network).graph
    assert "einsum" in {operation(node) for node in graph.graph.nodes}
    assert network(images).isfinite().all()


@pytest.mark.parametrize("name", ["reshape_as", "einsum"])
def test_their_files_load(name: str, tmp_path: Path) -> None:
    # XNNPACK refuses a view of two ranges when it loads the file, LiteRT's converter when it writes it.
    network, _ = _network(MOVES[name])
    for target, suffix in {"executorch": "pte", "tflite": "tflite"}.items():
        judgement = export(network, target, tmp_path / f"network.{suffix}", isolated=False).judgement
        assert judgement is not None
        assert judgement.grade == "exact"


def test_a_float_einsum_of_one_operand_is_written_for_onnx(tmp_path: Path) -> None:
    _, images = _network(MOVES["einsum"])
    file = export(Moving(MOVES["einsum"]).eval(), "onnx", tmp_path / "network.onnx", inputs=images, isolated=False)
    assert file.judgement is not None
    assert file.judgement.grade == "exact"
    assert file.contents.float_compute_ops == ("Conv",)


class Summed(nn.Module):
    """Branches added to a zero and a product with a one, as loops over branches and unset factors have them."""

    def __init__(self, *, written_out: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(2))
        self.written_out = written_out

    def forward(self, x: Tensor) -> Tensor:
        """Compute."""
        if self.written_out:
            return (self.branches[0](x) + self.branches[1](x)).flatten(1)
        total: Tensor = sum(branch(x) for branch in self.branches) * 1.0 / 1 - 0
        return total.flatten(1)


def test_sums_with_zero_and_products_with_one_have_no_quantizer() -> None:
    graphs: list[Any] = []
    for written_out in (False, True):
        torch.manual_seed(0)
        network = Summed(written_out=written_out).eval()
        images = torch.randn(4, 3, 6, 6)
        graphs.append(convert(quantize(network, [images])))
    assert torch.equal(graphs[0](images), graphs[1](images))
    operations = [[operation(node) for node in network.graph.graph.nodes] for network in graphs]
    assert operations[0] == operations[1]
