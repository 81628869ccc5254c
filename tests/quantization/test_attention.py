"""Attention written out at capture: the same function, trained with its dropout, int8 in every file."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_edge import exporters
from lightning_edge.exporters import Artifact, ExportWarning, export
from lightning_edge.measure import Tolerance
from lightning_edge.network import Deployable, Inputs
from lightning_edge.quantization import attach, calibrate, convert, quantize, quantized_forward
from lightning_edge.quantization.capture.graph import capture
from lightning_edge.quantization.feature_taps import add_taps

HEADS = 2
# XNNPACK has products of two activations and softmax in fp32 only (executorch 1.4), ONNX Runtime has no int8 GELU, and
# LayerNorm is float or between int8 values everywhere: what is float is so on purpose.
INT8_PRODUCTS = {"coreml": True, "executorch": False, "onnx": True, "tflite": False}

SEEN = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) > 0.4
SEEN.fill_diagonal_(True)
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "truth values": {"attn_mask": SEEN},
    "minus infinity": {"attn_mask": torch.zeros(7, 7).masked_fill(~SEEN, -torch.inf)},
    "numbers": {"attn_mask": torch.randn(HEADS, 7, 7)},
}


class Encoder(nn.Module):
    """A transformer's encoder layer of three projections."""

    def __init__(self, **attention: Any) -> None:
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 16)
        self.feed = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (HEADS, -1)).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        normal = self.norm(tokens)
        query, key, value = (self._heads(layer(normal)) for layer in (self.query, self.key, self.value))
        attended = scaled_dot_product_attention(query, key, value, **self.attention)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        logits: Tensor = self.head((tokens + self.feed(tokens)).mean(1))
        return logits


