"""Channels of zeros in int8 ONNX files: where they are added, and that no value changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from onnx_files import outputs, weights
from torch import Tensor, nn

from lightning_edge.exporters import deployable, export
from lightning_edge.exporters.onnx.passes import channels as onnx_channels
from lightning_edge.exporters.verify.divergence import first_divergence
from lightning_edge.interface import Interface, Pixels
from lightning_edge.network import Inputs
from lightning_edge.quantization import quantize

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def convolution(read: int, made: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(read, made, kernel, padding=kernel // 2, **options)


class Mobile(nn.Module):
    """Depthwise layers with an excitation, hard-swishes and a sum between layers of single pixels, 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = convolution(3, 8, stride=2)
        self.expand, self.each, self.other = convolution(8, 24, 1), *(convolution(24, 24, groups=24) for _ in range(2))
        self.squeeze, self.excite = convolution(24, 8, 1), convolution(8, 24, 1)
        self.project = convolution(24, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        start = nn.functional.hardswish(self.first(images))
        features = nn.functional.hardswish(self.each(nn.functional.relu6(self.expand(start))))
        features = nn.functional.max_pool2d(features + self.other(features), 2)
        gate = self.excite(nn.functional.relu(self.squeeze(features.mean((2, 3), keepdim=True))))
        features = features * nn.functional.hardsigmoid(gate)
        return self.head(self.project(features).mean((2, 3)))


class Joined(nn.Module):
    """Channels that are put side by side, shared by two calls, and given out: they are needed as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = convolution(3, 12), convolution(3, 12)
        self.last = convolution(24, 8, 1)
        self.shared = convolution(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.cat([self.first(images), self.second(images)], 1).relu()
        return self.shared(self.shared(self.last(both)).relu())


def of_int8(network: nn.Module, images: Tensor, path: Path) -> Path:
    export(quantize(network.eval(), [(images,)]), "onnx", path, batches=[(images,)])
    return path


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 3, 32, 32)


def test_every_value_that_a_depthwise_layer_reaches_gets_channels(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    network = Mobile()
    aligned = of_int8(network, images, tmp_path / "aligned.onnx")
    monkeypatch.setattr(onnx_channels, "align", lambda graph: None)
    plain = of_int8(network, images, tmp_path / "plain.onnx")
    dense = [(8, 3, 3, 3), (24, 8, 1, 1), (24, 1, 3, 3), (24, 1, 3, 3), (8, 24, 1, 1), (24, 8, 1, 1), (8, 24, 1, 1)]
    assert weights(plain) == dense
    padded = [(16, 4, 3, 3), (32, 16, 1, 1), (32, 1, 3, 3), (32, 1, 3, 3), (8, 32, 1, 1), (32, 8, 1, 1), (8, 32, 1, 1)]
    assert weights(aligned) == padded
    assert torch.equal(outputs(aligned, images), outputs(plain, images))


def test_channels_that_are_needed_as_they_are_stay(images: Tensor, tmp_path: Path) -> None:
    path = of_int8(Joined(), images, tmp_path / "joined.onnx")
    assert [shape[0] for shape in weights(path)] == [12, 12, 8, 8, 8]
    assert [shape[1] for shape in weights(path)] == [4, 4, 24, 8, 8]


def test_small_images_and_many_channels_stay(tmp_path: Path) -> None:
    network = nn.Sequential(convolution(20, 20), nn.ReLU(), convolution(20, 4), nn.ReLU(), convolution(4, 16, 1))
    path = of_int8(network, torch.randn(4, 20, 16, 16), tmp_path / "wide.onnx")
    assert weights(path) == [(20, 20, 3, 3), (4, 20, 3, 3), (16, 4, 1, 1)]
    small = nn.Sequential(convolution(3, 8), nn.ReLU(), convolution(8, 16, 1))
    path = of_int8(small, torch.randn(4, 3, 8, 8), tmp_path / "small.onnx")
    assert weights(path) == [(8, 3, 3, 3), (16, 8, 1, 1)]


def test_patches_stay(images: Tensor, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 4, stride=4), nn.ReLU(), convolution(64, 4, 1))
    assert weights(of_int8(network, images, tmp_path / "patches.onnx")) == [(64, 3, 4, 4), (4, 64, 1, 1)]


def test_pixels_and_batches_of_any_size(images: Tensor, tmp_path: Path) -> None:
    pixels = (images.clamp(-2, 2) * 60 + 128).round()
    interface = Interface(pixels=Pixels(mean=(0.5,), std=(0.25,)), max_batch=3)
    normalized = (pixels / 255 - 0.5) / 0.25
    path = tmp_path / "pixels.onnx"
    artifact = export(
        quantize(Mobile().eval(), [(normalized,)]), "onnx", path, interface=interface, batches=[(normalized,)]
    )
    assert artifact.agreement is not None
    assert artifact.agreement.max_steps == 0
    assert (16, 4, 3, 3) in weights(path)


def test_values_inside_are_compared_without_the_channels_of_zeros(images: Tensor, tmp_path: Path) -> None:
    network = deployable(quantize(nn.Sequential(convolution(3, 8), nn.ReLU(), convolution(8, 4)).eval(), [(images,)]))
    artifact = export(network, "onnx", tmp_path / "file.onnx", isolated=False)
    found = artifact.runner.intermediates([images[:1]])  # type: ignore[attr-defined]
    inside = next(value for value in found if value.values.shape[1] == 16)
    assert first_divergence(network, Inputs.of(images[:1]), found) is None
    wrong = replace(inside, values=inside.values // 2)
    first = first_divergence(network, Inputs.of(images[:1]), [wrong])
    assert first is not None
    assert first.layer == "0"
