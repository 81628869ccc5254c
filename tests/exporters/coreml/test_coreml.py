"""Core ML packages: what is written, what is read back of it, and what it computes in the reference interpreter."""

from __future__ import annotations

import copy
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk import files_of_at_most
from models import MODELS, Model
from torch import Tensor, nn
from torch.nn import functional

from lightning_edge.errors import ExportError, MissingExtraError, RunnerError
from lightning_edge.exporters import coreml
from lightning_edge.exporters.coreml import package as mlpackage
from lightning_edge.exporters.coreml.mil.interpreter import Interpreter
from lightning_edge.network import Deployable, Inputs, flatten_outputs
from lightning_edge.quantization import convert, quantize

pytest.importorskip("coremltools")
GRAPH = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


class Transformer(nn.Module):
    """One block with a class token: attention, layer norms and GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)])
        self.heads = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.classify = nn.Linear(16, 4)

    def forward(self, patches: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(patches.shape[0], -1, -1), self.embed(patches)], 1)
        query, key, value = self.heads(self.norms[0](x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norms[1](x))
        logits: Tensor = self.classify(x[:, 0])
        return logits


class SqueezeExcite(nn.Module):
    """A depthwise convolution between pointwise ones, hard-swish, and channels weighed by their means."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.depthwise(self.widen(images))
        x = x * functional.hardsigmoid(self.squeeze(x))
        logits: Tensor = self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


NETWORKS = {
    "residual": MODELS["residual"],
    "two_inputs": MODELS["two_inputs"],
    "dict_output": MODELS["dict_output"],
    "autoencoder": MODELS["autoencoder"],
    "squeeze_excite": Model(SqueezeExcite, lambda batch: Inputs((torch.randn(batch, 3, 8, 8),))),
    "transformer": Model(Transformer, lambda batch: Inputs((torch.randn(batch, 5, 6),))),
}
# Each has a layer of its own, and all that writing and reading packages is about is in the others.
QUICK = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("autoencoder", "transformer"))) for name in NETWORKS]