class Joined(nn.Module):
    """Attention of one projection for query, key and value."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.heads, self.out = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.heads(tokens).unflatten(2, (3, HEADS, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        attended = scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        logits: Tensor = self.out(attended.transpose(1, 2).flatten(2)).mean(1)
        return logits


def tokens(batch: int) -> Tensor:
    return torch.randn(batch, 7, 16)


def operations(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in graph.graph.nodes if node.op == "call_function"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("build", "products"),
    # With a number, where no weights of the query's own take the division.
    [(Encoder, 0), (lambda: Encoder(scale=0.7), 0), (Joined, 1)],
    ids=["projections", "scale", "joined"],
)
def test_the_captured_graph_is_the_network(build: Callable[[], nn.Module], products: int) -> None:
    network = build().eval()
    graph = capture(network, Inputs.of(tokens(4))).graph
    found = operations(graph)
    assert "scaled_dot_product_attention.default" not in found
    assert (found.count("matmul.default"), found.count("softmax.int")) == (2, 1)
    multiplied = [node.meta["val"] for node in graph.graph.nodes if str(node.target) == "aten.mul.Tensor"]
    assert len([value for value in multiplied if value.dim() > 2]) == products
    for batch in (1, 5):
        x = tokens(batch)
        torch.testing.assert_close(graph(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_that_is_the_same_for_every_input_is_added(mask: str) -> None:
    network = Encoder(**MASKS[mask]).eval()
    graph = capture(network, Inputs.of(tokens(4))).graph
    assert "scaled_dot_product_attention.default" not in operations(graph)
    x = tokens(3)
    torch.testing.assert_close(graph(x), network(x), rtol=1e-4, atol=1e-5)


class Given(Encoder):
    """Attention under a mask computed anew for every input."""

    def __init__(self, mask: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask
        self.bias = nn.Parameter(torch.randn(7, 7))

    def forward(self, tokens: Tensor) -> Tensor:
        normal = self.norm(tokens)
        query, key, value = (self._heads(layer(normal)) for layer in (self.query, self.key, self.value))
        attended = scaled_dot_product_attention(query, key, value, attn_mask=self.mask(self, tokens))
        logits: Tensor = self.head(self.out(attended.transpose(1, 2).flatten(2)).mean(1))
        return logits


@pytest.mark.parametrize(
    "build",
    [
        lambda: Given(lambda _, tokens: (tokens.abs().sum(2) > 0)[:, None, None, :]),
        lambda: Given(lambda *_: torch.arange(7)[:, None] > torch.arange(7)),
    ],
    ids=["of the input", "nothing of the first row"],
)
def test_another_mask_leaves_attention_whole(build: Callable[[], nn.Module]) -> None:
    network = build().eval()
    graph = capture(network, Inputs.of(tokens(4))).graph
    assert operations(graph).count("scaled_dot_product_attention.default") == 1
    x = tokens(3)
    torch.testing.assert_close(graph(x), network(x), rtol=1e-4, atol=1e-5)


# One part of a window is not to see the other: what Swin adds for that, beside a bias that is learnt.
APART = torch.zeros(7, 7).masked_fill((torch.arange(7) < 3)[:, None] != (torch.arange(7) < 3), -100.0)


def biased(network: Any, tokens: Tensor) -> Tensor:
    mask: Tensor = network.bias + APART
    return mask


class SpelledOut(Given):
    """The same in products and a softmax of the user's own, the mask being a buffer, as in timm."""

    def __init__(self) -> None:
        super().__init__(biased)
        self.register_buffer("apart", APART)

    def forward(self, tokens: Tensor) -> Tensor:
        normal = self.norm(tokens)
        query, key, value = (self._heads(layer(normal)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + self.bias
        attended = (scores + self.apart).softmax(-1) @ value
        logits: Tensor = self.head(self.out(attended.transpose(1, 2).flatten(2)).mean(1))
        return logits


@pytest.mark.parametrize("build", [lambda: Given(biased), SpelledOut], ids=["in one piece", "spelled out"])
def test_biases_that_are_learnt_keep_their_precision_beside_a_mask(build: Callable[[], nn.Module]) -> None:
    """In one int8 range with -100 they would be rounded to multiples of 0.4."""
    network, x = build().eval(), tokens(64)
    assert "scaled_dot_product_attention.default" not in operations(capture(network, Inputs.of(x)).graph)
    quantized = quantize(network, [x])
    expected, found = network(x), quantized(x)
    assert float((expected - found).abs().max()) < 0.05 * float(expected.abs().max())
    steps = [
        float(module.scale)
        for module in quantized.modules()
        if getattr(module, "scale", None) is not None and getattr(module, "scale", torch.zeros(2)).numel() == 1
    ]
    assert max(steps) < 0.1
    quantized.train()(x).square().sum().backward()
    assert float(quantized.bias.grad.abs().sum()) > 0  # type: ignore[union-attr, operator]


def test_what_a_mask_is_computed_by_stays_float() -> None:
    """Its range would be as good as infinite."""
    network = Given(lambda _, tokens: (1.0 - (tokens[..., 0] > -1).float())[:, None, None, :] * -1e9).eval()
    x = tokens(64)
    x[..., 0] = x[..., 0].sign() * 2  # none so near to -1 that its rounding decides
    expected, found = network(x), quantize(network, [x])(x)
    assert float((expected - found).detach().abs().max()) < 0.05 * float(expected.detach().abs().max())


def test_a_choice_between_a_bias_and_minus_infinity_stays_float() -> None:
    """As T5 writes it, laid out anew in front of the attention."""

    def chosen(network: Any, tokens: Tensor) -> Tensor:
        keep = (tokens[..., 0] > -1)[:, None, None, :].expand(-1, -1, 7, 7)
        bias = network.bias.t().unsqueeze(0).unsqueeze(0)
        return torch.where(keep, bias, torch.finfo(torch.float32).min).contiguous()

    network, x = Given(chosen).eval(), tokens(64)
    x[..., 0] = x[..., 0].sign() * 2
    expected, found = network(x), quantize(network, [x])(x)
    assert float((expected - found).detach().abs().max()) < 0.05 * float(expected.detach().abs().max())


def test_gradients_are_those_of_the_network() -> None:
    network = Encoder().eval()
    x, direction = tokens(8), torch.randn(8, 5)
    expected = torch.autograd.grad((network(x) * direction).sum(), list(network.parameters()))
    graph = capture(network, Inputs.of(x)).graph
    given = torch.autograd.grad((graph(x) * direction).sum(), list(network.parameters()))
    for (name, _), ours, theirs in zip(network.named_parameters(), given, expected, strict=True):
        # The key's bias moves all scores of a query alike, which softmax does not see: both are rounding.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_a_layers_output_is_what_the_user_knows() -> None:
    """The query's weights are divided on their way into the layer; who reads its output does not see that."""
    network = Encoder().eval()
    x = tokens(16)
    expected = network.query(network.norm(x))
    child = attach(network, Inputs.of(x))
    tapped: dict[str, Any] = {}
    add_taps(child, ["query"], tapped.__setitem__)
    calibrate(network, Inputs.of(x))
    network(x)
    assert float((tapped["query"] - expected).abs().max()) < 0.03 * float(expected.abs().max())


def test_attentions_dropout_goes_on_in_training() -> None:
    """Only the user's training_step says how much is dropped: in evaluation it is an argument of 0."""
    network = Joined(dropout=0.5).train()
    x = tokens(8)
    attach(network, Inputs.of(x))
    calibrate(network, Inputs.of(x))
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))
    # On average over what is dropped, the values are those of the network.
    network.train()
    quantized_forward(network)[1].freeze_observers()
    with torch.no_grad():
        mean = torch.stack([network(x) for _ in range(300)]).mean(0)
        whole = network.eval()(x)
    assert float((mean - whole).abs().mean()) < 0.1 * float(whole.abs().mean())
    assert "dropout.default" not in operations(convert(network).graph)


