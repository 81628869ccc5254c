"""A file with a fault in one layer: the error names that layer, as the user knows it."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from deployables import batches, network
from torch import Tensor, nn

from lightning_edge.comparison import Comparison
from lightning_edge.evaluation.reference import Reference
from lightning_edge.exporters import Artifact, deployable, export, load
from lightning_edge.exporters.coreml.mil.interpreter import Constant
from lightning_edge.exporters.coreml.package import read
from lightning_edge.exporters.run.runner import Intermediate, Runner
from lightning_edge.exporters.tflite import graph as tflite_graph
from lightning_edge.exporters.verify.agreement import agreement_of, judge_file, rounding_of
from lightning_edge.exporters.verify.divergence import Divergence, explanation, first_divergence
from lightning_edge.exporters.verify.exact import exact
from lightning_edge.measure import Tolerance
from lightning_edge.network import Deployable, Inputs, sort_keywords
from lightning_edge.quantization import quantize

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_torch")


class Layers(nn.Module):
    """Three layers with names of their own, the second of which is looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.body(torch.relu(self.stem(images))))
        scores: Tensor = self.head(hidden.mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return list(torch.randn(2, 8, 3, 6, 6, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def layers(images: list[Tensor]) -> Deployable:
    torch.manual_seed(0)
    return deployable(quantize(Layers().eval(), images))


@pytest.fixture(scope="module")
def good(layers: Deployable, images: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(layers, "tflite", tmp_path_factory.mktemp("good") / "net.tflite", batches=images)


def damaged(good: Artifact, path: Path, what: str, layer: int) -> Artifact:
    """The file with weights or their scales of one convolution or linear layer changed."""
    model = tflite_graph.parse(good.path.read_bytes())
    graph = model.subgraphs[0]
    products = [op for op in graph.operators if tflite_graph.op_name(model, op) in ("CONV_2D", "FULLY_CONNECTED")]
    weight = graph.tensors[products[layer].inputs[1]]
    if what == "weights":
        data = numpy.array(model.buffers[weight.buffer].data)
        model.buffers[weight.buffer].data = numpy.roll(data, len(data) // 2)
    else:
        weight.quantization.scale = [scale * 3 for scale in weight.quantization.scale]
    path.write_bytes(tflite_graph.pack(model))
    return load(path)


@pytest.mark.parametrize("what", ["weights", "scales"])
@pytest.mark.parametrize(("layer", "name"), [(0, "stem"), (1, "body"), (2, "head")])
def test_the_layer_with_the_fault_is_named(
    good: Artifact, layers: Deployable, images: list[Tensor], tmp_path: Path, what: str, layer: int, name: str
) -> None:
    artifact = damaged(good, tmp_path / "bad.tflite", what, layer)
    agreement = agreement_of(layers, artifact, images)
    found = judge_file(layers, artifact, agreement, Tolerance(), lambda: rounding_of(layers, artifact, images))
    assert found.grade == "broken"
    assert re.search(
        rf"quantization steps, allowed .*The first layer that differs is '{name}' "
        rf"\((CONV_2D|FULLY_CONNECTED) \d+ in the file\)",
        str(found),
    )


def test_what_the_own_rounding_of_a_network_moves_is_close(
    good: Artifact, layers: Deployable, images: list[Tensor]
) -> None:
    found = agreement_of(layers, good, images)
    (output,) = found.outputs
    found = replace(found, outputs=(replace(output, max_steps=5.0, most_steps=5.0),))
    own = replace(found, outputs=(replace(output, most_steps=6.0),))
    close = judge_file(layers, good, found, Tolerance(), lambda: own)
    assert close.grade == "close"
    assert "the network's own rounding in float32 moves it as far" in str(close)
    differs = judge_file(layers, good, found, Tolerance(), lambda: agreement_of(layers, good, images))
    assert differs.grade == "differs"
    assert "difference of all but 0.1 % of the values 5 quantization steps, allowed 3" in str(differs)
    differs = judge_file(layers, good, found, Tolerance(max_steps=4.0), lambda: own)
    assert "largest difference 5 quantization steps, allowed 4" in str(differs)


def test_the_own_rounding_is_that_of_float32_against_the_exact_values(
    good: Artifact, layers: Deployable, images: list[Tensor]
) -> None:
    wanted = Comparison(layers.output_scales)
    for batch in images:
        wanted.update([exact(layers)(batch)], [layers(batch)])
    found = rounding_of(layers, good, images)
    assert found == wanted.result()

    def run(answer: Callable[..., Any]) -> None:
        for batch in images:
            answer(batch)

    reference = Reference(exact(layers))
    assert reference.rounding(layers, run) == replace(found, top1=None)

    class Rounder(nn.Module):
        """The network as it would be if float32 moved its outputs by four steps."""

        def forward(self, x: Tensor) -> Tensor:
            (scale,) = layers.output_scales
            shifted: Tensor = layers.graph(x) + 4 * (scale or 0.0)
            return shifted

    assert reference.rounding(layers.with_graph(Rounder()), run).max_steps == pytest.approx(4.0, abs=1.0)


def test_a_good_file_diverges_nowhere(good: Artifact, layers: Deployable) -> None:
    assert explanation(layers, good) == "On the network's own sample no single layer lies far off"


def test_every_layer_of_the_network_is_found_in_the_file(good: Artifact, layers: Deployable) -> None:
    found = good.runner.intermediates(layers.inputs.tensors)  # type: ignore[attr-defined]
    places = {"stem": "CONV_2D", "body": "CONV_2D", "mean_dim": "MEAN", "head": "FULLY_CONNECTED"}
    for name, place in places.items():
        # With all values wrong, each layer in turn is the first that is looked at and differs.
        wrong = [Intermediate(one.operation, one.scale, one.zero_point, one.values.int() + 50) for one in found]
        first = first_divergence(layers, layers.inputs, wrong)
        assert first is not None
        assert first.layer == name
        assert first.mean_steps == pytest.approx(50, abs=1)
        assert first.operation.startswith(place)
        scale = next(one.scale for one in found if one.operation == first.operation)
        found = [one for one in found if one.scale != scale]


def test_what_the_file_does_not_have_is_passed_over() -> None:
    deployed = network("difference", "int8")
    unknown = Intermediate("RELU 0", 1.0, 0, torch.zeros(1, 4))
    assert first_divergence(deployed, deployed.inputs, [unknown]) is None
    assert first_divergence(deployed, deployed.inputs, []) is None


def test_the_message_says_why_there_is_no_layer_to_name(good: Artifact, layers: Deployable) -> None:
    class Closed(Runner):
        runtime, inputs = "Closed 1.0", good.runner.inputs

        def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
            raise AssertionError("not called")

    class Broken(Closed):
        def intermediates(self, tensors: list[Tensor]) -> list[Intermediate]:
            raise RuntimeError("no such tensor")

    def with_runner(runner: Any) -> Artifact:
        changed = copy.copy(good)
        object.__setattr__(changed, "runner", runner)
        return changed

    assert explanation(layers, with_runner(Closed())) == "Closed 1.0 does not give the values inside a file"
    assert explanation(layers, with_runner(Broken())) == (
        "Values inside the file could not be looked at (RuntimeError: no such tensor)"
    )
    fp32 = network("difference", "fp32")
    assert explanation(fp32, good) == "Values inside are compared for int8 networks only"


def test_divergence_is_told_in_words() -> None:
    assert str(Divergence("body.0", "CONV_2D 3", 12.345, 40.0)) == (
        "The first layer that differs is 'body.0' (CONV_2D 3 in the file): 12.3 steps of its output on average and 40 "
        "at most, on one sample"
    )


def test_a_file_in_a_process_of_its_own_is_looked_into(
    good: Artifact, layers: Deployable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_edge.exporters.tflite.TFLite.in_process", False)
    artifact = damaged(good, tmp_path / "bad.tflite", "weights", 1)
    assert "'body' (CONV_2D" in explanation(layers, artifact)


def test_keywords_and_inputs_in_any_order_are_the_networks_own(tmp_path: Path) -> None:
    deployed = network("difference", "int8")
    artifact = export(deployed, "tflite", tmp_path / "net.tflite", batches=batches("difference"))
    assert explanation(deployed, artifact) == "On the network's own sample no single layer lies far off"
    swapped = Inputs(kwargs=dict(reversed(deployed.inputs.kwargs.items())))
    found = artifact.runner.intermediates(sort_keywords(swapped).tensors)  # type: ignore[attr-defined]
    assert len(found) > 3
    assert first_divergence(deployed, swapped, found) is None


class Residual(Layers):
    """With a sum, whose scales coremltools writes in another way."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(images))
        hidden = torch.relu(self.body(hidden) + hidden)
        scores: Tensor = self.head(hidden.mean((2, 3)))
        return scores


SUFFIXES = {"onnx": ".onnx", "coreml": ".mlpackage"}


@pytest.fixture(scope="module")
def residual(images: list[Tensor]) -> Deployable:
    torch.manual_seed(0)
    return deployable(quantize(Residual().eval(), images))


@pytest.fixture(scope="module", params=["onnx", "coreml", "coreml float16"])
def other(
    request: pytest.FixtureRequest, residual: Deployable, images: list[Tensor], tmp_path_factory: Any
) -> Artifact:
    target, _, half = request.param.partition(" ")
    pytest.importorskip("coremltools" if target == "coreml" else "onnxruntime")
    if target == "coreml" and sys.platform == "darwin":
        pytest.skip("Core ML itself does not give the values inside a file")
    options: dict[str, Any] = {"compute_precision": half} if half else {}
    path = tmp_path_factory.mktemp("other") / f"net{SUFFIXES[target]}"
    return export(residual, target, path, batches=images, **options)


def spoiled(good: Artifact, path: Path, layer: int) -> Artifact:
    """The file with the weights of one convolution or linear layer in another order."""
    if good.target == "coreml":
        program = read(good.path)
        kind = "constexpr_affine_dequantize"
        weights = [operation for operation in program.operations if operation.kind == kind]
        stored = weights[layer].inputs["quantized_data"]
        assert isinstance(stored, Constant)
        assert not isinstance(stored.value, str)
        turned = replace(stored, value=numpy.roll(stored.value, stored.value.size // 2))
        made = replace(weights[layer], inputs={**weights[layer].inputs, "quantized_data": turned})
        runner: Any = copy.copy(good.runner)
        steps = tuple(made if operation is weights[layer] else operation for operation in program.operations)
        runner._program = replace(program, operations=steps)
        return replace(good, runner=runner)
    onnx = pytest.importorskip("onnx")
    model = onnx.load(good.path)
    int8 = [value for value in model.graph.initializer if value.data_type == onnx.TensorProto.INT8]
    weight = [value for value in int8 if numpy.prod(value.dims) > 8][layer]
    array = onnx.numpy_helper.to_array(weight)
    weight.raw_data = numpy.roll(array, array.size // 2).tobytes()
    onnx.save(model, path)
    return load(path)


@pytest.mark.parametrize(("layer", "name"), [(0, "stem"), (1, "body"), (2, "head")])
def test_the_layer_with_the_fault_is_named_in_other_files(
    other: Artifact, residual: Deployable, tmp_path: Path, layer: int, name: str
) -> None:
    artifact = spoiled(other, tmp_path / "bad.onnx", layer)
    assert explanation(residual, artifact).startswith(f"The first layer that differs is '{name}' (")


def test_other_good_files_diverge_nowhere_and_have_every_layer(other: Artifact, residual: Deployable) -> None:
    assert explanation(residual, other) == "On the network's own sample no single layer lies far off"
    found = other.runner.intermediates(residual.inputs.tensors)  # type: ignore[attr-defined]
    for name in ("stem", "body", "add", "mean_dim", "head"):
        # With all values wrong, each layer in turn is the first that is looked at and differs.
        wrong = [Intermediate(one.operation, one.scale, one.zero_point, one.values.int() + 50) for one in found]
        first = first_divergence(residual, residual.inputs, wrong)
        assert first is not None
        assert first.layer == name
        found = [one for one in found if one.operation != first.operation]


def test_an_onnx_file_in_a_process_of_its_own_and_in_this_one_give_the_same(
    residual: Deployable, images: list[Tensor], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    artifact = export(residual, "onnx", tmp_path / "net.onnx", batches=images)
    bad = spoiled(artifact, tmp_path / "bad.onnx", 1)
    here = load(bad.path, isolated=False)
    assert "'body' (Conv " in explanation(residual, bad)
    assert explanation(residual, bad) == explanation(residual, here)