@cache
def network(name: str, precision: str) -> Deployable:
    torch.manual_seed(0)
    model = NETWORKS[name].build()
    with torch.no_grad():
        for _ in range(5):
            inputs = NETWORKS[name].inputs(16)
            model.train()(*inputs.args, **inputs.kwargs)
    model.eval()
    if precision == "fp32":
        return Deployable(model, NETWORKS[name].inputs(1), "fp32")
    return convert(quantize(model, [NETWORKS[name].inputs(16) for _ in range(2)]))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write each package once, however many tests look at it; they copy it before they change it."""
    written: dict[Any, Path] = {}

    def write(name: str, precision: str = "int8", **options: Any) -> Path:
        key = (name, precision, *sorted(options.items()))
        if key not in written:
            written[key] = tmp_path_factory.mktemp("package") / f"{name}.mlpackage"
            coreml.TARGET.write(network(name, precision), written[key], **options)
        return written[key]

    return write


def distances(name: str, precision: str, path: Path, samples: int = 8) -> list[Tensor]:
    """For each output the differences to the network, in steps of an int8 output, over the largest of a float one."""
    deployable = network(name, precision)
    runner = coreml.TARGET.open(path, 1)
    torch.manual_seed(1)
    found: list[list[Tensor]] = []
    for _ in range(samples):
        inputs = NETWORKS[name].inputs(1)
        with torch.no_grad():
            expected = flatten_outputs(deployable(*inputs.args, **inputs.kwargs))
        outputs = runner(inputs.tensors)
        assert [output.shape for output in outputs] == [value.shape for value in expected]
        scales = deployable.output_scales or [None] * len(expected)
        found.append(
            [
                (output - value).abs() / (scale or value.abs().max())
                for output, value, scale in zip(outputs, expected, scales, strict=True)
            ]
        )
    return [torch.stack(values) for values in zip(*found, strict=True)]


@pytest.mark.parametrize("name", QUICK)
def test_an_int8_package_computes_what_the_converted_graph_does(name: str, package: Any) -> None:
    for steps in distances(name, "int8", package(name)):
        assert steps.max() < 2.01
        assert steps.mean() < 0.25


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("residual", "transformer"))) for name in NETWORKS],
)
def test_a_float_package_computes_what_the_network_does(name: str, package: Any) -> None:
    for relative in distances(name, "fp32", package(name, "fp32")):
        assert relative.max() < 1e-5


@pytest.mark.parametrize("name", ["residual", pytest.param("transformer", marks=pytest.mark.slow)])
def test_half_precision_is_some_steps_off(name: str, package: Any) -> None:
    path = package(name, compute_precision="float16")
    for steps in distances(name, "int8", path):
        assert 0 < steps.max() < 12
        assert steps.mean() < 2
    program = mlpackage.read(path)
    assert {output.dtype for operation in program.operations for output in operation.outputs} >= {"fp16", "int8"}
    assert [value.dtype for value in (*program.inputs, *program.outputs)] == ["fp32", "fp32"]


def weight_values(name: str) -> int:
    modules = NETWORKS[name].build().modules()
    return sum(module.weight.numel() for module in modules if isinstance(module, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize("name", QUICK)
def test_the_package_itself_says_that_its_weights_are_int8(name: str, package: Any) -> None:
    contents = coreml.TARGET.inspect(package(name))
    assert contents.precision == "int8"
    assert contents.int8_weight_bytes == weight_values(name)
    assert contents.float_weight_bytes == 0
    assert contents.float_compute_ops == ()
    assert contents.ops["quantize"] > 0
    assert contents.delegated_ops is None


@pytest.mark.parametrize("name", ["residual", pytest.param("autoencoder", marks=pytest.mark.slow), "squeeze_excite"])
def test_there_are_no_float_islands(name: str, package: Any) -> None:
    assert coreml.TARGET.inspect(package(name)).float_ops == ()


def test_the_package_itself_says_that_its_weights_are_float(package: Any) -> None:
    contents = coreml.TARGET.inspect(package("residual", "fp32"))
    assert contents.precision == "fp32"
    assert contents.int8_weight_bytes == 0
    assert contents.float_weight_bytes == 4 * weight_values("residual")
    assert len(contents.float_compute_ops) == contents.ops["conv"] + contents.ops["linear"] == 4


def test_ios_18_stores_weights_its_own_way(package: Any) -> None:
    path = package("residual", minimum_ios=18)
    contents = coreml.TARGET.inspect(path)
    assert contents.ops["constexpr_blockwise_shift_scale"] == 4
    assert contents.int8_weight_bytes == weight_values("residual")
    assert distances("residual", "int8", path)[0].max() < 2.01


def test_inputs_and_outputs_keep_their_names(package: Any) -> None:
    two = mlpackage.read(package("two_inputs"))
    assert [given.name for given in two.inputs] == ["images", "extra"]
    assert [output.name for output in two.outputs] == ["output"]
    heads = mlpackage.read(package("dict_output"))
    assert [output.name for output in heads.outputs] == ["label", "value"]


def test_a_runner_says_what_it_is_and_takes(package: Any) -> None:
    runner = coreml.TARGET.open(package("two_inputs"), 2)
    assert runner.is_reference
    assert runner.runtime.startswith("reference interpreter of the MIL program (torch ")
    assert runner.runtime.endswith("2 threads), not Core ML's kernels")
    assert [(spec.shape, spec.dtype) for spec in runner.inputs] == [
        ((1, 3, 8, 8), torch.float32),
        ((1, 4), torch.float32),
    ]


def test_running_leaves_the_number_of_threads(package: Any) -> None:
    before = torch.get_num_threads()
    coreml.TARGET.open(package("dict_output"), before + 1)([torch.randn(1, 6)])
    assert torch.get_num_threads() == before


def test_nothing_but_the_package_is_written_and_equal_networks_give_equal_files(package: Any, tmp_path: Path) -> None:
    first, second = package("residual"), tmp_path / "again.mlpackage"
    coreml.TARGET.write(network("residual", "int8"), second)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted([GRAPH, WEIGHTS, Path("Manifest.json")])
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_short_names_and_shared_constants_change_no_value(tmp_path: Path) -> None:
    import coremltools

    with mlpackage.quiet():
        program = network("squeeze_excite", "int8").program().run_decompositions({})
        model = coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS17, skip_model_load=True)
        model.save(str(tmp_path / "long.mlpackage"))
    shutil.copytree(tmp_path / "long.mlpackage", tmp_path / "short.mlpackage")
    mlpackage.compact(tmp_path / "short.mlpackage", ["scores"])
    long, short = (mlpackage.read(tmp_path / f"{name}.mlpackage") for name in ("long", "short"))
    assert [operation.kind for operation in long.operations] == [operation.kind for operation in short.operations]
    assert short.outputs[0].name == "scores"
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(Interpreter(long)([images])[0], Interpreter(short)([images])[0])
    sizes = [(tmp_path / f"{name}.mlpackage" / GRAPH).stat().st_size for name in ("long", "short")]
    assert sizes[1] < 0.65 * sizes[0]


class Odd(nn.Module):
    """An unused input, numbers and None among the arguments, an input given back, one value twice, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self, pair: dict[str, Tensor], ids: Tensor, unused: Tensor, nothing: Any, *, factor: float, mode: str
    ) -> dict[str, Tensor]:
        hidden = self.layer(pair["left"]) * factor + pair["right"] if mode == "scaled" else pair["left"]
        chosen = torch.where(hidden > 0, hidden, -0.5)
        return {
            "state": hidden,
            "twice": hidden,
            "echo": pair["right"],
            "ids": ids,
            "a b": chosen,
            "ones": torch.ones(1, 2),
            "total": hidden.sum(),
        }


