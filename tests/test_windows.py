"""Windows of images that lie side by side, as views; and patches of MobileViT on every target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_edge.exporters import export
from lightning_edge.network import Inputs
from lightning_edge.plain_calls import PlainCalls
from lightning_edge.quantization import quantize
from lightning_edge.quantization.capture.graph import capture


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def called(function: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, list[str]]:
    """The result, and the operations that made it."""

    class Call(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = function(x, *args[1:], **kwargs)
            return result

    with PlainCalls():
        program = torch.export.export(Call(), args[:1], strict=False)
    names = [str(node.target).split(".")[1] for node in program.graph.nodes if node.op == "call_function"]
    return program.module()(args[0]), names


@pytest.mark.parametrize(("window", "stride"), [(2, 2), ((2, 3), (2, 3)), (3, (3, 3))], ids=str)
def test_windows_side_by_side_are_views(window: Any, stride: Any) -> None:
    images = torch.randn(3, 5, 12, 18)
    apart, operations = called(F.unfold, images, window, stride=stride)
    assert torch.equal(apart, F.unfold(images, window, stride=stride))
    assert "im2col" not in operations
    together, operations = called(F.fold, apart, (12, 18), window, stride=stride)
    assert torch.equal(together, images)
    assert "col2im" not in operations


@pytest.mark.parametrize(
    "settings",
    [{"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "dilation": 2}, {"stride": 3}, {}],
    ids=str,
)
def test_other_windows_stay_what_they_are(settings: dict[str, Any]) -> None:
    images = torch.randn(2, 3, 8, 8)
    apart, operations = called(F.unfold, images, 2, **settings)
    assert torch.equal(apart, F.unfold(images, 2, **settings))
    assert "im2col" in operations


def test_windows_that_do_not_fill_the_image_stay_what_they_are() -> None:
    images = torch.randn(2, 3, 7, 8)
    apart, operations = called(F.unfold, images, 2, stride=2)
    assert torch.equal(apart, F.unfold(images, 2, stride=2))
    assert "im2col" in operations
    assert torch.equal(called(F.unfold, images[0], 1, stride=1)[0], F.unfold(images[0], 1))


class Patches(nn.Module):
    """MobileViTv2's separable attention (Mehta & Rastegari 2022) between patches."""

    def __init__(self) -> None:
        super().__init__()
        self.joined, self.out, self.head = nn.Conv2d(8, 17, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        patches = F.unfold(images, 2, stride=2).reshape(batch, channels, 4, -1)
        query, key, value = self.joined(patches).split([1, 8, 8], dim=1)
        context = (key * query.softmax(-1)).sum(-1, keepdim=True)
        attended = self.out(value.relu() * context.expand_as(value))
        together = F.fold(attended.reshape(batch, channels * 4, -1), (height, width), 2, stride=2)
        logits: Tensor = self.head(together.mean((2, 3)))
        return logits


def test_captured_patches_take_any_batch() -> None:
    network = Patches().eval()
    graph = capture(network, Inputs.of(torch.randn(4, 8, 8, 8))).graph
    assert not any("col" in str(node.target) for node in graph.graph.nodes)
    for batch in (1, 5):
        images = torch.randn(batch, 8, 8, 8)
        torch.testing.assert_close(graph(images), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "precision"),
    [
        ("onnx", "int8"),
        ("tflite", "int8"),
        *(pytest.param(name, "int8", marks=pytest.mark.slow) for name in ("coreml", "executorch")),
        *(pytest.param(name, "fp32", marks=pytest.mark.slow) for name in ("coreml", "executorch", "onnx", "tflite")),
    ],
)
@pytest.mark.filterwarnings("ignore::lightning_edge.exporters.ExportWarning")
def test_patches_on_every_target(target: str, precision: str, tmp_path: Path) -> None:
    pytest.importorskip({"coreml": "coremltools", "tflite": "litert_torch"}.get(target, target))
    network, images = Patches().eval(), torch.randn(16, 8, 8, 8)
    suffix = {"coreml": "mlpackage", "executorch": "pte"}.get(target, target)
    made = quantize(network, [images]) if precision == "int8" else network
    given = {} if precision == "int8" else {"inputs": images}
    artifact = export(made, target, tmp_path / f"net.{suffix}", **given)  # type: ignore[arg-type]
    assert artifact.agreement is not None
    found = artifact.agreement.max_steps if precision == "int8" else artifact.agreement.max_relative
    assert found is not None
    assert found <= (1.01 if precision == "int8" else 1e-5)
