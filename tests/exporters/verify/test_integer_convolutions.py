"""Convolutions that sum integers in float32: the values of float64, and only where float32 gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edge.exporters.verify.exact import exact
from lightning_edge.exporters.verify.integer_convolutions import IntegerConvolution
from lightning_edge.quantization import convert, quantize


def _exact(layer: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, list[Any]]:
    """What a layer gives in float64, what it gives with sums in float32, and the layers that have such sums."""
    converted = convert(quantize(nn.Sequential(layer).eval(), [images]))
    rewritten = exact(converted)
    monkeypatch.setattr("lightning_edge.exporters.verify.exact.convolve_integers", lambda graph: False)
    layers = [module for module in rewritten.modules() if isinstance(module, IntegerConvolution)]
    return exact(converted)(images), rewritten(images), layers


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(8, 4, 5, padding=2), (3, 8, 20)),
        (nn.Conv2d(8, 4, 3, stride=2, padding=1, bias=False), (3, 8, 9, 9)),
        (nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=8), (3, 8, 9, 9)),
        (nn.Conv3d(4, 4, 3, padding=1), (2, 4, 5, 5, 5)),
    ],
    ids=["conv1d", "strided", "depthwise", "conv3d"],
)
def test_the_values_are_those_of_float64(
    layer: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    images = torch.randn(shape)
    expected, given, (found,) = _exact(layer, images, monkeypatch)
    assert len(found.parts) == 1
    assert torch.equal(given, expected)


def test_sums_beyond_float32_are_added_in_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(512, 2, 3)
    nn.init.constant_(layer.weight, 0.1)  # every integer is the largest, so that sums reach 512 * 9 * 127 * 255
    images = torch.rand(2, 512, 4, 4)
    expected, given, (found,) = _exact(layer, images, monkeypatch)
    assert len(found.parts) == 2
    assert torch.equal(given, expected)


def test_a_kernel_that_rounds_is_not_trusted() -> None:
    weight = torch.ones(1, 1, 3, 3)

    def transformed(x: Tensor, weight: Tensor, *options: Any) -> Tensor:
        sums = nn.functional.conv2d(x, weight, *options)
        return sums + 0.25 if x.dtype == torch.float32 else sums

    layer = IntegerConvolution(transformed, (), 0, [(1, weight)], torch.ones(1, dtype=torch.float64), None)
    assert layer(torch.ones(1, 1, 3, 3, dtype=torch.int8)).item() == 9


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.ConvTranspose2d(4, 4, 2, stride=2), (2, 4, 6, 6)), (nn.Conv2d(8192, 1, 3), (1, 8192, 3, 3))],
    ids=["transposed", "beyond two parts"],
)
def test_others_stay_in_float64(layer: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    nn.init.constant_(layer.weight, 0.1)
    expected, given, layers = _exact(layer, torch.rand(shape), monkeypatch)
    assert not layers
    assert torch.equal(given, expected)
