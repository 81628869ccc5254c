"""Linear layers in int8 ONNX files: which become convolutions, and that no value changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from onnx_files import kernels, kinds, outputs
from torch import Tensor, nn

from lightning_edge.exporters import ExportWarning, deployable, export
from lightning_edge.exporters.onnx.passes import linears as onnx_linears
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


class Shared(nn.Module):
    """One layer that is called three times, and one that is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.once = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, rows: Tensor) -> Tensor:
        for _ in range(3):
            rows = self.again(rows).relu()
        return self.once(rows)


class PartlyShared(nn.Module):
    """One layer for all tokens, and once more for the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 48)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(self.layer(tokens).relu()[:, 0])


def chain(layers: int) -> nn.Module:
    parts = [part for _ in range(layers) for part in (nn.Linear(48, 48), nn.ReLU6())]
    return nn.Sequential(*parts[:-1])


def classifier(pool: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 5))


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Files as they were without this module; undo it for what it does."""
    for name in ("as_convolutions", "averages_of_rows", "flattened_pixels"):
        monkeypatch.setattr(onnx_linears, name, lambda graph: None)
    return monkeypatch


def both(network: nn.Module, samples: Tensor, folder: Path, patch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Write a network without and with the forms of this module."""
    quantized = quantize(network.eval(), [(samples,)])
    before, after = folder / "before.onnx", folder / "after.onnx"
    export(quantized, "onnx", before, batches=[(samples,)], isolated=False)
    patch.undo()
    export(quantized, "onnx", after, batches=[(samples,)], isolated=False)
    return before, after


@pytest.mark.parametrize(
    ("network", "shape", "linear", "convolutions"),
    [
        (Tokens(), (24, 48), 1, 5),
        (chain(3), (48,), 0, 3),
        (chain(2), (48,), 2, 0),
        (chain(1), (24, 48), 0, 1),
        (chain(1), (1, 48), 1, 0),
        (Shared(), (24, 48), 0, 4),
        (PartlyShared(), (24, 48), 2, 0),
    ],
    ids=["attention", "three layers", "two layers", "tokens", "one token", "shared weights", "partly shared"],
)
def test_linear_layers_become_convolutions_where_that_is_faster(
    network: nn.Module,
    shape: tuple[int, ...],
    linear: int,
    convolutions: int,
    tmp_path: Path,
    as_before: pytest.MonkeyPatch,
) -> None:
    samples = torch.randn(8, *shape)
    before, after = both(network, samples, tmp_path, as_before)
    assert (kinds(before)["Gemm"], kinds(before)["Conv"]) == (linear + convolutions, 0)
    assert (kinds(after)["Gemm"], kinds(after)["Conv"]) == (linear, convolutions)
    run = kernels(after)
    assert (run["QGemm"], run["QLinearConv"]) == (linear, convolutions)
    assert run["Transpose"] <= kernels(before)["Transpose"]  # those written are undone by those of the kernels
    assert run["Reshape"] <= kernels(before)["Reshape"] + (2 if len(shape) == 1 else 0)
    torch.testing.assert_close(outputs(after, samples), outputs(before, samples), rtol=0, atol=0)


@pytest.mark.parametrize(("network", "shape"), [(chain(4), (48,)), (Tokens(), (24, 48))], ids=["rows", "tokens"])
def test_several_samples_a_call(network: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    samples = torch.randn(8, *shape)
    quantized = quantize(network.eval(), [(samples,)])
    path = tmp_path / "batch.onnx"
    export(quantized, "onnx", path, batches=[(samples,)], interface=Interface(max_batch=16))
    assert kinds(path)["Conv"] >= 4
    session = onnxruntime.InferenceSession(str(path))
    name = session.get_inputs()[0].name
    for count in (1, 5):
        (rows,) = session.run(None, {name: samples[:count].numpy()})
        torch.testing.assert_close(torch.as_tensor(rows), outputs(path, samples[:count]), rtol=0, atol=0)


@pytest.mark.parametrize(
    "pool", [nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(4), nn.AvgPool2d(4)], ids=["average", "maximum", "window"]
)
def test_no_move_of_channels_is_left_before_a_classifier(
    pool: nn.Module, tmp_path: Path, as_before: pytest.MonkeyPatch
) -> None:
    samples = torch.randn(8, 3, 10, 10)
    before, after = both(classifier(pool), samples, tmp_path, as_before)
    assert (kernels(before)["Transpose"], kernels(after)["Transpose"]) == (2, 1)  # the image's own
    torch.testing.assert_close(outputs(after, samples), outputs(before, samples), rtol=0, atol=0)


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
    [(Average((1,)), (7, 16)), (Average((1,), keepdim=True), (30, 16)), (Average((1, 2)), (3, 5, 16))],
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
    assert kernels(after)["Transpose"] <= kernels(before)["Transpose"]
    torch.testing.assert_close(outputs(after, samples), outputs(before, samples), rtol=0, atol=0)


def test_the_mean_of_some_rows_is_left(tmp_path: Path) -> None:
    samples = torch.randn(8, 3, 5, 16)
    quantized = quantize(Average((1,)).eval(), [(samples,)])
    with pytest.warns(ExportWarning, match="compute in float: ReduceMean"):
        export(quantized, "onnx", tmp_path / "some.onnx", batches=[(samples,)], isolated=False)


def test_several_pixels_are_flattened_in_their_order(tmp_path: Path, as_before: pytest.MonkeyPatch) -> None:
    samples = torch.randn(8, 3, 10, 10)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    before, after = both(network, samples, tmp_path, as_before)
    torch.testing.assert_close(outputs(after, samples), outputs(before, samples), rtol=0, atol=0)


def test_values_inside_are_compared_whichever_way_they_lie(tmp_path: Path) -> None:
    samples = torch.randn(8, 24, 48)
    network = deployable(quantize(Tokens().eval(), [(samples,)]))
    artifact = export(network, "onnx", tmp_path / "tokens.onnx", isolated=False)
    found = artifact.runner.intermediates([samples[:1]])  # type: ignore[attr-defined]
    assert first_divergence(network, Inputs.of(samples[:1]), found) is None
    inside = next(value for value in found if value.values.shape == (1, 96, 24, 1))
    wrong = replace(inside, values=inside.values // 2)
    first = first_divergence(network, Inputs.of(samples[:1]), [wrong])
    assert first is not None
    assert first.layer == "wide"
