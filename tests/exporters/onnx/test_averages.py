"""Means of rows in int8 ONNX files, networks of tokens, and that no value changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from onnx_files import kernels, kinds, outputs
from torch import Tensor, nn

from lightning_edge.exporters import ExportWarning, deployable, export
from lightning_edge.exporters.onnx import passes
from lightning_edge.exporters.verify.divergence import first_divergence
from lightning_edge.interface import Interface
from lightning_edge.network import Inputs
from lightning_edge.quantization import quantize

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Tokens(nn.Module):
    """A block of attention and of two layers over 24 tokens, and a layer over the first."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(48, 48) for _ in range(3))
        self.wide, self.narrow, self.head = nn.Linear(48, 96), nn.Linear(96, 48, bias=False), nn.Linear(48, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (layer(tokens) for layer in (self.query, self.key, self.value))
        tokens = tokens + nn.functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.narrow(self.wide(tokens).relu())
        return self.head(tokens[:, 0])


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Files as they are without the pass; undo it for what it does."""
    others = tuple(each for each in passes.PASSES if each is not passes.averages_of_rows)
    monkeypatch.setattr(passes, "PASSES", others)
    return monkeypatch


def both(network: nn.Module, samples: Tensor, folder: Path, patch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Write a network without and with the pass."""
    quantized = quantize(network.eval(), [(samples,)])
    before, after = folder / "before.onnx", folder / "after.onnx"
    export(quantized, "onnx", before, batches=[(samples,)], isolated=False)
    patch.undo()
    export(quantized, "onnx", after, batches=[(samples,)], isolated=False)
    return before, after


@pytest.mark.slow
def test_several_samples_of_tokens_a_call(tmp_path: Path) -> None:
    samples = torch.randn(8, 24, 48)
    quantized = quantize(Tokens().eval(), [(samples,)])
    path = tmp_path / "batch.onnx"
    export(quantized, "onnx", path, batches=[(samples,)], interface=Interface(max_batch=16))
    assert kernels(path)["QGemm"] == 6
    session = onnxruntime.InferenceSession(str(path))
    name = session.get_inputs()[0].name
    for count in (1, 5):
        (rows,) = session.run(None, {name: samples[:count].numpy()})
        torch.testing.assert_close(torch.as_tensor(rows), outputs(path, samples[:count]), rtol=0, atol=0)


class Average(nn.Module):
    """A layer over the mean of some dimensions."""

    def __init__(self, dims: tuple[int, ...], keepdim: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.dims, self.keepdim = dims, keepdim

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).mean(self.dims, keepdim=self.keepdim))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (Average((1,)), (7, 16)),
        pytest.param(Average((1,), keepdim=True), (30, 16), marks=pytest.mark.slow),
        pytest.param(Average((1, 2)), (3, 5, 16), marks=pytest.mark.slow),
    ],
    ids=["tokens", "kept", "pixels"],
)
def test_means_of_rows_are_int8(
    network: nn.Module, shape: tuple[int, ...], tmp_path: Path, as_before: pytest.MonkeyPatch
) -> None:
    samples = torch.randn(8, *shape)
    with pytest.warns(ExportWarning, match="compute in float: ReduceMean"):
        before, after = both(network, samples, tmp_path, as_before)
    assert kinds(after)["ReduceMean"] == 0
    assert kernels(after)["QLinearGlobalAveragePool"] == 1
    torch.testing.assert_close(outputs(after, samples), outputs(before, samples), rtol=0, atol=0)


def test_the_mean_of_some_rows_is_left(tmp_path: Path) -> None:
    samples = torch.randn(8, 3, 5, 16)
    quantized = quantize(Average((1,)).eval(), [(samples,)])
    with pytest.warns(ExportWarning, match="compute in float: ReduceMean"):
        export(quantized, "onnx", tmp_path / "some.onnx", batches=[(samples,)], isolated=False)


def test_values_inside_are_compared_whichever_way_they_lie(tmp_path: Path) -> None:
    samples = torch.randn(8, 24, 48)
    network = deployable(quantize(Tokens().eval(), [(samples,)]))
    artifact = export(network, "onnx", tmp_path / "tokens.onnx", isolated=False)
    found = artifact.runner.intermediates([samples[:1]])  # type: ignore[attr-defined]
    assert first_divergence(network, Inputs.of(samples[:1]), found) is None
    inside = next(value for value in found if value.values.shape == (1, 24, 96))
    wrong = replace(inside, values=inside.values // 2)
    first = first_divergence(network, Inputs.of(samples[:1]), [wrong])
    assert first is not None
    assert first.layer == "wide"
