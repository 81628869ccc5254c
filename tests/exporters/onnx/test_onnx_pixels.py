"""Pixels in int8 ONNX files: normalized by the fast kernels, to the same values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx_files import kinds, weights
from torch import Tensor, nn

from lightning_edge.exporters import export
from lightning_edge.exporters.onnx import passes
from lightning_edge.exporters.onnx.passes import pixels as onnx_pixels
from lightning_edge.interface import Interface, Layout, Pixels
from lightning_edge.quantization import quantize

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def of_pixels(images: Tensor, path: Path, layout: Layout) -> Path:
    """Write a small network that takes pixels; their normalization differs by color."""
    torch.manual_seed(0)
    colors = images.shape[1]
    network = nn.Sequential(nn.Conv2d(colors, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    mean, std = [0.5, 0.4, 0.3][:colors], [0.25, 0.2, 0.3][:colors]
    shifts, scales = (torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
    normalized = (images / 255 - shifts) / scales
    interface = Interface(pixels=Pixels(mean=mean, std=std), layout=layout, max_batch=2)
    artifact = export(quantize(network, [(normalized,)]), "onnx", path, interface=interface, batches=[(normalized,)])
    assert artifact.agreement is not None
    assert (artifact.agreement.max_steps or 0) < 1.5  # a step, where the normalization is a tie
    return path


# Four pixels at a time, and a size at which there are none.
QUICK = [((3, 32), "nhwc"), ((3, 33), "nchw")]


def outputs(path: Path, images: Tensor, layout: Layout) -> Tensor:
    session = onnxruntime.InferenceSession(str(path))
    given = images.permute(0, 2, 3, 1) if layout == "nhwc" else images
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: given.contiguous().numpy()})[0])


@pytest.mark.parametrize(
    ("colors", "size", "weight", "layout"),
    [
        pytest.param(*case, layout, marks=[pytest.mark.slow] * ((case[:2], layout) not in QUICK))
        for case in ((3, 32, (12, 12, 1, 1)), (1, 32, (4, 4, 1, 1)), (3, 8, (12, 12, 1, 1)), (3, 33, (3, 3, 1, 1)))
        for layout in ("nchw", "nhwc")
    ],
)
def test_pixels_are_normalized_several_at_a_time(
    colors: int,
    size: int,
    weight: tuple[int, ...],
    layout: Layout,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, colors, size, size), dtype=torch.uint8)
    fast = of_pixels(images, tmp_path / "fast.onnx", layout)
    assert weights(fast)[0] == weight
    assert not {"Cast", "Pad"} & set(kinds(fast))
    left_out = (onnx_pixels.join_colors, onnx_pixels.join_pixels)
    monkeypatch.setattr(passes, "PASSES", tuple(each for each in passes.PASSES if each not in left_out))
    plain = of_pixels(images, tmp_path / "plain.onnx", layout)
    assert weights(plain)[0] == (colors, 1, 1, 1)
    assert torch.equal(outputs(fast, images, layout), outputs(plain, images, layout))
    assert torch.equal(outputs(fast, images[:1], layout), outputs(fast, images, layout)[:1])
