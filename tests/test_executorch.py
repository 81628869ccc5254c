"""ExecuTorch files: what is written, what is read back of them, and what the runtime computes."""

from __future__ import annotations

import copy
import hashlib
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, final

import pytest
import torch
from deployables import batches, exported, module, network, weight_count
from torch import Tensor, nn
from torch.nn import functional

from lightning_edge.errors import ExportError, RunnerError
from lightning_edge.exporters import Artifact, ExportWarning, checks, deployable, export, load, pte
from lightning_edge.network import Precision
from lightning_edge.quantization import quantize

pytest.importorskip("executorch")

WHOLE = ("residual", "two_inputs", "difference", "digits", "pooled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("executorch")


@cache
def written(folder: Path, name: str, precision: Precision) -> tuple[Artifact, list[str]]:
    """The file, and what the export warned of."""
    path = folder / f"{name}-{precision}.pte"
    return exported(network(name, precision), "executorch", path, batches=batches(name))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_network_is_delegated(folder: Path, name: str, precision: Precision) -> None:
    artifact, warned = written(folder, name, precision)
    contents = artifact.contents
    assert warned == []
    assert contents.undelegated_ops == ()
    assert contents.delegated_ops == sum(contents.ops.values()) > 0
    assert contents.precision == artifact.precision == precision
    assert (contents.float_compute_ops == ()) == (precision == "int8")
    if precision == "int8":
        assert contents.float_ops == ()


@pytest.mark.parametrize("name", ["residual", "two_inputs", "difference", "pooled"])
def test_weight_bytes_are_those_of_the_network(folder: Path, name: str) -> None:
    int8, fp32 = written(folder, name, "int8")[0].contents, written(folder, name, "fp32")[0].contents
    assert (int8.int8_weight_bytes, int8.float_weight_bytes) == (weight_count(name), 0)
    assert (fp32.int8_weight_bytes, fp32.float_weight_bytes) == (0, 4 * weight_count(name))


@pytest.mark.parametrize(("name", "precision"), [("residual", "int8"), ("pooled", "int8"), ("attention", "int8")])
def test_outputs_lie_within_steps_of_the_network(folder: Path, name: str, precision: Precision) -> None:
    artifact, _ = written(folder, name, precision)
    agreement = checks.agreement_of(network(name, precision), artifact, batches(name))
    assert agreement.samples == 16
    assert agreement.max_steps is not None
    assert agreement.max_steps <= 2


@pytest.mark.parametrize("name", ["residual", "difference", "tokens", "attention"])
def test_float_outputs_are_those_of_the_network(folder: Path, name: str) -> None:
    artifact, _ = written(folder, name, "fp32")
    inputs = batches(name)[0]
    for output, wanted in zip(
        artifact(*inputs.args, **inputs.kwargs), checks.reference_outputs(network(name, "fp32"), inputs), strict=True
    ):
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)


def test_planned_memory_is_told(folder: Path) -> None:
    planned = written(folder, "residual", "int8")[0].contents.planned_memory_bytes
    assert planned is not None
    assert planned >= (3 * 8 * 8 + 5) * 4  # at least its float input and output


def test_what_stays_outside_the_delegate_is_warned_of(tmp_path: Path) -> None:
    # 7x7: too large a window to be a convolution.
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(7, stride=1), nn.Conv2d(4, 2, 1)).eval()
    images = [torch.randn(4, 3, 8, 8)]
    artifact, warned = exported(quantize(layers, images), "executorch", tmp_path / "net.pte", batches=images)
    assert artifact.contents.undelegated_ops == ("aten::avg_pool2d",)
    assert artifact.contents.float_ops == ("aten::avg_pool2d",)
    assert len(warned) == 2
    assert all("aten::avg_pool2d" in warning for warning in warned)


