"""The graph that is run keeps channels innermost in memory, and no line of the user's notices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_edge.network import Inputs
from lightning_edge.quantization import attach, calibrate
from lightning_edge.quantization.train import fused
from lightning_edge.quantization.train.memory_format import in_memory_order, in_order_of

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Spread(nn.Module):
    """Convolutions between views of their outputs, as user code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)  # behind BatchNorm its gradient is zero
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.ConvTranspose2d(8, 4, 2, 2)
        self.last = nn.Linear(8 * 36, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.norm(self.first(x)).relu()
        return {
            "maps": self.second(features),
            "tokens": features.flatten(2),
            "logits": self.last(features.view(features.shape[0], -1)),
        }


class Strided(nn.Module):
    """Reads its features by their place in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_strided(self.first(x), (x.shape[0], 8), (8 * 36, 36))


@torch.library.custom_op("edge_tests::first_row", mutates_args=())
def first_row(x: Tensor) -> Tensor:
    """The first values of each sample as they lie in memory, as a kernel written for one order reads them."""
    return x.as_strided((x.shape[0], 6), (x[0].numel(), 1)).clone()


@first_row.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 6)


class ForeignKernel(nn.Module):
    """Has a kernel that counts on the order of the uncompressed network."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return first_row(self.first(x))


def _quantized(network: nn.Module, images: Tensor) -> nn.Module:
    attach(network, Inputs.of(images))
    calibrate(network, Inputs.of(images))
    return network.train()


def _convolution_inputs(network: nn.Module, images: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.convolution.default:
                seen.append(args[0])
            return function(*args, **(kwargs or {}))

    with Watch():
        network(images)
    return seen


def _last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def test_convolutions_get_channels_innermost() -> None:
    images = torch.randn(4, 3, 6, 6)
    inputs = _convolution_inputs(_quantized(Spread(), images), images)
    assert len(inputs) == 2
    assert all(_last(x) and not x.is_contiguous() for x in inputs)
    # Other float types, which oneDNN does not have, are left alone.
    inputs = _convolution_inputs(_quantized(Spread().double(), images.double()), images.double())
    assert len(inputs) == 2
    assert all(x.is_contiguous() for x in inputs)


def test_outputs_are_in_the_order_of_the_float_network() -> None:
    images = torch.randn(4, 3, 6, 6)
    expected = Spread()(images)
    outputs = _quantized(Spread(), images)(images)
    strides, others = ({name: value.stride() for name, value in result.items()} for result in (outputs, expected))
    assert strides == others
    assert outputs["maps"].view(4, -1).shape == (4, 4 * 12 * 12)


@pytest.mark.parametrize("live", [False, True])
def test_values_and_gradients_are_those_of_the_other_order(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, images = Spread(), torch.randn(4, 3, 6, 6)

    def step(arrange: Callable[[Any], None]) -> tuple[dict[str, Tensor], list[Tensor]]:
        monkeypatch.setattr(fused, "put_channels_innermost", arrange)
        trained = copy.deepcopy(network)
        attach(trained, Inputs.of(images), live_batch_norm=live)
        calibrate(trained, Inputs.of(images))
        outputs = trained.train()(images)
        torch.stack([value.square().mean() for value in outputs.values()]).sum().backward()
        return outputs, [p.grad for p in trained.parameters() if p.grad is not None]

    innermost, as_ever = step(fused.put_channels_innermost), step(lambda graph: None)
    # A sum in another order may put a value on the other side of a rounding: one step of 255.
    for name, value in as_ever[0].items():
        limit = float(value.detach().abs().max()) / 100
        torch.testing.assert_close(innermost[0][name], value, rtol=0, atol=limit)
    assert len(innermost[1]) == len(as_ever[1]) > 4
    for ours, theirs in zip(innermost[1], as_ever[1], strict=True):
        assert float((ours - theirs).norm()) <= 0.02 * float(theirs.norm())


@pytest.mark.parametrize("make", [Strided, ForeignKernel])
def test_a_graph_that_looks_at_memory_stays_as_it_is(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network, images = make(), torch.randn(4, 3, 6, 6)
    expected = network(images)
    outputs = _quantized(network, images)(images)
    assert float((outputs - expected).detach().abs().max()) <= 0.05 * float(expected.detach().abs().max())


def test_in_memory_order() -> None:
    x = torch.randn(2, 3, 4, 5)
    for ordered in (x, x.contiguous(memory_format=torch.channels_last)):
        row = in_memory_order(ordered)
        assert row is not None
        assert row.data_ptr() == ordered.data_ptr()
        assert row.stride() == (1,)
        assert torch.equal(row.sort().values, x.flatten().sort().values)
    assert in_memory_order(x[:, :, ::2]) is None
    assert in_memory_order(x.transpose(1, 2)) is None


def test_gradients_follow_their_images() -> None:
    images, gradient = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert in_order_of(gradient, images) is gradient
    moved = in_order_of(gradient, images.contiguous(memory_format=torch.channels_last))
    assert _last(moved)
    assert torch.equal(moved, gradient)
    flat = torch.randn(2, 3)
    assert in_order_of(flat, flat) is flat
