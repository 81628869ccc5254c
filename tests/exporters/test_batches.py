"""Files that take several samples in a call: right for one and for many, refused where that cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deployables import batches, network
from torch import Tensor, nn

from lightning_edge import Interface, Pixels
from lightning_edge.errors import AgreementError, ExportError, RunnerError
from lightning_edge.exporters import ExportWarning, contents_of, export, load, target
from lightning_edge.network import Inputs, Precision, flatten_outputs, sort_keywords
from lightning_edge.quantization import quantize

MOST = 3
SEVERAL = Interface(max_batch=MOST)
NAMES = {"onnx": "onnxruntime", "coreml": "coremltools"}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Calculated(nn.Module):
    """What a function makes of one tensor, behind a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        return self.function(self.layer(values))


def calls(name: str) -> Inputs:
    return sort_keywords(batches(name)[0])


SAMPLES: list[tuple[str, Precision, str]] = [
    ("attention", "int8", "onnx"),
    ("two_inputs", "fp32", "onnx"),
    ("residual", "int8", "coreml"),
    ("difference", "fp32", "coreml"),
]
QUICK = [("two_inputs", "fp32", "onnx"), ("difference", "fp32", "coreml")]
SWAPPED = [(name, precision, "coreml" if other == "onnx" else "onnx") for name, precision, other in SAMPLES]


@pytest.mark.parametrize(
    ("name", "precision", "target_name"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in (*SAMPLES, *SWAPPED)],
)
def test_files_take_one_sample_and_many(name: str, target_name: str, precision: Precision, tmp_path: Path) -> None:
    pytest.importorskip(NAMES[target_name])
    built, inputs = network(name, precision), calls(name)
    path = tmp_path / f"net{target(target_name).suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExportWarning)
        artifact = export(built, target_name, path, batches=batches(name), interface=SEVERAL, isolated=False)
        single = export(built, target_name, tmp_path / f"one{path.suffix}", batches=batches(name), isolated=False)
    assert contents_of(path).interface.max_batch == MOST
    assert artifact.contents.inputs == single.contents.inputs
    assert artifact.contents.float_ops == single.contents.float_ops
    assert artifact.contents.float_compute_ops == single.contents.float_compute_ops
    with torch.no_grad():
        expected = flatten_outputs(built(*inputs.args, **inputs.kwargs))
    for size in (1, MOST):
        for output, wanted in zip(artifact.run(inputs.sample(0, size).tensors), expected, strict=True):
            step = float(built.output_scales[0] or 1) if precision == "int8" else 1e-5
            torch.testing.assert_close(output, wanted[:size], rtol=1e-4, atol=1.01 * step)
    with pytest.raises(RunnerError, match=rf"in a call but takes .*, for {MOST} samples at most"):
        artifact.run(inputs.sample().repeated(MOST + 1).tensors)


def test_onnx_runtime_itself_takes_any_number(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    pixels = Interface(max_batch=MOST, pixels=Pixels(mean=[0.5], std=[0.25]), layout="nhwc", outputs=["scores"])
    export(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)),
        "onnx",
        path,
        inputs=-2 * torch.ones(1, 3, 8, 8),
        interface=pixels,
    )
    session = onnxruntime.InferenceSession(str(path))
    assert session.get_inputs()[0].shape == ["batch", 8, 8, 3]
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    scores = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    artifact = load(path, isolated=False)
    torch.testing.assert_close(torch.from_numpy(scores), artifact(images.permute(0, 3, 1, 2))[0])