@cache
def converted(mask: str = "") -> Deployable:
    network = Encoder(**MASKS.get(mask, {})).train()
    x = Inputs.of(tokens(32))
    attach(network, x)
    calibrate(network, x)
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        network(tokens(32)).square().mean().backward()
        optimizer.step()
    return convert(network.eval())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attention")


@cache
def written(target: str, folder: Path, mask: str = "", integer_only: bool = False) -> Artifact:
    path = folder / f"encoder {mask} {integer_only}{exporters.target(target).suffix}"
    options: dict[str, Any] = {"integer_only": True} if integer_only else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExportWarning)
        tolerance = Tolerance(max_steps=2, mean_steps=0.2)
        return export(converted(mask), target, path, batches=[tokens(16)], tolerance=tolerance, **options)


@pytest.mark.parametrize(
    ("target", "mask"),
    [("onnx", "causal"), ("tflite", "")]
    + [pytest.param(name, "causal", marks=pytest.mark.slow) for name in ("coreml", "executorch", "tflite")]
    + [pytest.param(name, "", marks=pytest.mark.slow) for name in ("coreml", "executorch", "onnx")],
)
def test_products_are_int8_or_between_int8_values(target: str, mask: str, folder: Path) -> None:
    artifact = written(target, folder, mask)
    assert artifact.agreement is not None
    assert artifact.agreement.max_steps is not None
    assert artifact.agreement.max_steps <= 1.01
    floats = artifact.contents.float_compute_ops
    assert len(floats) == (0 if INT8_PRODUCTS[target] else 2)
    assert "aten::expand_copy" not in (artifact.contents.undelegated_ops or ())


@pytest.mark.parametrize(
    "target", ["onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("coreml", "executorch", "tflite"))]
)
def test_attention_to_one_token(target: str, tmp_path: Path) -> None:
    """Softmax of one value is 1: ONNX Runtime's int8 kernel gives 0."""
    network = Encoder().eval()
    batches = [torch.randn(16, 1, 16) for _ in range(3)]
    path = tmp_path / f"encoder{exporters.target(target).suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExportWarning)
        artifact = export(quantize(network, batches), target, path, batches=batches[:1])
    assert artifact.agreement is not None
    assert artifact.agreement.max_steps is not None
    assert artifact.agreement.max_steps <= 1.01


def kinds(artifact: Artifact) -> dict[str, set[str]]:
    """The types that each kind of operation in a `.tflite` reads."""
    from lightning_edge.exporters.tflite import graph as tflite_graph

    model = tflite_graph.parse(artifact.path.read_bytes())
    graph, found = model.subgraphs[0], {}
    for op in graph.operators:
        types = {tflite_graph.dtype_name(graph.tensors[int(op.inputs[0])].type)}
        found.setdefault(tflite_graph.op_name(model, op), set()).update(types)
    return found


def test_a_tflite_stays_with_its_delegate(folder: Path) -> None:
    artifact = written("tflite", folder, "")
    assert {kinds(artifact)[name] == {"float32"} for name in ("BATCH_MATMUL", "SOFTMAX", "GELU")} == {True}
    assert kinds(artifact)["FULLY_CONNECTED"] == {"int8"}
    placements = artifact.contents.placements
    assert placements is not None
    assert placements.told_by == "the runtime"
    assert {entry.place for entry in placements.ops if entry.op != "MEAN"} == {"delegate"}


def test_a_tflite_of_integers_only(folder: Path) -> None:
    artifact = written("tflite", folder, integer_only=True)
    for name in ("BATCH_MATMUL", "SOFTMAX", "GELU", "FULLY_CONNECTED"):
        assert kinds(artifact)[name] == {"int8"}
    assert artifact.contents.float_compute_ops == ()


def test_integers_only_is_for_int8_networks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="integer_only=True needs an int8 network and this one is fp32"):
        export(Joined(), "tflite", tmp_path / "net.tflite", inputs=tokens(1), integer_only=True)
    with pytest.raises(ValueError, match=r"tflite: integer_only='yes' is not one of \(True, False\)"):
        export(converted(), "tflite", tmp_path / "net.tflite", integer_only="yes")
    assert list(tmp_path.iterdir()) == []


def test_what_is_trained_is_what_ships() -> None:
    network = copy.deepcopy(Encoder()).eval()
    quantized = quantize(network, [tokens(16) for _ in range(3)])
    graph = convert(quantized)
    (scale,) = graph.output_scales
    assert scale is not None
    x = tokens(16)
    assert float((quantized(x) - graph(x)).detach().abs().max()) <= 1.01 * scale
    assert float((graph(x) - network(x)).abs().mean()) < 0.1 * float(network(x).abs().mean())
