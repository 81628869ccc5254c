"""Paddings and transposes that a `.tflite` does without, with every value as it was."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_edge.exporters import Artifact, deployable, export
from lightning_edge.exporters.tflite import graph as tflite_graph
from lightning_edge.exporters.tflite.passes import simplify as tflite_simplify
from lightning_edge.network import Deployable, Inputs, Precision
from lightning_edge.quantization import quantize

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_torch")


class Padded(nn.Module):
    """Paddings as TensorFlow's SAME puts them in front of stride 2, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.one_channel = nn.Conv2d(1, 4, (5, 4), stride=2)
        self.strided = nn.Conv2d(4, 8, 3, stride=2)
        self.shortcut = nn.Conv2d(4, 8, 1, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.other = nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.one_channel(functional.pad(images, (1, 1, 1, 2))))  # 32x32 to 16x16
        x = torch.relu(self.strided(functional.pad(x, (0, 1, 0, 1))) + self.shortcut(x))  # 8x8
        x = torch.relu(self.depthwise(functional.pad(x, (0, 1, 0, 1))))  # 4x4
        x = torch.relu(self.other(functional.pad(x, (1, 0, 1, 0))))  # 2x2, the odd column in front
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@cache
def padded(precision: Precision) -> Deployable:
    torch.manual_seed(0)
    network, batches = Padded().eval(), [torch.randn(8, 1, 32, 32)]
    return quantize(network, batches) if precision == "int8" else deployable(network, Inputs.of(batches[0][:1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simplify")


@cache
def written(precision: Precision, folder: Path) -> Artifact:
    return export(padded(precision), "tflite", folder / f"{precision}.tflite")


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "int8"])
def test_convolutions_pad_by_themselves_and_nothing_is_transposed_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    tflite_convert = import_module("lightning_edge.exporters.tflite.convert")
    convert, made = tflite_convert._converted, list[bytes]()

    def convert_once(network: Deployable) -> bytes:
        """Give what the converter makes, of which both files are written."""
        made[:] = made or [convert(network)]
        return made[0]

    monkeypatch.setattr(tflite_convert, "_converted", convert_once)
    short = written(precision, folder)
    monkeypatch.setattr(tflite_simplify, "PASSES", ())
    long = export(padded(precision), "tflite", tmp_path / "long.tflite")

    assert long.contents.ops["TRANSPOSE"] >= 4
    # What is left pads on sides on which SAME does not.
    assert (short.contents.ops["PAD"], short.contents.ops.get("TRANSPOSE", 0)) == (1, 0)
    assert short.size_bytes < long.size_bytes
    images = torch.randn(16, 1, 32, 32)
    rounding = 0.0 if precision == "int8" else 1e-6
    for ours, theirs in zip(short(images), long(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)


def test_no_tensor_and_no_kind_of_operation_is_left_over(folder: Path) -> None:
    model = tflite_graph.parse(written("int8", folder).path.read_bytes())
    (graph,) = model.subgraphs
    used = {int(index) for op in graph.operators for index in (*op.inputs, *op.outputs)}
    assert used == set(range(len(graph.tensors)))
    assert {op.opcodeIndex for op in graph.operators} == set(range(len(model.operatorCodes)))


@pytest.mark.parametrize(
    ("size", "stride", "reach", "widths"),
    [
        (32, 2, 3, [0, 1]),
        (33, 2, 3, [1, 1]),
        (49, 2, 10, [4, 5]),
        (8, 1, 5, [2, 2]),
        (8, 2, 1, [0, 0]),
        (7, 3, 1, [0, 0]),
    ],
)
def test_same_is_what_tensorflow_calls_so(size: int, stride: int, reach: int, widths: list[int]) -> None:
    # https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
    assert tflite_simplify.same_padding(size, stride, reach) == widths


def test_a_padded_tensor_that_is_given_out_stays(tmp_path: Path) -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            wide = functional.pad(torch.relu(self.first(images)), (0, 1, 0, 1))
            return wide, self.second(wide)

    torch.manual_seed(0)
    network, images = Given().eval(), torch.randn(1, 2, 8, 8)
    artifact = export(deployable(network, Inputs.of(images)), "tflite", tmp_path / "model.tflite")
    with torch.no_grad():
        for output, wanted in zip(artifact(images), network(images), strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("activation", "padding"), [(nn.ReLU(), "PAD"), (nn.Identity(), "PADV2")], ids=str)
def test_max_pools_are_padded_with_what_the_delegate_has(tmp_path: Path, activation: nn.Module, padding: str) -> None:
    """Behind a ReLU the least integer is the one that stands for 0; elsewhere it is not, and zeros would win."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 2, 1)).eval()
    batches = [torch.randn(8, 3, 12, 12) - 3 for _ in range(2)]
    artifact = export(quantize(network, batches), "tflite", tmp_path / "model.tflite", batches=batches)
    assert artifact.contents.ops[padding] == 1
    assert artifact.agreement is not None
    assert artifact.agreement.max_steps is not None
    assert artifact.agreement.max_steps <= 1.01
