"""TensorFlow Lite files: what is written, what is read back of them, and what LiteRT computes."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployables import batches, exported, int8_weight_count, network, weight_count
from torch import Tensor, nn

from lightning_edge.errors import ExportError, RunnerError
from lightning_edge.exporters import Artifact, deployable, export, load
from lightning_edge.exporters.tflite import graph as tflite_graph
from lightning_edge.exporters.tflite.passes.sorts import sort_by_top_k
from lightning_edge.exporters.verify.agreement import agreement_of, reference_outputs
from lightning_edge.network import Deployable, Precision
from lightning_edge.quantization import quantize
from lightning_edge.reporting.report import Row
from lightning_edge.reporting.rows import described
from lightning_edge.zoo.networks import ResNet8

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tflite")


@cache
def written(folder: Path, name: str, precision: Precision, **options: str) -> tuple[Artifact, list[str]]:
    """The file, and what the export warned of."""
    path = folder / f"{'-'.join((name, precision, *options.values()))}.tflite"
    return exported(network(name, precision), "tflite", path, batches=batches(name), **options)


def ends(path: Path) -> tuple[list[Any], list[Any]]:
    """The file's own inputs and outputs, as LiteRT tells them."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    return interpreter.get_input_details(), interpreter.get_output_details()


def steps(name: str, network: Deployable, artifact: Artifact) -> float:
    largest = agreement_of(network, artifact, batches(name)).max_steps
    assert largest is not None
    return largest


@pytest.mark.parametrize(
    # The slow two, of joined inputs and of a pool that leaves out a row, hold nothing that is not tested elsewhere.
    "name",
    [
        "residual",
        "difference",
        "plain",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("two_inputs", "pooled")),
    ],
)
def test_an_int8_file_is_int8_throughout(folder: Path, name: str) -> None:
    artifact, warned = written(folder, name, "int8")
    contents = artifact.contents
    assert warned == []
    assert (contents.int8_weight_bytes, contents.float_weight_bytes) == (int8_weight_count(name), 0)
    assert (contents.float_compute_ops, contents.float_ops) == ((), ())
    assert contents.delegated_ops is None
    assert artifact.precision == "int8"
    assert {details["dtype"].__name__ for side in ends(artifact.path) for details in side} == {"int8"}
    assert steps(name, network(name, "int8"), artifact) <= 2


@pytest.mark.parametrize("isolated", [True, False])
def test_reference_kernels_compute_as_a_microcontroller(folder: Path, isolated: bool) -> None:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    artifact, _ = written(folder, "plain", "int8")
    plain = load(artifact.path, kernels="reference", isolated=isolated)
    assert plain.runner.runtime.endswith("reference kernels, 1 thread")
    assert plain.runner.is_reference
    assert not artifact.runner.is_reference
    expected = Interpreter(str(artifact.path), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    expected.allocate_tensors()
    (source,), (sink,) = expected.get_input_details(), expected.get_output_details()
    scale, zero_point = source["quantization"]
    others = 0
    for sample in torch.randn(64, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)):
        steps = torch.round(sample / scale) + zero_point
        expected.set_tensor(source["index"], steps.clamp(-128, 127).to(torch.int8).numpy())
        expected.invoke()
        scale_out, zero_out = sink["quantization"]
        wanted = (torch.as_tensor(expected.get_tensor(sink["index"])).float() - zero_out) * scale_out
        (found,) = plain.runner([sample])
        assert torch.equal(found, wanted)
        others += int((found != artifact.runner([sample])[0]).sum())
    assert others  # XNNPACK rounds otherwise
    inside = load(artifact.path, kernels="reference", isolated=False).runner.intermediates([sample])
    assert inside
    row = Row("tflite", "int8", "trained")
    assert described(row, artifact).fallback_share == 0.0
    assert described(row, plain).placements is None  # there is no delegate on a microcontroller


def test_reference_kernels_are_of_tflite_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kernels='reference' is for files of tflite, and this is one of onnx"):
        export(network("plain", "int8"), "onnx", tmp_path / "net.onnx", kernels="reference")
    with pytest.raises(ValueError, match="kernels='plain' is not one of 'delegate', 'reference'"):
        load(tmp_path / "net.tflite", kernels="plain")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["residual", "difference", "tokens", pytest.param("attention", marks=pytest.mark.slow)]
)
def test_float_outputs_are_those_of_the_network(folder: Path, name: str) -> None:
    artifact, _ = written(folder, name, "fp32")
    assert artifact.precision == "fp32"
    inputs = batches(name)[0]
    for output, wanted in zip(
        artifact(*inputs.args, **inputs.kwargs), reference_outputs(network(name, "fp32"), inputs), strict=True
    ):
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)


