"""ExecuTorch files: what is written in other operations, so that XNNPACK takes it, and in int8 where it has that.

Every form is tested on the program that is lowered, and all of them in one int8 file. A file for each is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, final

import pytest
import torch
from deployables import Branches, beyond, exported
from torch import Tensor, fx, nn
from torch.nn import functional

from lightning_edge.exporters import Artifact, ExportWarning, deployable, executorch, export
from lightning_edge.exporters.executorch.backends import prepared, program_of
from lightning_edge.exporters.passes.graph import operation
from lightning_edge.exporters.verify.agreement import agreement_of
from lightning_edge.network import Deployable, Precision, flatten_outputs
from lightning_edge.quantization import quantize

pytest.importorskip("executorch")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def made_of(model: nn.Module, inputs: Tensor, precision: Precision) -> Deployable:
    return deployable(quantize(model.eval(), [inputs]) if precision == "int8" else deployable(model.eval(), inputs))


def written(model: nn.Module, inputs: Tensor, precision: Precision, folder: Path) -> Artifact:
    """A file, held against the network more closely than `export` does."""
    made = made_of(model, inputs, precision)
    artifact, _ = exported(made, "executorch", folder / "net.pte", batches=[inputs])
    names = model.names if isinstance(model, Branches) else made.output_names()
    near: dict[str, float] = {"relative": 1e-5} if precision == "fp32" else {"steps": 1.01}
    assert beyond(names, artifact.agreement, **near) == {}
    assert artifact.contents.undelegated_ops == ()
    return artifact


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


class Masked(Attention):
    """Attention under a mask that is computed from positions, and a bias that is looked up in a table of weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.table = kind, nn.Parameter(torch.randn(11))

    def forward(self, tokens: Tensor) -> Tensor:
        """Run it."""
        places = torch.arange(tokens.shape[1])
        distance = places[:, None] - places[None]
        mask = {
            "none masked": (distance >= -places.numel()).expand(tokens.shape[0], 1, -1, -1),
            "near ones": distance.abs() <= 2,
            "biases": self.table[distance + 5],
            "a row of none": (distance.abs() <= 2) & (places[:, None] > 0),
        }[self.kind]
        self.attention = {"attn_mask": mask}
        return super().forward(tokens)


@pytest.mark.slow
def test_attention_and_the_mean_of_tokens_are_delegated_in_int8(tmp_path: Path) -> None:
    artifact = written(Attention(), torch.randn(16, 6, 8), "int8", tmp_path)
    assert artifact.contents.ops["GlobalAvgPooling2d"] == 1


@pytest.mark.slow
def test_attention_under_masks_that_are_always_the_same_is_delegated(tmp_path: Path) -> None:
    forms = {"plain": Attention(), "causal": Attention(is_causal=True, scale=0.3)}
    masks = {kind: Masked(kind) for kind in ("none masked", "near ones", "biases")}
    artifact = written(Branches({**forms, **masks}), torch.randn(16, 6, 8), "fp32", tmp_path)
    assert artifact.contents.ops["GlobalAvgPooling2d"] == artifact.contents.ops["Softmax"] == 5


@pytest.mark.slow
def test_attention_to_nothing_stays_what_it_is(tmp_path: Path) -> None:
    """torch gives zeros for a row of which everything is masked, where a softmax would give no number."""
    tokens = torch.randn(4, 6, 8)
    with pytest.warns(ExportWarning, match="outside the delegate"):
        artifact = export(Masked("a row of none"), "executorch", tmp_path / "net.pte", inputs=tokens)
    assert artifact.agreement.max_relative < 1e-5


def test_random_numbers_are_drawn_at_every_call() -> None:
    from lightning_edge.exporters.executorch.passes.fold_constants import fold_constants

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(3) * torch.arange(3).add(1)

    program = fold_constants(torch.export.export(Noisy(), (torch.randn(2, 3),), strict=False))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == [
        "aten.rand.default",
        "aten.mul.Tensor",
        "aten.add.Tensor",
    ]
    network = program.module()
    assert not torch.equal(network(torch.zeros(2, 3)), network(torch.zeros(2, 3)))