@pytest.mark.parametrize("compute_precision", ["float32", "float16"])
def test_unusual_arguments_and_outputs_come_through(compute_precision: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = Inputs(
        ({"left": torch.randn(1, 4), "right": torch.randn(1, 4)}, torch.tensor([3]), torch.randn(1, 2), None),
        {"factor": 2.0, "mode": "scaled"},
    )
    odd = Deployable(Odd().eval(), inputs, "fp32")
    coreml.TARGET.write(odd, tmp_path / "odd.mlpackage", compute_precision=compute_precision)
    program = mlpackage.read(tmp_path / "odd.mlpackage")
    assert [given.name for given in program.inputs] == ["pair_left", "pair_right", "ids", "unused"]
    names = [output.name for output in program.outputs]
    assert len(set(names)) == len(names) == 7
    assert names[1:4] == ["twice", "echo", "output_ids"]
    assert not set(names) & {given.name for given in program.inputs}
    outputs = coreml.TARGET.open(tmp_path / "odd.mlpackage", 1)(inputs.tensors)
    expected = flatten_outputs(odd(*inputs.args, **inputs.kwargs))
    for output, value in zip(outputs, expected, strict=True):
        tolerance = 1e-6 if compute_precision == "float32" else 1e-2
        torch.testing.assert_close(output, value.detach().to(output.dtype), rtol=tolerance, atol=tolerance)


def test_shuffled_channels_come_through(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, images = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ChannelShuffle(3)).eval(), torch.randn(1, 3, 4, 5)
    coreml.TARGET.write(Deployable(network, Inputs.of(images), "fp32"), tmp_path / "net.mlpackage")
    (output,) = coreml.TARGET.open(tmp_path / "net.mlpackage", 1)([images])
    torch.testing.assert_close(output, network(images).detach())


class Windows(nn.Module):
    """Rolls an image, cuts it into windows and puts them back: by six dimensions, which Core ML does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.first(images)).roll((-1, -1), (1, 2))
        batch, height, width, channels = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, channels)
        x = self.inside(x).view(batch, height // 2, width // 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
        logits: Tensor = self.last(x.reshape(batch, height, width, channels).roll((1, 1), (1, 2)))
        return logits


@pytest.mark.slow
def test_windows_of_int8_values_come_through(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 4, 4, 3)
    quantized = convert(quantize(Windows().eval(), [images]))
    coreml.TARGET.write(quantized, tmp_path / "net.mlpackage")
    (output,) = coreml.TARGET.open(tmp_path / "net.mlpackage", 1)([images[:1]])
    (scale,) = quantized.output_scales
    assert scale is not None
    assert (output - quantized(images[:1])).abs().max() <= 1.01 * scale


@pytest.mark.slow
def test_a_constant_that_is_quantized_twice_comes_through(tmp_path: Path) -> None:
    class Biased(nn.Module):
        """Attention under biases of relative positions and a mask of a whole sequence, as T5's encoder has it."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.table = nn.Linear(8, 24), nn.Embedding(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            steps = torch.arange(5)
            bias = self.table(steps[None] - steps[:, None] + 4).permute(2, 0, 1)[None]
            mask = (steps[None, None, None] >= 0).expand(x.shape[0], -1, 5, -1)
            bias = torch.where(mask, bias, torch.finfo(torch.float32).min)
            query, key, value = self.layer(x).view(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            weights = (query @ key.transpose(-2, -1) + bias.contiguous()).softmax(-1)
            scores: Tensor = (weights @ value).flatten(1)
            return scores

    torch.manual_seed(0)
    samples = torch.randn(4, 5, 8)
    quantized = convert(quantize(Biased().eval(), [samples]))
    coreml.TARGET.write(quantized, tmp_path / "net.mlpackage")
    (output,) = coreml.TARGET.open(tmp_path / "net.mlpackage", 1)([samples[:1]])
    (scale,) = quantized.output_scales
    assert scale is not None
    assert (output - quantized(samples[:1])).abs().max() <= 1.01 * scale


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_an_operation_the_converter_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^coreml: .*bessel_j0.*\. Replace that operation"):
        coreml.TARGET.write(Deployable(Bessel(), Inputs((torch.randn(1, 3),)), "fp32"), tmp_path / "bessel.mlpackage")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minimum_ios": 16}, r"minimum_ios=16 .*give 17 or later"),
        ({"minimum_ios": 99}, r"minimum_ios=99 "),
        ({"compute_precision": "int4"}, r"compute_precision='int4' is not one of \('float16', 'float32'\)"),
    ],
    ids=["too old", "unknown", "no float type"],
)
def test_options_that_do_not_exist_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        coreml.TARGET.write(network("dict_output", "fp32"), tmp_path / "x.mlpackage", **options)
    assert not list(tmp_path.iterdir())


