"""Files that take raw pixels and keep the names of classes, for every target."""

from __future__ import annotations

import warnings
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edge import Interface, Pixels
from lightning_edge.comparison import Comparison
from lightning_edge.errors import RunnerError
from lightning_edge.evaluation.reference import Reference
from lightning_edge.exporters import Artifact, ExportWarning, contents_of, deployable, export, load
from lightning_edge.exporters import input_adapter as front
from lightning_edge.exporters import target as target_of
from lightning_edge.network import Deployable, Inputs, Precision
from lightning_edge.quantization import quantize

IMAGENET = Pixels(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
LABELS = ("cat", "dog", "b\u00e4r", "red fox")
INTERFACE = Interface(inputs=("image",), outputs=("scores",), layout="nhwc", pixels=IMAGENET, labels=LABELS)


class Small(nn.Module):
    """Two convolutions and class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(images)))).mean((2, 3)))
        return logits


def pixels(count: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def images(count: int = 16) -> Tensor:
    """As torchvision's ToTensor and Normalize make them."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    return (pixels(count).float() / 255 - mean) / std


@cache
def network(precision: Precision) -> Deployable:
    torch.manual_seed(0)
    made = Small().eval()
    return deployable(quantize(made, [images()])) if precision == "int8" else deployable(made, images(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pixels")


@cache
def written(folder: Path, name: str, precision: Precision) -> Artifact:
    path = folder / f"{precision}{target_of(name).suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ExportWarning)
        for noise in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", noise)
        given: dict[str, Any] = {"interface": INTERFACE, "isolated": False, "batches": [images()]}
        return export(network(precision), name, path, **given)


# The description


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"std": (0.0,)}, r"std=\(0.0,\).*give numbers above 0"),
        ({"white": float("nan")}, "white=nan.: give numbers above 0"),
        ({"mean": ()}, r"mean=\(\)\): give one finite number for each channel"),
        ({"mean": "0.5"}, "mean='0.5'.: give one finite number"),
        ({"mean": (0.1, 0.2), "std": (1.0, 1.0, 1.0)}, "are of different numbers of channels"),
    ],
)
def test_what_makes_no_images_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pixels(**given)


def test_notes_are_read_back() -> None:
    assert Interface.of_notes(INTERFACE.notes()) == INTERFACE
    assert Pixels(mean=[0.5], std=2).channels == 1  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no interface of a file"):
        Interface.of_notes({"lightning_edge.pixels": '{"gamma":2.2}'})
    with pytest.raises(ValueError, match="a label has a line break in it"):
        Interface(labels=("one\ntwo",))


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_every_pixel_comes_back_from_its_value(white: float) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    interface = Interface(pixels=Pixels(IMAGENET.mean, IMAGENET.std, white))
    values = front.as_network_takes(every, interface)
    assert torch.equal(front.as_file_takes(values, interface), every)
    assert front.as_file_sees(values, interface) is values
    wanted = front.Front(interface, 3)(every)
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-6 * white)


# The files


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("executorch", "fp32"),
        ("coreml", "int8"),
        ("tflite", "int8"),
        ("onnx", "fp32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("executorch", "int8"), ("coreml", "fp32"), ("tflite", "fp32"), ("onnx", "int8"))
        ),
    ],
)
def test_a_file_takes_pixels_and_keeps_labels(folder: Path, name: str, precision: Precision) -> None:
    artifact = written(folder, name, precision)
    (given,) = artifact.contents.inputs
    assert given.dtype == "uint8"
    assert given.shape == ((1, 3, 8, 8) if name == "coreml" else (1, 8, 8, 3))  # there an image, which has no layout
    assert [(spec.shape, spec.dtype) for spec in artifact.inputs] == [((1, 3, 8, 8), torch.float32)]
    assert contents_of(artifact.path).labels == LABELS
    assert contents_of(artifact.path).interface.pixels == IMAGENET
    assert torch.equal(artifact(images())[0], artifact(pixels())[0])
    assert artifact.agreement is not None
    if precision == "int8":
        assert artifact.contents.float_compute_ops == artifact.contents.float_ops == ()
        assert artifact.agreement.max_steps is not None
        assert artifact.agreement.max_steps <= 1.01
    if artifact.contents.undelegated_ops is not None:  # one, since XNNPACK takes no uint8
        assert artifact.contents.undelegated_ops == ("dim_order_ops::_to_dim_order_copy",)