def test_float_weight_bytes_are_those_of_the_network(folder: Path) -> None:
    contents = written(folder, "residual", "fp32")[0].contents
    assert (contents.int8_weight_bytes, contents.float_weight_bytes) == (0, 4 * weight_count("residual"))
    assert contents.float_compute_ops.count("CONV_2D") == 3


def test_float_ends_keep_the_kernels_int8(folder: Path) -> None:
    int8, _ = written(folder, "difference", "int8")
    artifact, warned = written(folder, "difference", "int8", io="float")
    assert warned == []
    assert {details["dtype"].__name__ for side in ends(artifact.path) for details in side} == {"float32"}
    added = {"QUANTIZE": 2, "DEQUANTIZE": 2}
    assert dict(artifact.contents.ops) == {**int8.contents.ops, **added}
    assert artifact.contents.float_compute_ops == ()
    inputs = batches("difference")[0]
    for one, other in zip(artifact(**inputs.kwargs), int8(**inputs.kwargs), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_timed_is_the_call_of_an_app(folder: Path) -> None:
    """Integers in and out: quantizing a float batch is this package's own, and no part of the file."""
    artifact, _ = written(folder, "plain", "int8")
    sample = batches("plain")[0].sample().tensors
    call = artifact.runner.prepare(sample)
    (given,) = call()  # type: ignore[misc]
    assert given.dtype == np.int8
    (scale,) = network("plain", "int8").output_scales
    (values,) = artifact.run(sample)
    steps = torch.as_tensor(given).float() - values / scale
    assert torch.allclose(steps, steps.flatten()[:1].expand_as(steps), atol=1e-3)  # but for the zero point
    artifact.run([torch.zeros_like(tensor) for tensor in sample])
    assert np.array_equal(call()[0], given)  # type: ignore[index]


def test_float_ends_keep_the_names_of_the_signature(folder: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    artifact, _ = written(folder, "difference", "int8", io="float")
    signature = Interpreter(model_path=str(artifact.path)).get_signature_runner()
    given = batches("difference")[0].sample()
    named = signature(**{name: tensor.numpy() for name, tensor in given.kwargs.items()})
    whole, first = artifact(**given.kwargs)
    torch.testing.assert_close(torch.from_numpy(named["whole"]), whole)
    torch.testing.assert_close(torch.from_numpy(named["first"]), first)


def test_inputs_and_outputs_of_one_shape_keep_their_order(folder: Path) -> None:
    class Twelve(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, *parts: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.layer(part) * (index + 1) for index, part in enumerate(parts[::-1]))

    parts = tuple(torch.randn(3, 2) for _ in range(12))
    artifact = export(Twelve(), "tflite", folder / "twelve.tflite", inputs=parts, batches=[parts])
    assert len(artifact(*parts)) == 12


def test_integers_and_truth_values_are_taken(folder: Path) -> None:
    artifact, _ = written(folder, "tokens", "fp32")
    assert [spec.dtype for spec in artifact.runner.inputs] == [torch.int32, torch.bool]
    ids, mask = batches("tokens")[0].args
    assert ids.dtype == torch.int64
    assert torch.equal(artifact(ids.int(), mask)[0], artifact(ids, mask)[0])


def test_constants_are_aligned_and_debug_names_gone(folder: Path) -> None:
    data = written(folder, "residual", "int8")[0].path.read_bytes()
    model = tflite_graph.parse(data)
    constants = [bytes(buffer.data) for buffer in model.buffers if buffer.data is not None and len(buffer.data) > 64]
    assert constants
    assert all(data.find(constant) % 16 == 0 for constant in constants)
    assert b"Conv2d" not in data
    assert b"serving_default" in data


def test_packing_changes_no_content(folder: Path) -> None:
    data = written(folder, "residual", "int8")[0].path.read_bytes()
    assert tflite_graph.pack(tflite_graph.parse(data)) == data


@pytest.mark.slow
def test_resnet8_is_no_larger_than_the_reference(folder: Path) -> None:
    torch.manual_seed(0)
    images = [torch.rand(8, 3, 32, 32)]
    artifact = export(quantize(ResNet8().eval(), images), "tflite", folder / "resnet8.tflite", batches=images)
    assert artifact.contents.int8_weight_bytes == 77_360
    assert artifact.size_bytes <= 98_496


@pytest.mark.slow
def test_float_islands_are_named(folder: Path) -> None:
    artifact, warned = written(folder, "attention", "int8")
    assert artifact.contents.float_ops
    assert len(warned) == 1
    assert all(operation in warned[0] for operation in artifact.contents.float_ops)


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values


def test_an_operation_it_does_not_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsupported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values: Tensor = torch.linalg.svdvals(x)
            return values

    with pytest.raises(ExportError, match=r"^tflite: Lowering not found: aten\._linalg_svd.*Replace that operation"):
        export(Unsupported(), "tflite", tmp_path / "net.tflite", inputs=torch.randn(1, 3, 4))
    # A sort as LiteRT's converter writes it, without our pass.
    convert = import_module("lightning_edge.exporters.tflite.convert")
    monkeypatch.setattr(convert, "PASSES", tuple(each for each in convert.PASSES if each is not sort_by_top_k))
    with pytest.raises(RunnerError, match=r"no kernel for STABLEHLO_SORT: replace it in the network, or leave tflite"):
        export(Sorted(), "tflite", tmp_path / "net.tflite", inputs=torch.randn(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_threads_are_told(folder: Path) -> None:
    path = written(folder, "residual", "int8")[0].path
    assert load(path, threads=2).runner.runtime.endswith("XNNPACK, 2 threads")


def test_a_float_layer_in_an_int8_graph_is_counted(tmp_path: Path) -> None:
    made = deployable(nn.Sequential(nn.Linear(6, 4)), torch.randn(1, 6))
    pretended = Deployable(made.graph, made.inputs, "int8", (0.1,))
    with pytest.raises(ExportError, match="int8 but the file holds no int8 weights"):
        export(pretended, "tflite", tmp_path / "net.tflite")


def test_one_empty_buffer_is_enough(folder: Path) -> None:
    artifact, _ = written(folder, "residual", "int8")
    model = tflite_graph.parse(artifact.path.read_bytes())
    empty = [index for index, buffer in enumerate(model.buffers) if buffer.data is None or not len(buffer.data)]
    assert empty == [0]
    # As the converter writes it: one for each activation. It computes the same and is larger.
    for tensor in model.subgraphs[0].tensors:
        if tensor.buffer == 0:
            model.buffers.append(type(model.buffers[0])())
            tensor.buffer = len(model.buffers) - 1
    larger = folder / "larger.tflite"
    larger.write_bytes(tflite_graph.pack(model))
    assert larger.stat().st_size > artifact.size_bytes
    for batch in batches("residual"):
        pairs = zip(artifact(*batch.args), load(larger)(*batch.args), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_weights_halfway_between_two_integers_are_those_of_the_network(tmp_path: Path) -> None:
    # LiteRT's converter rounds what it is given once more, and rounds some of these to the other side.
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in (network[0], network[3]):
        assert isinstance(layer.weight, Tensor)
        # With 127/128 as the largest of a channel a step is 1/128; the others lie at, or one bit beside, a half.
        halves = torch.randint(-120, 120, layer.weight.shape, generator=generator) + 0.5
        halves = torch.nextafter(halves, halves + torch.randint(-1, 2, halves.shape, generator=generator))
        layer.weight.data = (halves / 128).flatten(1)
        layer.weight.data[:, 0] = 127 / 128
        layer.weight.data = layer.weight.data.view(halves.shape)
    images = torch.rand(16, 3, 3, 3, generator=generator)
    quantized = deployable(quantize(network, [images]))
    artifact = export(quantized, "tflite", tmp_path / "net.tflite", batches=[images])
    held = {int8_weights(quantized.graph, "conv2d"), int8_weights(quantized.graph, "linear")}
    model = tflite_graph.parse(artifact.path.read_bytes())
    buffers = [bytes(buffer.data) for buffer in model.buffers if buffer.data is not None]
    for values in held:
        assert values in buffers


def int8_weights(graph: nn.Module, layer: str) -> bytes:
    """The integers of a layer's weight, channels last as LiteRT has them."""
    assert isinstance(graph, torch.fx.GraphModule)
    (node,) = [node for node in graph.graph.nodes if str(node.target) == f"aten.{layer}.default"]
    stored = attrgetter(str(node.args[1].args[0].target))(graph)
    values: bytes = (stored.permute(0, 2, 3, 1) if stored.dim() == 4 else stored).contiguous().numpy().tobytes()
    return values