def test_the_terminal_stays_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    coreml.TARGET.write(network("dict_output", "int8"), tmp_path / "x.mlpackage")
    coreml.TARGET.open(tmp_path / "x.mlpackage", 1)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.mlpackage").mkdir()
    with pytest.raises(RunnerError, match=r"not a Core ML package: it has no .*model\.mlmodel"):
        coreml.TARGET.open(tmp_path / "x.mlpackage", 1)


def test_a_full_temporary_folder_is_told_as_such(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4)).eval()
    with (
        files_of_at_most(20_000),
        pytest.raises(ExportError, match=r"coremltools could not write .* temporary folder .*Free some space there"),
    ):
        coreml.TARGET.write(Deployable(network, Inputs((torch.randn(1, 64),)), "fp32"), tmp_path / "net.mlpackage")


@pytest.mark.parametrize("file", [GRAPH, WEIGHTS], ids=["graph", "weights"])
@pytest.mark.parametrize(
    "look", [coreml.TARGET.inspect, lambda path: coreml.TARGET.open(path, 1)], ids=["inspect", "open"]
)
def test_a_truncated_package_is_refused(file: Path, look: Any, package: Any, tmp_path: Path) -> None:
    path = tmp_path / "cut.mlpackage"
    shutil.copytree(package("residual"), path)
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(RunnerError, match=r"cut\.mlpackage' cannot be read as a Core ML package .* export it again"):
        look(path)


