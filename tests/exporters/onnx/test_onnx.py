"""ONNX files: what is written, what is read back of them, and what ONNX Runtime and OpenVINO compute."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, final

import lightning as L
import pytest
import torch
from deployables import Branches, batches, beyond, exported, int8_weight_count, network, weight_count
from onnx_files import kernels
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import DeviceEvaluationCallback, EdgeCompressionCallback, Quantize
from lightning_edge.errors import ExportError, MissingExtraError, RunnerError
from lightning_edge.exporters import Artifact, export, load
from lightning_edge.exporters.onnx import open_openvino, runtime, sums_overflow
from lightning_edge.exporters.verify.agreement import agreement_of, reference_outputs
from lightning_edge.measure import Timing
from lightning_edge.network import Precision
from lightning_edge.quantization import quantize
from lightning_edge.zoo.networks import ResNet8

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@cache
def written(folder: Path, name: str, precision: Precision, **options: str) -> tuple[Artifact, list[str]]:
    """The file, and what the export warned of."""
    path = folder / f"{'-'.join((name, precision, *options.values()))}.onnx"
    return exported(network(name, precision), "onnx", path, batches=batches(name), **options)


@pytest.mark.parametrize(
    "name", ["residual", "plain", *(pytest.param(name, marks=slow) for name in ("two_inputs", "pooled"))]
)
def test_an_int8_file_runs_on_int8_kernels_throughout(folder: Path, name: str) -> None:
    artifact, warned = written(folder, name, "int8")
    contents = artifact.contents
    assert warned == []
    assert (contents.int8_weight_bytes, contents.float_weight_bytes) == (int8_weight_count(name), 0)
    assert (contents.float_compute_ops, contents.float_ops) == ((), ())
    assert artifact.precision == "int8"
    run = kernels(artifact.path)
    assert {"Conv", "Gemm", "MatMul", "Add", "Pad", "Relu", "ReduceMean"}.isdisjoint(run)
    assert run["QLinearConv"] == contents.ops["Conv"]
    steps = agreement_of(network(name, "int8"), artifact, batches(name)).max_steps
    assert steps is not None
    assert steps < 1.5


@pytest.mark.parametrize("name", ["residual", "difference", "tokens", "attention"])
def test_float_outputs_are_those_of_the_network(folder: Path, name: str) -> None:
    artifact, warned = written(folder, name, "fp32")
    assert warned == []
    assert artifact.precision == "fp32"
    inputs = batches(name)[0]
    for output, wanted in zip(
        artifact(*inputs.args, **inputs.kwargs), reference_outputs(network(name, "fp32"), inputs), strict=True
    ):
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)


def test_float_weight_bytes_are_those_of_the_network(folder: Path) -> None:
    contents = written(folder, "residual", "fp32")[0].contents
    assert (contents.int8_weight_bytes, contents.float_weight_bytes) == (0, 4 * weight_count("residual"))
    assert contents.float_compute_ops.count("Conv") == 3


def test_inputs_and_outputs_have_the_names_of_the_network(folder: Path) -> None:
    artifact, _ = written(folder, "difference", "int8")
    session = onnxruntime.InferenceSession(str(artifact.path))
    assert [value.name for value in session.get_inputs()] == ["ape", "zebra"]
    assert [value.name for value in session.get_outputs()] == ["whole", "first"]
    given = batches("difference")[0].sample()
    named = session.run(["first"], {name: tensor.numpy() for name, tensor in given.kwargs.items()})
    torch.testing.assert_close(torch.from_numpy(named[0]), artifact(**given.kwargs)[1])


def test_integers_and_truth_values_are_taken(folder: Path) -> None:
    artifact, _ = written(folder, "tokens", "fp32")
    assert [spec.dtype for spec in artifact.runner.inputs] == [torch.int64, torch.bool]
    ids, mask = batches("tokens")[0].args
    assert torch.equal(artifact(ids.int(), mask)[0], artifact(ids, mask)[0])


def test_threads_are_told(folder: Path) -> None:
    path = written(folder, "residual", "int8")[0].path
    one, two = load(path), load(path, threads=2)
    assert "CPU, 1 thread" in one.runner.runtime
    assert "CPU, 2 threads" in two.runner.runtime
    images = batches("residual")[0].args[0]
    assert torch.equal(one(images)[0], two(images)[0])


@pytest.mark.parametrize(
    ("machine", "capabilities", "overflow"),
    [
        ("x86_64", {"avx2": True}, True),
        ("AMD64", {}, True),
        ("x86_64", {"avx512_vnni": True}, False),
        ("x86_64", {"avx512_vnni": False, "avx_vnni": True}, False),
        ("aarch64", {}, False),
    ],
)
def test_slower_exact_kernels_are_asked_for_only_where_sums_overflow(
    monkeypatch: pytest.MonkeyPatch, machine: str, capabilities: dict[str, bool], overflow: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert sums_overflow() is overflow


def default_session(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    return torch.cat([torch.as_tensor(session.run(None, {name: image[None].numpy()})[0]) for image in images])


@pytest.mark.parametrize(
    "name", ["residual", *(pytest.param(name, marks=slow) for name in ("plain", "pooled", "attention"))]
)
def test_unsigned_weights_are_right_in_a_default_session(folder: Path, name: str) -> None:
    signed, unsigned = written(folder, name, "int8")[0], written(folder, name, "int8", weights="uint8")[0]
    images = batches(name)[0].args[0]
    assert torch.equal(default_session(unsigned.path, images), signed(images)[0])
    model = onnx.ModelProto.FromString(unsigned.path.read_bytes())
    assert onnx.TensorProto.INT8 not in {value.data_type for value in model.graph.initializer}
    assert unsigned.contents.int8_weight_bytes == signed.contents.int8_weight_bytes
    assert kernels(unsigned.path) == kernels(signed.path)


def test_the_session_that_figures_hold_for_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder, "residual", "int8")[0].path
    for overflow, told in ((True, ", session.x64quantprecision=1"), (False, "CPU, 1 thread")):
        monkeypatch.setattr(runtime, "sums_overflow", lambda *given, overflow=overflow: overflow)
        assert load(path, isolated=False).runner.runtime.endswith(told)


def test_equal_networks_give_equal_files_without_names_from_this_machine(folder: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "int8"):
        first = written(folder, "residual", precision)[0].path.read_bytes()
        second = export(network("residual", precision), "onnx", tmp_path / f"{precision}.onnx").path.read_bytes()
        assert first == second
        model = onnx.ModelProto.FromString(first)
        assert {entry.key for entry in model.metadata_props} == {"lightning_edge.inputs", "lightning_edge.outputs"}
        assert [*model.graph.metadata_props, *model.graph.value_info] == []
        assert not [node for node in model.graph.node if node.metadata_props or node.doc_string]
        for part in (b".py", b"site-packages", b"conv2d", b"dequantize_per", b"pkg.torch", b"_frozen_param"):
            assert part not in first


def test_a_cut_or_foreign_file_is_refused(folder: Path, tmp_path: Path) -> None:
    data = written(folder, "residual", "int8")[0].path.read_bytes()
    path = tmp_path / "cut.onnx"
    for cut in (0, 20, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:cut])
        with pytest.raises(RunnerError, match=r"cut\.onnx is no \.onnx file: it .*Export it again"):
            load(path)
    path.write_bytes(b"something else altogether" * 100)
    with pytest.raises(RunnerError, match=r"cut\.onnx is no \.onnx file: it does not begin as one"):
        load(path)


def test_four_bits_are_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"onnx: scheme='int4_weight_only' is not one of .*int8_weight_only"):
        export(network("residual", "fp32"), "onnx", tmp_path / "net.onnx", scheme="int4_weight_only")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_converter_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lightning-edge\[onnx\]'"):
        export(nn.Linear(4, 2), "onnx", tmp_path / "net.onnx", inputs=torch.rand(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_halves_take_and_give_float32(folder: Path) -> None:
    artifact, _ = written(folder, "difference", "fp32", scheme="fp16")
    assert [spec.dtype for spec in artifact.runner.inputs] == [torch.float32, torch.float32]
    assert {output.dtype for output in artifact(**batches("difference")[0].kwargs)} == {torch.float32}
    assert artifact.contents.half_weight_bytes == artifact.contents.float_weight_bytes == 2 * weight_count("difference")


@pytest.mark.parametrize("scheme", ["int8_weight_only", "int8_dynamic"])
def test_stored_weights_are_floats_once_the_file_is_loaded(folder: Path, scheme: str) -> None:
    artifact, _ = written(folder, "residual", "fp32", scheme=scheme)
    contents = artifact.contents
    assert (contents.int8_weight_bytes, contents.float_weight_bytes) == (weight_count("residual"), 0)
    run, plain = kernels(artifact.path), kernels(written(folder, "residual", "fp32")[0].path)
    if scheme == "int8_weight_only":
        assert run == plain
    else:  # its convolutions are stored only, its linear layer runs on integers
        assert (run["Conv"] + run["FusedConv"], run["Gemm"]) == (plain["Conv"] + plain["FusedConv"], 0)
        assert run["MatMulIntegerToFloat"] + run["DynamicQuantizeMatMul"] == plain["Gemm"] == 1
        assert {"ConvInteger", "DequantizeLinear", "Cast"}.isdisjoint(run)


def test_activations_on_the_fly_are_for_linear_layers(tmp_path: Path) -> None:
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(ExportError, match=r"onnx: scheme='int8_dynamic' left no weight .*'int8_weight_only'"):
        export(convolutions, "onnx", tmp_path / "net.onnx", inputs=torch.rand(1, 3, 8, 8), scheme="int8_dynamic")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_convolutions_of_resnet8_become_int8_kernels(tmp_path: Path) -> None:
    # Of what torch.onnx writes, ONNX Runtime makes 5 of the 9 int8: residual branches, paddings and the mean stop it.
    torch.manual_seed(0)
    images = [torch.rand(4, 3, 32, 32)]
    artifact = export(quantize(ResNet8().eval(), images), "onnx", tmp_path / "resnet8.onnx", batches=images)
    run = kernels(artifact.path)
    assert (run["QLinearConv"], run["QGemm"], run["QLinearAdd"]) == (9, 1, 3)
    assert set(run) <= {
        "DequantizeLinear",
        "Reshape",
        "QGemm",
        "QLinearAdd",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QuantizeLinear",
        "Transpose",
    }
    assert artifact.contents.int8_weight_bytes == 77_360
    assert artifact.size_bytes < 90_000


def test_weights_are_int8_biases_int32_and_activations_uint8(folder: Path) -> None:
    graph = onnx.load(str(written(folder, "residual", "int8")[0].path)).graph
    stored = {value.name: value.data_type for value in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            _, weight, bias = (stored.get(makers[name].input[0]) for name in node.input)
            assert (weight, bias) == (onnx.TensorProto.INT8, onnx.TensorProto.INT32)
        elif node.op_type == "QuantizeLinear":
            assert stored[node.input[2]] == onnx.TensorProto.UINT8


def test_a_bias_beyond_int32_is_kept(tmp_path: Path) -> None:
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            with torch.no_grad():
                self.layer.weight[1] = 1e-9
                self.layer.bias.copy_(torch.tensor([0.1, 50.0, -0.1]))

        def forward(self, values: Tensor) -> Tensor:
            outputs: Tensor = self.layer(values)
            return outputs

    torch.manual_seed(0)
    values = 1e-3 * torch.randn(8, 4)
    artifact = export(quantize(Faint().eval(), [values]), "onnx", tmp_path / "net.onnx", batches=[values])
    torch.testing.assert_close(artifact(values)[0][:, 1], torch.full((8,), 50.0), atol=0.5, rtol=0)


@final
class Between(nn.Module):
    """An operation between two convolutions."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        """Run all three."""
        outputs: Tensor = self.after(self.operation(self.before(x)))
        return outputs


def in_int8(operation: Callable[[Tensor], Tensor], path: Path) -> Artifact:
    torch.manual_seed(0)
    images = [torch.randn(4, 3, 7, 6)]
    return export(quantize(Between(operation).eval(), images), "onnx", path, batches=images)


DIFFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "activations": lambda x: x - x.relu(),
    "number": lambda x: x - 1.5,
    "image": lambda x: x - x.mean((2, 3), keepdim=True),
    "square": lambda x: x - x * x,
}


def test_differences_are_sums_on_int8_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = [torch.randn(4, 3, 7, 6)]
    network = Branches({name: Between(function) for name, function in DIFFERENCES.items()}).eval()
    artifact = export(quantize(network, images), "onnx", tmp_path / "difference.onnx", batches=images)
    assert artifact.contents.float_ops == ()
    assert "Sub" not in artifact.contents.ops
    assert kernels(artifact.path)["QLinearAdd"] == len(DIFFERENCES)
    assert beyond(network.names, artifact.agreement, steps=0) == {}


# The pass has its own tests on graphs, and a file of such layers side by side.
@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": (5, 4), "stride": 3, "padding": (2, 1), "groups": 8},
        {"kernel_size": 3, "stride": (1, 2), "dilation": 2, "padding": 1},
        {"kernel_size": 2, "stride": 2, "output_padding": 1},
    ],
    ids=str,
)
def test_transposed_convolutions_are_convolutions_on_int8_kernels(tmp_path: Path, layer: dict[str, Any]) -> None:
    artifact = in_int8(nn.ConvTranspose2d(8, 8, **layer), tmp_path / "transposed.onnx")
    assert artifact.contents.float_compute_ops == ()
    assert kernels(artifact.path)["QLinearConv"] == 3
    assert artifact.agreement is not None
    assert artifact.agreement.max_steps == 0


@pytest.mark.parametrize("scheme", [None, "fp16", "int8"])
def test_zeros_around_a_maximum_count(tmp_path: Path, scheme: str | None) -> None:
    # ONNX Runtime takes them for the pool's own padding, which no maximum takes.
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2), nn.Conv2d(8, 4, 1)
    ).eval()
    with torch.no_grad():
        layers[0].bias.fill_(-3.0)  # type: ignore[operator, union-attr]
    images = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    model = quantize(layers, images) if scheme == "int8" else layers
    options = {"scheme": scheme} if scheme == "fp16" else {}
    artifact = export(model, "onnx", tmp_path / "padded.onnx", inputs=images[0][:1], batches=images, **options)
    assert artifact.agreement is not None
    assert artifact.agreement.max_relative < (2e-3 if scheme == "fp16" else 1e-5)


def test_repeating_pixels_computes_nothing_in_float(tmp_path: Path) -> None:
    artifact = in_int8(nn.Upsample(scale_factor=2.0), tmp_path / "larger.onnx")
    assert artifact.contents.float_ops == ()
    assert kernels(artifact.path)["QuantizeLinear"] == 1


def test_an_output_that_is_given_twice_or_is_an_input(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            total = x + 1
            return {"x": total, "same": total, "given": x}

    x = torch.randn(1, 3)
    artifact = export(Twice(), "onnx", tmp_path / "net.onnx", inputs={"x": x})
    assert all(torch.equal(*pair) for pair in zip(artifact(x=x), (x + 1, x + 1, x), strict=True))
    graph = onnx.load(str(artifact.path)).graph
    assert [value.name for value in graph.output][1:] == ["same", "given"]
    assert len({value.name for value in (*graph.input, *graph.output)}) == 4


def test_an_operation_it_does_not_have_is_named(tmp_path: Path) -> None:
    class Unsupported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values: Tensor = torch.linalg.svdvals(x)
            return values

    with pytest.raises(ExportError, match=r"^onnx: .*_linalg_svd.*Replace that operation by one that ONNX has"):
        export(Unsupported(), "onnx", tmp_path / "net.onnx", inputs=torch.randn(1, 3, 4))
    assert list(tmp_path.iterdir()) == []


def test_weights_in_another_file_are_refused(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(str(written(folder, "residual", "fp32")[0].path))
    path = tmp_path / "net.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="net.data", size_threshold=0)
    with pytest.raises(RunnerError, match=r"lie in 'net\.data'.*save_as_external_data=False"):
        load(path)


def test_a_size_that_is_not_fixed_is_refused_but_for_the_batch(folder: Path, tmp_path: Path) -> None:
    artifact = written(folder, "digits", "fp32")[0]
    model = onnx.load(str(artifact.path))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    path = tmp_path / "net.onnx"
    dims[0].dim_param = "batch"
    onnx.save(model, str(path))
    inputs = batches("digits")[0]
    torch.testing.assert_close(load(path)(*inputs.args), artifact(*inputs.args))
    dims[2].dim_param = "height"
    onnx.save(model, str(path))
    with pytest.raises(RunnerError, match=r"has the shape \['batch', 1, 'height', .*fixed numbers, but for the first"):
        load(path)


def test_a_missing_library_names_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder, "residual", "int8")[0].path
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lightning-edge\[onnx\]'"):
        load(path)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lightning-edge\[openvino\]'"):
        open_openvino(path)


@pytest.mark.parametrize(("name", "precision"), [("residual", "int8"), ("difference", "int8"), ("tokens", "fp32")])
def test_openvino_computes_what_onnx_runtime_does(folder: Path, name: str, precision: Precision) -> None:
    pytest.importorskip("openvino")
    artifact, _ = written(folder, name, precision)
    runner = open_openvino(artifact.path)
    assert runner.runtime.startswith("OpenVINO 2026")
    assert runner.inputs == artifact.runner.inputs
    other = replace(artifact, runner=runner)
    inputs = batches(name)[0]
    pairs = zip(other(*inputs.args, **inputs.kwargs), artifact(*inputs.args, **inputs.kwargs), strict=True)
    scales = network(name, precision).output_scales or (1e-5,)
    for (output, wanted), scale in zip(pairs, scales, strict=True):
        torch.testing.assert_close(output, wanted, atol=1.1 * (scale or 1e-5), rtol=0)


def test_openvino_refuses_what_is_no_file_of_it(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "cut.onnx"
    path.write_bytes(b"something else altogether")
    with pytest.raises(RunnerError, match=r"cut\.onnx does not load in OpenVINO: it is cut short, or no ONNX file"):
        open_openvino(path)


@pytest.mark.slow
def test_a_trained_network_is_reported_with_its_own_metrics(tmp_path: Path) -> None:
    class Task(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten())
            self.net.append(nn.Linear(36, 2))

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-2)

    L.seed_everything(0)
    labels = torch.arange(64) % 2
    images = torch.randn(64, 1, 8, 8) + labels.reshape(-1, 1, 1, 1)
    data = DataLoader(TensorDataset(images, labels), batch_size=16)
    evaluation = DeviceEvaluationCallback(["onnx"], str(tmp_path), timing=Timing(warmup=1, repeats=2))
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[EdgeCompressionCallback([Quantize(start=0.5)]), evaluation],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    task = Task()
    trainer.fit(task, data, data)
    assert evaluation.report is not None
    assert evaluation.report.failures == []
    row = next(row for row in evaluation.report.rows if row.label == "onnx int8 (quantized in training)")
    assert row.path is not None
    artifact = load(tmp_path / row.path)
    assert row.int8_weight_share == 1.0
    assert row.metrics["val_acc"] == pytest.approx((artifact(images)[0].argmax(1) == labels).float().mean().item())
    assert kernels(artifact.path)["QLinearConv"] == 1


def test_a_weight_that_two_layers_share_is_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, values: Tensor) -> Tensor:
            outputs: Tensor = self.layer(torch.relu(self.layer(values)))
            return outputs

    torch.manual_seed(0)
    values = torch.randn(8, 16)
    artifact = export(quantize(Tied().eval(), [values]), "onnx", tmp_path / "net.onnx", batches=[values])
    assert (artifact.contents.ops["Gemm"], artifact.contents.int8_weight_bytes) == (2, 16 * 16)
    assert kernels(artifact.path)["QGemm"] == 2