class Rolled(nn.Module):
    """Images rolled between two layers, by one dimension or two."""

    def __init__(self, shifts: tuple[int, ...], dims: tuple[int, ...]) -> None:
        super().__init__()
        self.shifts, self.dims = shifts, dims
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Run it."""
        logits: Tensor = self.last(torch.relu(self.first(images)).roll(self.shifts, self.dims))
        return logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shifts", "dims", "precision"),
    [((-2, 1), (2, 3), "int8"), ((4,), (2,), "fp32"), ((1,), (-1,), "int8")],
)
def test_rolled_images_are_joined_parts(
    tmp_path: Path, shifts: tuple[int, ...], dims: tuple[int, ...], precision: Precision
) -> None:
    artifact = written(Rolled(shifts, dims), torch.randn(8, 3, 8, 8), precision, tmp_path)
    assert any(name.startswith("Concatenate") for name in artifact.contents.ops)


class ChannelsLast(nn.Module):
    """Norms, a linear layer and a mean over an image whose channels are last, as ConvNeXt has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.inner, self.head = (
            nn.Conv2d(3, 6, 3),
            nn.LayerNorm(6),
            nn.Linear(6, 6),
            nn.Linear(6, 4),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Run it."""
        x = self.stem(images).permute(0, 2, 3, 1)
        logits: Tensor = self.head((x + self.inner(self.norm(x))).mean((1, 2)))
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_norms_and_means_of_channels_last_are_delegated(tmp_path: Path, precision: Precision) -> None:
    artifact = written(ChannelsLast(), torch.randn(8, 3, 8, 8), precision, tmp_path)
    assert artifact.contents.ops["GlobalAvgPooling2d"] == 3  # mean and variance of the norm, and the mean


class Cubed(nn.Module):
    """GELU as it is written with a third power."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        hidden = self.first(x)
        logits: Tensor = self.last(torch.tanh(hidden + 0.044715 * torch.pow(hidden, 3.0)) * hidden)
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_third_powers_are_delegated(tmp_path: Path, precision: Precision) -> None:
    written(Cubed(), torch.randn(16, 6), precision, tmp_path)


@pytest.mark.slow
def test_attention_keeps_its_type(tmp_path: Path) -> None:
    tokens, path = torch.randn(4, 6, 8), tmp_path / "net.pte"
    artifact = export(Attention(is_causal=True), "executorch", path, inputs=tokens, scheme="fp16")
    assert artifact.contents.inputs[0].dtype == artifact.contents.outputs[0].dtype == "float16"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 6, 8), (4, 8)], ids=str)
def test_layer_norm_is_delegated(tmp_path: Path, shape: tuple[int, ...]) -> None:
    artifact = written(norms(), 3 * torch.randn(shape) + 20, "fp32", tmp_path)
    assert artifact.contents.ops["ReciprocalSquareRoot"] == 3


def norms() -> nn.Module:
    """Layer norms of several settings, a linear layer behind each."""
    norms = [nn.LayerNorm(8), nn.LayerNorm(8, eps=0.1, bias=False), nn.LayerNorm(8, elementwise_affine=False)]
    for parameter in nn.ModuleList(norms).parameters():
        nn.init.normal_(parameter)
    layers = [layer for norm in norms for layer in (norm, nn.Linear(8, 8))]
    return nn.Sequential(*layers)


@final
class Chain(nn.Module):
    """Functions behind a convolution each."""

    def __init__(self, *functions: Any) -> None:
        super().__init__()
        self.functions = functions
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in functions)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Any:
        """Run them."""
        for layer, function in zip(self.layers, self.functions, strict=True):
            x = function(layer(x))
        return self.head(x)


TABLES = [
    *(nn.ConstantPad2d((0, 1, 0, 1), value) for value in (0.0, 0.5)),
    torch.sigmoid,
    torch.tanh,
    functional.gelu,
]
LARGER = [nn.Upsample(scale_factor=(3.0, 2.0)), nn.Upsample(size=(18, 32))]
MOVES: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.unsqueeze(2).select(2, -1),
    lambda x: x * x.mean((2, 3)).unsqueeze(2).split([1, 2], 1)[0].unsqueeze(3),
    lambda x: torch.cat(x.unsqueeze(1).unbind(2)[::-1], 1),
]
CLAMPS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.clamp(-0.5, 0.7),
    lambda x: x.clamp(min=-0.5),
    lambda x: x.clamp(max=0.5),
]
SOFTPLUS: list[Callable[[Tensor], Tensor]] = [
    functional.softplus,
    lambda x: functional.softplus(x, beta=2.0),
    functional.mish,
]


@pytest.mark.slow
def test_padding_and_activations_that_are_tables_are_int8(tmp_path: Path) -> None:
    """ExecuTorch's own lowering dequantizes, computes in float and quantizes again."""
    artifact = written(Chain(*TABLES), torch.randn(8, 3, 9, 9), "int8", tmp_path)
    assert artifact.contents.float_ops == ()
    assert artifact.contents.ops["StaticConstantPad"] == 2
    assert artifact.contents.ops["Convert"] == 2  # of the input and the output


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rows_and_columns_are_repeated_inside_the_delegate(tmp_path: Path, precision: Precision) -> None:
    artifact = written(Chain(*LARGER), torch.randn(8, 3, 6, 8), precision, tmp_path)
    assert artifact.contents.ops["Concatenate3"] == 1
    assert artifact.contents.ops.get("Convert", 0) == (2 if precision == "int8" else 0)