@pytest.mark.parametrize(
    "content", [None, "", "{}", '{"itemInfoEntries": {"1": {"path": "x"}}, "rootModelIdentifier": "1"}']
)
def test_a_package_that_core_ml_would_not_open_is_refused(content: str | None, package: Any, tmp_path: Path) -> None:
    path = tmp_path / "lost.mlpackage"
    shutil.copytree(package("residual"), path)
    (path / "Manifest.json").unlink()
    if content is not None:
        (path / "Manifest.json").write_text(content)
    with pytest.raises(RunnerError, match=r"has (no|a) Manifest\.json that leads to "):
        coreml.TARGET.inspect(path)


def test_another_kind_of_core_ml_model_is_refused(package: Any, tmp_path: Path) -> None:
    from coremltools.proto import Model_pb2

    path = tmp_path / "old.mlpackage"
    shutil.copytree(package("dict_output"), path)
    spec = Model_pb2.Model.FromString((path / GRAPH).read_bytes())
    spec.neuralNetwork.SetInParent()
    (path / GRAPH).write_bytes(spec.SerializeToString())
    with pytest.raises(RunnerError, match="holds a Core ML neuralNetwork, not an ML Program"):
        coreml.TARGET.open(path, 1)


def test_without_the_extra_it_says_what_to_install(
    package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = package("dict_output")
    monkeypatch.setitem(sys.modules, "coremltools", None)
    for call in (
        lambda: coreml.TARGET.write(network("dict_output", "int8"), tmp_path / "x.mlpackage"),
        lambda: coreml.TARGET.inspect(path),
        lambda: coreml.TARGET.open(path, 1),
    ):
        with pytest.raises(MissingExtraError, match=r"pip install 'lightning-edge\[coreml\]'"):
            call()


def test_on_macos_core_ml_is_fed_and_read_by_name(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import coremltools

    real = coremltools.models.MLModel
    fed: list[dict[str, Any]] = []

    class Fake:
        def __init__(self, path: str, skip_model_load: bool = False) -> None:
            self.real = real(path, skip_model_load=True)
            self.get_spec, self.weights_dir = self.real.get_spec, self.real.weights_dir

        def predict(self, data: dict[str, Any]) -> dict[str, Any]:
            fed.append(data)
            return {"value": np.full((1, 1), 7.0), "label": np.arange(3.0).reshape(1, 3)}

    monkeypatch.setattr(coremltools.models, "MLModel", Fake)
    monkeypatch.setattr(coreml.sys, "platform", "darwin")
    runner = coreml.TARGET.open(package("dict_output"), 1)
    assert not runner.is_reference
    assert runner.runtime.startswith("Core ML (coremltools ")
    label, value = runner([torch.ones(1, 6)])
    assert label.tolist() == [[0.0, 1.0, 2.0]]
    assert value.tolist() == [[7.0]]
    ((name, given),) = fed[0].items()
    assert name == "features"
    assert given.dtype == np.float32
    with pytest.raises(RunnerError, match=r"takes 1 inputs \(features\), 2 given"):
        runner([torch.ones(1, 6)] * 2)


def test_a_float_layer_in_an_int8_package_is_found(tmp_path: Path) -> None:
    deployable = copy.copy(network("residual", "int8"))
    mixed = nn.Sequential(nn.Conv2d(3, 3, 1), deployable.graph)
    coreml.TARGET.write(Deployable(mixed, deployable.inputs, "int8"), tmp_path / "mixed.mlpackage")
    contents = coreml.TARGET.inspect(tmp_path / "mixed.mlpackage")
    assert len(contents.float_compute_ops) == 1
    assert "conv" in contents.float_compute_ops[0]
    assert contents.float_weight_bytes == 4 * 9
