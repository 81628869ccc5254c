"""What forward() writes in place, and the tensors that it makes of numbers alone."""

from __future__ import annotations

import copy

import pytest
import torch
from test_user_modules import User, close_and_converted, images
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.quantization import attach, quantize, quantized_forward

F = nn.functional


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_in_place_operations_without_a_view_work() -> None:
    def function(_: nn.Module, y: Tensor) -> Tensor:
        z = F.relu_(y)
        z = z * 2
        z += y
        return z

    close_and_converted(User(function), images)


def table(side: int) -> Tensor:
    """Relative positions, written part by part, as BEiT makes them in each call."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([y, x]).flatten(1)
    relative = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0).contiguous()
    relative[:, :, 0] += side - 1
    before = relative.sum(-1)
    relative[:, :, 0] *= 2 * side - 1
    found = torch.zeros(side**2 + 1, side**2 + 1, dtype=torch.int64)
    found[1:, 1:] = relative.sum(-1) + before
    found[0, 0:] = torch.tensor(7)
    found.view(-1)[0] = 9
    return found


def rows() -> Tensor:
    """Numbers that are made of what was written into, and lie in a tensor of their own."""
    steps = torch.arange(8)
    steps[4:] += 2
    return steps.flip(0) * 2


def test_tables_that_are_written_in_forward_are_constants() -> None:
    def function(network: nn.Module, y: Tensor) -> Tensor:
        bias = network.bias[table(2)].mean(-1)  # type: ignore[index]
        return y * bias[0, 1] + bias[1:3].sum() + network.bias[rows()].mean()  # type: ignore[index]

    network = User(function)
    network.bias = nn.Parameter(torch.randn(32, 8) / 4)
    quantized = close_and_converted(network, images)
    written = [buffer for name, buffer in quantized.named_buffers() if "written_in" in name]
    for expected in (table(2), rows()):
        assert any(torch.equal(buffer, expected) for buffer in written)
    child = quantized_forward(quantized)[1]
    assert not any("written_in" in name for name in child.state_dict())


def test_what_the_input_is_written_into_is_no_constant() -> None:
    def function(_: nn.Module, y: Tensor) -> Tensor:
        places = torch.zeros(8)
        places[:4] = y.mean((0, 2, 3))[:4]
        return y + places[:, None, None]

    with pytest.raises(CompressionError, match="writes in place"):
        quantize(User(function).eval(), [images()])


class Scaled(nn.Module):
    """Makes a tensor of a number in forward, in a submodule."""

    def forward(self, y: Tensor) -> Tensor:
        return torch.where(y > torch.tensor(1.5), torch.tensor(1.5), y)


def test_numbers_made_tensors_in_a_submodule() -> None:
    def build() -> User:
        return User(lambda s, y: s.inside[0](y), inside=nn.Sequential(Scaled()))

    quantized = close_and_converted(build(), images)
    copied = copy.deepcopy(quantized)
    batch = images()
    torch.testing.assert_close(copied(batch), quantized(batch), rtol=0, atol=0)
    trained = build()
    attach(trained, Inputs.of(batch))
    trained.train()(batch).sum().backward()
    assert trained.conv.weight.grad is not None
    assert not any("lifted" in name for name in trained.state_dict())