def test_the_runtimes_themselves_take_pixels(folder: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    raw = pixels(1).permute(0, 2, 3, 1).contiguous().numpy()
    onnx, tflite = (written(folder, name, "int8") for name in ("onnx", "tflite"))
    session = onnxruntime.InferenceSession(str(onnx.path))
    scores = torch.from_numpy(session.run(["scores"], {"image": raw})[0])
    torch.testing.assert_close(scores, onnx(images(1))[0], rtol=0.0, atol=0.05)  # without exact sums
    signature = interpreter.Interpreter(str(tflite.path)).get_signature_runner()
    scale, zero = tflite.contents.outputs[0].scale, tflite.contents.outputs[0].zero_point
    assert scale is not None
    assert zero is not None
    scores = (torch.from_numpy(signature(image=raw)["scores"]).float() - zero) * scale
    torch.testing.assert_close(scores, tflite(images(1))[0])


def test_core_ml_has_an_image(folder: Path) -> None:
    pytest.importorskip("coremltools")
    from coremltools.proto import Model_pb2

    path = written(folder, "coreml", "int8").path / "Data/com.apple.CoreML/model.mlmodel"
    (feature,) = Model_pb2.Model.FromString(path.read_bytes()).description.input
    image = feature.type.imageType
    assert (feature.name, image.height, image.width, image.colorSpace) == ("image", 8, 8, image.RGB)


def test_values_that_are_no_pixels_are_refused(folder: Path) -> None:
    artifact = written(folder, "onnx", "int8")
    with pytest.raises(RunnerError, match=r"int8.onnx: it takes images made of pixels from 0 to 255, and under Pixels"):
        artifact(images() * 3)
    with pytest.raises(RunnerError, match="values given are pixels from nan"):
        artifact(torch.full((1, 3, 8, 8), torch.nan))
    with pytest.raises(RunnerError, match=r"was given \[1, 2, 8, 8\] float32 per sample but takes \[1, 3, 8, 8\]"):
        artifact(images()[:, :2])
    with pytest.raises(RunnerError, match=r"was given \[1, 2, 8, 8\] uint8 per sample but takes \[1, 3, 8, 8\]"):
        artifact(pixels()[:, :2])


def test_what_lies_between_two_pixels_is_rounded_for_both_sides(folder: Path) -> None:
    artifact = written(folder, "onnx", "fp32")
    between = images() + 0.4 / 255 / 0.229
    between = between.clamp(max=float(images().min(1).values.max()))
    with pytest.warns(UserWarning, match="no whole pixels under Pixels.*compare them with its Normalize"):
        seen = artifact.sees(Inputs.of(between)).tensors[0]
    assert not torch.equal(seen, between)
    raw = network("fp32").graph(between)
    (same,) = artifact(between)
    torch.testing.assert_close(same, network("fp32").graph(seen), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(same, raw, rtol=1e-4, atol=1e-5)
    reference, comparison = Reference(network("fp32")), Comparison()
    with pytest.warns(UserWarning, match="no whole pixels"):
        reference.answers(artifact, comparison, artifact.sees)(between)
    assert comparison.result().outputs[0].max_relative < 1e-4


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        (Interface(labels=("one", "two")), r"names 2 classes, and the network gives 4; its outputs are \[1, 4\]"),
        (Interface(pixels=Pixels(mean=(0.1, 0.2))), r"is for 2 channels, and the network takes \[1, 3, 8, 8\]"),
    ],
)
def test_an_interface_of_another_network_is_refused(tmp_path: Path, interface: Interface, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(network("fp32"), "onnx", tmp_path / "net.onnx", interface=interface)
    assert list(tmp_path.iterdir()) == []


def test_pixels_are_for_images_of_floats(tmp_path: Path) -> None:
    raw = Interface(pixels=Pixels())
    with pytest.raises(ValueError, match=r"is for 4-D inputs of floats, and the network takes \[1, 6\]"):
        export(nn.Linear(6, 2), "onnx", tmp_path / "n.onnx", inputs=torch.rand(1, 6), interface=raw)
    image = torch.rand(1, 2, 4, 4)
    with pytest.raises(ValueError, match="Core ML has images of 1 or 3 channels, and the network takes 2"):
        export(nn.Conv2d(2, 1, 1), "coreml", tmp_path / "n.mlpackage", inputs=image, interface=raw)


# TensorFlow Lite Metadata and microcontrollers


def test_tflite_metadata_leads_to_the_labels(folder: Path) -> None:
    """Read with the flatbuffers library alone, by the places of the fields in TensorFlow Lite Support's schema."""
    pytest.importorskip("litert_torch")
    from flatbuffers import number_types
    from flatbuffers.table import Table

    from lightning_edge.exporters.tflite import graph as tflite_graph

    model = tflite_graph.parse(written(folder, "tflite", "int8").path.read_bytes())
    (entry,) = [entry for entry in model.metadata if entry.name == b"TFLITE_METADATA"]
    data = bytes(model.buffers[entry.buffer].data)
    assert data[4:8] == b"M001"

    def below(table: Any, slot: int, at: int | None = None) -> Any:
        offset = table.Offset(4 + 2 * slot)
        place = offset + table.Pos
        return Table(data, table.Indirect(place if at is None else table.Vector(offset) + 4 * at))

    def text(table: Any, slot: int) -> str:
        return str(table.String(table.Offset(4 + 2 * slot) + table.Pos).decode())

    root = Table(data, int.from_bytes(data[:4], "little"))
    graph = below(root, 3, 0)
    image, scores = below(graph, 2, 0), below(graph, 3, 0)
    assert (text(image, 0), text(scores, 0)) == ("image", "scores")
    content = below(image, 3)
    assert content.Get(number_types.Uint8Flags, content.Offset(4) + content.Pos) == 2  # ImageProperties
    file = below(scores, 6, 0)
    assert text(file, 0) == "labels.txt"
    assert file.Get(number_types.Uint8Flags, file.Offset(8) + file.Pos) == 2  # TENSOR_AXIS_LABELS
    with zipfile.ZipFile(written(folder, "tflite", "int8").path) as archive:
        assert archive.read("labels.txt").decode().splitlines() == list(LABELS)


def test_a_microcontroller_takes_pixels(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    from lightning_edge.exporters.micro import sources as microcontroller
    from lightning_edge.exporters.micro import vela

    path = written(folder, "tflite", "int8").path
    footprint = microcontroller.write(path, tmp_path).footprint
    assert {"QUANTIZE", "DEPTHWISE_CONV_2D"} <= {*footprint.operators}
    assert "CAST" not in footprint.operators
    pytest.importorskip("ethosu")
    estimate = vela.estimate(path, "ethos-u55-128")
    assert estimate.cpu_operators == ()


def test_a_file_from_before_has_no_labels(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    artifact = export(nn.Linear(6, 2), "onnx", tmp_path / "n.onnx", inputs=torch.rand(1, 6))
    assert load(artifact.path, isolated=False).contents.interface.labels == ()