def test_core_ml_declares_the_range(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    from coremltools.proto import Model_pb2

    path = tmp_path / "net.mlpackage"
    export(nn.Linear(6, 2), "coreml", path, inputs=torch.zeros(1, 6), interface=SEVERAL)
    spec = Model_pb2.Model.FromString((path / "Data/com.apple.CoreML/model.mlmodel").read_bytes())
    batch, features = spec.description.input[0].type.multiArrayType.shapeRange.sizeRanges
    assert (batch.lowerBound, batch.upperBound) == (1, MOST)
    assert (features.lowerBound, features.upperBound) == (6, 6)


def test_core_ml_has_one_image_of_pixels(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    interface = Interface(max_batch=2, pixels=Pixels())
    with pytest.raises(ValueError, match="Core ML takes one image a call"):
        export(
            nn.Conv2d(3, 2, 1), "coreml", tmp_path / "n.mlpackage", inputs=torch.zeros(1, 3, 4, 4), interface=interface
        )


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda values: values.mean(),
            ExportError,
            r"output 0 of the network has the shape \[\] for any number of samples",
        ),
        (lambda values: values.sum(0, keepdim=True), ExportError, r"has the shape \[1, 4\] for any number of samples"),
        (lambda values: values.reshape(1, 4), ExportError, "onnx: "),
        (lambda values: values * values.sum(0), AgreementError, "something else for 3 samples in a call than for one"),
    ],
)
def test_networks_that_mix_samples_are_refused(
    function: Callable[[Tensor], Tensor], error: type[Exception], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(error, match=message):
        export(Calculated(function), "onnx", tmp_path / "net.onnx", inputs=torch.rand(1, 6), interface=SEVERAL)
    assert list(tmp_path.iterdir()) == []


class Prefixed(nn.Module):
    """Tokens of its own in front of those of each sample, such as a class token; and something added to each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(1, count, 6))
        self.positions = nn.Parameter(torch.randn(1, 4 + count, 6))
        self.layer = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        samples = tokens.shape[0]
        joined = torch.cat([self.prefix.expand(samples, -1, -1), self.layer(tokens)], 1)
        return joined + self.positions.expand(samples, -1, -1)


class VisionTransformer(nn.Module):
    """As transformers writes it: heads by a view that leaves their number open, a mask spread to the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded, self.attended = Prefixed(1), nn.Linear(6, 18)
        self.last = nn.Linear(6, 3)
        self.register_buffer("seen", torch.rand(1, 1, 5, 5) > 0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        samples = tokens.shape[0]
        parts = self.attended(self.embedded(tokens)).chunk(3, -1)
        heads = (part.view(samples, 5, -1, 3).transpose(1, 2) for part in parts)
        mask = self.seen | torch.eye(5, dtype=torch.bool)
        mixed = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask.expand(samples, -1, -1, -1))
        result: Tensor = self.last(mixed.transpose(1, 2).reshape(samples, 5, -1)[:, 0])
        return result


@pytest.mark.parametrize(
    ("target_name", "precision"),
    [
        ("onnx", "int8"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("coreml", "fp32"), ("onnx", "fp32"), ("coreml", "int8"))
        ),
    ],
)
def test_a_vision_transformer_takes_several_samples(target_name: str, precision: Precision, tmp_path: Path) -> None:
    pytest.importorskip(NAMES[target_name])
    tokens, built = torch.randn(MOST, 4, 6), VisionTransformer().eval()
    model, given = (quantize(built, [tokens]), {}) if precision == "int8" else (built, {"inputs": tokens[:1]})
    path = tmp_path / f"net{target(target_name).suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExportWarning)
        artifact = export(
            model,
            target_name,
            path,
            batches=[(tokens,)],
            interface=SEVERAL,
            isolated=False,
            **given,  # type: ignore[arg-type]
        )
    assert artifact.agreement is not None
    assert (artifact.agreement.max_steps or 0) <= 1
    assert artifact.agreement.max_relative < (0.02 if precision == "int8" else 1e-4)


@pytest.mark.parametrize("name", ["executorch", "tflite"])
def test_targets_of_apps_take_one_sample(name: str, tmp_path: Path) -> None:
    message = rf"{name}: Interface\(max_batch=3\) is not allowed.*Leave max_batch out, or export to .*coreml, onnx"
    path = tmp_path / f"net{target(name).suffix}"
    with pytest.raises(ValueError, match=message):
        export(nn.Linear(6, 2), name, path, inputs=torch.zeros(1, 6), interface=SEVERAL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "4", (1, 4)])
def test_a_number_of_samples_is_a_whole_number(given: Any) -> None:
    with pytest.raises(ValueError, match="give a whole number of samples, 1 or more"):
        Interface(max_batch=given)