@pytest.mark.slow
def test_rows_that_are_repeated_unevenly_are_not_written_anew(tmp_path: Path) -> None:
    made = made_of(Chain(nn.Upsample(size=(9, 8))), torch.randn(8, 3, 6, 8), "fp32")
    artifact, _ = exported(made, "executorch", tmp_path / "net.pte")
    assert artifact.contents.undelegated_ops == ("aten::upsample_nearest2d",)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_form_may_be_made_of_another(tmp_path: Path, precision: Precision) -> None:
    """A rewritten operation has a shape for the next one that is rewritten."""
    written(Chain(*MOVES), torch.randn(8, 3, 6, 6), precision, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_executorch_cannot_lower_or_run_in_int8(tmp_path: Path, precision: Precision) -> None:
    written(Chain(*CLAMPS, *SOFTPLUS), 4 * torch.randn(8, 3, 9, 9), precision, tmp_path)


class RowsOfAnImage(nn.Module):
    """Softmax over the rows of what a layer gives: XNNPACK has the channels last there."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.before, self.after = before, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run both, softmax in between."""
        return self.after(self.before(x).softmax(dim=-1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("enlarged", "precision"),
    [
        (False, "fp32"),
        (True, "int8"),
        (True, "fp32"),
        (False, "int8"),
    ],
)
def test_softmax_over_the_rows_of_an_image_is_one_over_its_rows(
    tmp_path: Path, enlarged: bool, precision: Precision
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 1)
    rows = RowsOfAnImage(nn.Sequential(layer, nn.Upsample(scale_factor=2)) if enlarged else layer).eval()
    images = torch.randn(4, 3, 6, 5)
    model = quantize(rows, [images]) if precision == "int8" else deployable(rows, images)
    with pytest.warns(ExportWarning, match="Softmax") if precision == "int8" else nullcontext():
        artifact = export(model, "executorch", tmp_path / "rows.pte", batches=[images])
    assert artifact.contents.ops["Softmax"] == 1
    assert artifact.contents.undelegated_ops == ()
    assert artifact.agreement is not None
    steps = artifact.agreement.max_steps
    assert artifact.agreement.max_relative < 1e-4 if steps is None else steps < 1.5


class RootMeanSquare(nn.Module):
    """RMSNorm written out, as language models have it, and means of features that are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run it."""
        hidden = self.first(tokens)
        normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.last(normed), hidden.mean(-1)


class Ranks(nn.Module):
    """Means of features of two, three and four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.sequences, self.images = RootMeanSquare(), RootMeanSquare(), RootMeanSquare()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run all."""
        return (*self.rows(images[:, 0, 0]), *self.sequences(images[:, 0]), *self.images(images))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_means_of_features_are_delegated(tmp_path: Path, precision: Precision) -> None:
    artifact = written(Ranks(), torch.randn(4, 2, 5, 6), precision, tmp_path)
    assert artifact.contents.ops["GlobalAvgPooling2d"] == 6


class Largest(nn.Module):
    """The largest and the smallest of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Run it."""
        hidden = self.first(tokens)
        logits: Tensor = self.last(hidden.amax(1) - hidden.amin((1,)))
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_largest_along_a_dimension_that_is_dropped(tmp_path: Path, precision: Precision) -> None:
    tokens = torch.randn(4, 5, 6)
    made = made_of(Largest(), tokens, precision)
    artifact, _ = exported(made, "executorch", tmp_path / "net.pte", batches=[tokens])
    agreement = agreement_of(made, artifact, [tokens])
    assert agreement.max_relative < (1e-5 if precision == "fp32" else 0.02)


# A form, what it is fed, and the operations of it that XNNPACK does not have.
FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "attention": (Attention, (4, 6, 8), {"scaled_dot_product_attention", "unsqueeze", "chunk", "squeeze"}),
    "causal attention": (
        partial(Attention, is_causal=True, scale=0.3),
        (4, 6, 8),
        {"scaled_dot_product_attention", "chunk"},
    ),
    **{
        f"attention, {kind}": (partial(Masked, kind), (4, 6, 8), {"scaled_dot_product_attention", "chunk"})
        for kind in ("none masked", "near ones", "biases")
    },
    "rolled by two": (partial(Rolled, (-2, 1), (2, 3)), (2, 3, 8, 8), {"roll"}),
    "rolled by one": (partial(Rolled, (4,), (2,)), (2, 3, 8, 8), {"roll"}),
    "rolled by the last": (partial(Rolled, (1,), (-1,)), (2, 3, 8, 8), {"roll"}),
    "channels last": (ChannelsLast, (2, 3, 8, 8), {"layer_norm"}),
    "third powers": (Cubed, (4, 6), {"pow"}),
    "norms of tokens": (norms, (4, 6, 8), {"layer_norm"}),
    "norms of rows": (norms, (4, 8), {"layer_norm"}),
    "repeated rows": (partial(Chain, *LARGER), (2, 3, 6, 8), {"upsample_nearest2d"}),
    "repeated rows alone": (partial(Chain, nn.Upsample(scale_factor=(3.0, 1.0))), (2, 3, 6, 8), {"upsample_nearest2d"}),
    "moves": (partial(Chain, *MOVES), (2, 3, 6, 6), {"unsqueeze", "select", "split_with_sizes", "unbind"}),
    "clamps": (partial(Chain, *CLAMPS), (2, 3, 9, 9), {"clamp"}),
    "softplus": (partial(Chain, *SOFTPLUS[:2]), (2, 3, 9, 9), {"softplus"}),
    "rows of an image": (partial(RowsOfAnImage, nn.Conv2d(3, 8, 1)), (2, 3, 6, 5), set()),
    "means of features": (Ranks, (4, 2, 5, 6), {"select"}),
    "extremes": (Largest, (4, 5, 6), set()),
}


def calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_lowered_is_what_xnnpack_has(form: str) -> None:
    build, shape, lacking = FORMS[form]
    inputs = torch.randn(shape)
    made = made_of(build(), inputs, "fp32")
    assert lacking <= {operation(node) for node in calls(made.program().graph)}
    lowered = program_of(prepared(made, "xnnpack"), "xnnpack")
    assert not lacking & {operation(node) for node in calls(lowered.graph)}
    for node in calls(lowered.graph):
        if operation(node) in ("mean", "amax", "amin"):  # they keep their dimensions, and means are of images
            assert node.args[2] is True
            assert operation(node) != "mean" or sorted(dim % 4 for dim in node.args[1]) == [2, 3]  # type: ignore[operator, union-attr]
        elif operation(node) == "softmax":  # in NHWC the axis of four dimensions is taken for another
            assert node.meta["val"].dim() < 4 or "attention" in form
    sample = made.inputs.tensors[0]
    for given, expected in zip(flatten_outputs(lowered.module()(sample)), flatten_outputs(made(sample)), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "shape", "stays"),
    [
        # torch gives zeros for a row of which everything is masked, where a softmax would give no number.
        (partial(Masked, "a row of none"), (4, 6, 8), "scaled_dot_product_attention"),
        (partial(Chain, nn.Upsample(size=(9, 8))), (2, 3, 6, 8), "upsample_nearest2d"),
    ],
    ids=["attention to nothing", "rows repeated unevenly"],
)
def test_what_has_no_such_form_stays(build: Callable[[], nn.Module], shape: tuple[int, ...], stays: str) -> None:
    made = made_of(build(), torch.randn(shape), "fp32")
    lowered = program_of(prepared(made, "xnnpack"), "xnnpack")
    assert stays in {operation(node) for node in calls(lowered.graph)}
    sample = made.inputs.tensors[0]
    torch.testing.assert_close(lowered.module()(sample), made(sample), rtol=1e-5, atol=1e-6)


def test_attention_in_half_precision_stays_so() -> None:
    made = made_of(Attention(is_causal=True), torch.randn(4, 6, 8), "fp32")
    lowered = program_of(executorch.TARGET.prepare(made, scheme="fp16"), "xnnpack")
    assert "scaled_dot_product_attention" not in {operation(node) for node in calls(lowered.graph)}
    floats = {node.meta["val"].dtype for node in calls(lowered.graph) if node.meta["val"].is_floating_point()}
    assert floats == {torch.float16}


def test_forms_side_by_side_are_delegated_in_int8(tmp_path: Path) -> None:
    forms = {
        "channels last": ChannelsLast(),
        "tables": Chain(*TABLES[1:4]),
        "moves": Chain(*MOVES[1:], LARGER[0]),
    }
    artifact = written(Branches(forms), torch.randn(4, 3, 4, 6), "int8", tmp_path)
    operations = artifact.contents.ops
    assert operations["GlobalAvgPooling2d"] == 4  # three of channels last, one among the moves
    assert operations["StaticConstantPad"] == 1
    assert operations["Concatenate3"] == 2  # three rows, and three channels