@final
class Attention(nn.Module):
    """One head of attention, and the mean of its tokens."""

    def __init__(self, **attention: Any) -> None:
        super().__init__()
        self.attention = attention
        self.heads, self.head = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Run it."""
        query, key, value = self.heads(tokens).unsqueeze(1).chunk(3, -1)
        attended = functional.scaled_dot_product_attention(query, key, value, **self.attention)
        logits: Tensor = self.head(attended.squeeze(1).mean(1))
        return logits


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("attention", [{}, {"is_causal": True, "scale": 0.3}], ids=["whole", "causal"])
def test_attention_and_the_mean_of_tokens_are_delegated(
    tmp_path: Path, attention: dict[str, Any], precision: Precision
) -> None:
    torch.manual_seed(0)
    model, tokens = Attention(**attention).eval(), torch.randn(16, 6, 8)
    made = quantize(model, [tokens]) if precision == "int8" else deployable(model, tokens)
    artifact, _ = exported(made, "executorch", tmp_path / "net.pte", batches=[tokens])
    assert artifact.contents.undelegated_ops == ()
    assert artifact.contents.ops["GlobalAvgPooling2d"] == 1
    agreement = checks.agreement_of(made if precision == "fp32" else deployable(made), artifact, [tokens])
    assert agreement.max_relative < 1e-5 if precision == "fp32" else (agreement.max_steps or 0.0) <= 1.01


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(8), nn.LayerNorm(8, eps=0.1, bias=False), nn.LayerNorm(8, elementwise_affine=False)],
    ids=["affine", "no bias", "plain"],
)
@pytest.mark.parametrize("tokens", [torch.randn(4, 6, 8), torch.randn(4, 8)], ids=["tokens", "one"])
def test_layer_norm_is_delegated(tmp_path: Path, norm: nn.LayerNorm, tokens: Tensor) -> None:
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    made = deployable(nn.Sequential(norm, nn.Linear(8, 5)).eval(), 3 * tokens + 20)
    artifact, _ = exported(made, "executorch", tmp_path / "net.pte", batches=[3 * tokens + 20])
    assert artifact.contents.undelegated_ops == ()
    assert checks.agreement_of(made, artifact, [3 * tokens + 20]).max_relative < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_attention_keeps_its_type(tmp_path: Path, dtype: torch.dtype) -> None:
    tokens = torch.randn(4, 6, 8)
    scheme = {"scheme": "fp16"} if dtype is torch.float16 else {}
    artifact = export(Attention(is_causal=True), "executorch", tmp_path / "net.pte", inputs=tokens, **scheme)
    assert artifact.contents.inputs[0].dtype == artifact.contents.outputs[0].dtype == str(dtype).removeprefix("torch.")


class RowsOfAnImage(nn.Module):
    """Softmax over the rows of what a convolution gives: XNNPACK has the channels last there."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run both, softmax in between."""
        return self.after(self.before(x).softmax(dim=-1))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_softmax_over_the_rows_of_an_image_is_one_over_its_rows(tmp_path: Path, precision: Precision) -> None:
    torch.manual_seed(0)
    rows, images = RowsOfAnImage().eval(), torch.randn(4, 3, 6, 5)
    model = quantize(rows, [images]) if precision == "int8" else deployable(rows, images)
    with pytest.warns(ExportWarning, match="Softmax") if precision == "int8" else nullcontext():
        artifact = export(model, "executorch", tmp_path / "rows.pte", batches=[images])
    assert artifact.contents.ops["Softmax"] == 1
    assert artifact.contents.undelegated_ops == ()
    assert artifact.agreement is not None
    steps = artifact.agreement.max_steps
    assert artifact.agreement.max_relative < 1e-4 if steps is None else steps < 1.5


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_padding_is_int8(tmp_path: Path, value: float) -> None:
    """ExecuTorch's own lowering dequantizes, pads in float and quantizes again."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.ConstantPad2d((0, 1, 0, 1), value), nn.Conv2d(8, 4, 3, 2)]
    model, images = nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), value), *layers), torch.randn(8, 3, 12, 12)
    artifact = export(quantize(model.eval(), [images]), "executorch", tmp_path / "net.pte", batches=[images])
    ops = artifact.contents.ops
    assert (ops["StaticConstantPad"], ops["Convert"]) == (2, 2)  # of the input and the output
    assert artifact.agreement is not None
    assert artifact.agreement.max_steps is not None
    assert artifact.agreement.max_steps <= 1.01


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Tanh(), nn.GELU()], ids=lambda module: type(module).__name__)
def test_activations_that_are_tables_of_8_bits_are_int8(tmp_path: Path, activation: nn.Module) -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 4, 3)), torch.randn(8, 3, 9, 9)
    artifact = export(quantize(model.eval(), [images]), "executorch", tmp_path / "net.pte", batches=[images])
    assert artifact.contents.float_ops == ()
    assert artifact.contents.ops["Convert"] == 2
    assert artifact.agreement is not None
    assert artifact.agreement.max_steps is not None
    assert artifact.agreement.max_steps <= 1.01


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("activation", "outside"),
    [
        (lambda x: x.clamp(-0.5, 0.7), ()),
        (lambda x: x.clamp(min=-0.5), ()),
        (lambda x: x.clamp(max=0.5), ()),
        (nn.Softplus(), ()),
        (nn.Mish(), ()),
        (nn.Softplus(beta=2.0), None),
    ],
    ids=["clamp", "minimum", "maximum", "softplus", "mish", "another beta"],
)
def test_activations_that_executorch_cannot_lower_or_run_in_int8(
    tmp_path: Path, activation: Any, outside: tuple[str, ...] | None, precision: Precision
) -> None:
    torch.manual_seed(0)
    model, images = Between(activation).eval(), 4 * torch.randn(8, 3, 9, 9)
    if outside is None and precision == "int8":
        with pytest.raises(ExportError, match="ExecuTorch"):
            export(quantize(model, [images]), "executorch", tmp_path / "net.pte", batches=[images])
        assert list(tmp_path.iterdir()) == []
        return
    made = quantize(model, [images]) if precision == "int8" else deployable(model, images)
    artifact, _ = exported(made, "executorch", tmp_path / "net.pte", batches=[images])
    assert outside is None or artifact.contents.undelegated_ops == outside
    agreement = checks.agreement_of(deployable(made), artifact, [images])
    assert agreement.max_relative < 1e-5 if precision == "fp32" else (agreement.max_steps or 0.0) <= 1.01


@final
class Between(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.before, self.function, self.after = nn.Conv2d(3, 8, 3), function, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        """Run them."""
        return self.after(self.function(self.before(x)))


def test_integers_and_truth_values_are_taken(folder: Path) -> None:
    artifact, _ = written(folder, "tokens", "fp32")
    assert [spec.dtype for spec in artifact.runner.inputs] == [torch.int64, torch.bool]
    ids, mask = batches("tokens")[0].args
    assert torch.equal(artifact(ids.int(), mask)[0], artifact(ids, mask)[0])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_channels_last_memory_is_not_mistaken_for_another_image(tmp_path: Path, precision: Precision) -> None:
    images = batches("residual")[0].args[0].to(memory_format=torch.channels_last)
    model = copy.deepcopy(module("residual")).to(memory_format=torch.channels_last)
    made = deployable(quantize(model, [images])) if precision == "int8" else deployable(model, images)
    artifact = export(made, "executorch", tmp_path / "net.pte", batches=[images, images.contiguous()])
    assert torch.equal(artifact(images)[0], artifact(images.contiguous())[0])


def test_threads_are_those_asked_for_whoever_ran_before(folder: Path) -> None:
    path = written(folder, "residual", "int8")[0].path
    one, two = load(path), load(path, threads=2)
    images = batches("residual")[0].args[0]
    first = one(images)[0]
    assert one.runner.runtime.endswith("XNNPACK, 1 thread")
    assert two.runner.runtime.endswith("XNNPACK, 2 threads")
    from executorch.extension.pybindings import portable_lib

    for artifact, threads in ((two, 2), (one, 1), (two, 2)):
        assert torch.equal(artifact(images)[0], first)
        assert portable_lib._threadpool_get_thread_count() == threads


def test_a_cut_or_foreign_file_is_refused(folder: Path, tmp_path: Path) -> None:
    data = written(folder, "residual", "int8")[0].path.read_bytes()
    path = tmp_path / "cut.pte"
    for cut in (0, 20, len(data) // 2, len(data) - 8):
        path.write_bytes(data[:cut])
        with pytest.raises(RunnerError, match=r"cut\.pte is no \.pte file: .*Export it again"):
            load(path)
    path.write_bytes(b"something else altogether" * 100)
    with pytest.raises(RunnerError, match="does not start as an ExecuTorch program does"):
        load(path)


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.linalg.svdvals(x)
        return values


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


def test_an_operation_it_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^executorch: .*_linalg_svd.* not in Core ATen.*Replace that operation"):
        export(Unsupported(), "executorch", tmp_path / "net.pte", inputs=torch.randn(1, 3, 4))
    with pytest.raises(ExportError, match=r"^executorch: .*data-dependent.*write it without if and \.item"):
        export(Branches(), "executorch", tmp_path / "net.pte", inputs=torch.randn(1, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_xnnpack_takes_nothing_of_is_an_error(tmp_path: Path) -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(dim=1).values

    with pytest.raises(ExportError, match=r"none of the file's operations .*aten::sort"):
        export(Sorted(), "executorch", tmp_path / "net.pte", inputs=torch.randn(1, 3))
    assert list(tmp_path.iterdir()) == []


def test_layers_named_by_numbers_are_taken(folder: Path) -> None:
    # ExecuTorch cannot fold the BatchNorm of a parameter named "0.weight", as those of a bare nn.Sequential are.
    assert any(name.startswith("0.") for name, _ in module("digits").named_parameters())
    assert written(folder, "digits", "fp32")[0].contents.ops["Conv2d"] > 0


def test_names_of_constants_are_short_and_the_lowering_is_left_as_it_was(folder: Path) -> None:
    from executorch.backends.xnnpack.operators import node_visitor

    program = pte._program(written(folder, "difference", "int8")[0].path.read_bytes())
    (payload,) = [bytes(data.data) for data in program.backend_delegate_data]
    keys = [entry["named_key"].removeprefix("scale_") for entry in pte._graph(payload)["constant_data"]]
    assert {len(key) for key in keys if key} == {16}
    assert len({*keys}) > 4
    assert node_visitor.hashlib is hashlib
