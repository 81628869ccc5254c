"""Factorize without a Trainer: factors and the way back, which layers, what is refused, optimizers and resume."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.factorization import Factorize
from lightning_edge.factorization.decomposition import factors, merge, product, split
from lightning_edge.network import Inputs
from lightning_edge.quantization import convert, quantize
from lightning_edge.schedule import Change, Clock
from lightning_edge.succession import follow

NOW = Clock(epoch=3, progress=0.5)


class Given:
    """A `Batch` of given inputs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.given = Inputs(args, kwargs)

    def inputs(self) -> Inputs:
        return self.given

    def gradients(self, *, per_sample: bool = False) -> Iterator[dict[str, Any]]:
        raise AssertionError("factors need no gradients")


class Mixed(nn.Module):
    """Two 1x1 convolutions, one of them with stride and padding, a 3x3 and two linear layers of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.point = nn.Sequential(nn.Conv2d(32, 48, 1, stride=2, padding=1), nn.BatchNorm2d(48), nn.ReLU())
        self.mix = nn.Conv2d(48, 32, 1, bias=False)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Sequential(nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 32))
        for layer in (self.point[0], self.mix, self.head[0], self.head[2]):
            low_rank(layer, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.mix(self.point(torch.relu(self.stem(images))))
        logits: Tensor = self.head(self.drop(features.mean((2, 3))))
        return logits


def low_rank(layer: nn.Module, rank: int) -> None:
    """Give a layer a weight of exactly this rank."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    width_out, width_in = weight.shape[:2]
    with torch.no_grad():
        weight.copy_((torch.randn(width_out, rank) @ torch.randn(rank, width_in) / width_in).view_as(weight))


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def planned(phase: Factorize, network: nn.Module, *inputs: Tensor) -> Change:
    change = phase.plan(network, NOW, [], Given(*(inputs or (images(),))))
    assert change is not None
    return change


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 5, 1), (5, 7, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_at_full_rank_the_product_is_the_weight(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    first, second = factors(weight, min(shape[:2]))
    assert first.shape == (min(shape[:2]), *shape[1:])
    assert first.dtype == second.dtype == dtype
    merged = product(first, second)
    assert merged.shape == weight.shape
    torch.testing.assert_close(merged, weight, rtol=0, atol=8 * torch.finfo(dtype).eps * float(weight.abs().max()))


def test_at_a_lower_rank_the_error_is_what_the_dropped_singular_values_hold() -> None:
    weight = torch.randn(20, 12, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    error = (product(*factors(weight, 4)) - weight).square().sum()
    torch.testing.assert_close(error, values[4:].square().sum())


def test_signs_do_not_depend_on_the_decomposition() -> None:
    weight = torch.randn(8, 6)
    for given in (weight, -weight):  # of each column of the second factor, the largest entry is positive
        first, second = factors(given, 3)
        assert (second.gather(0, second.abs().argmax(0, keepdim=True)) > 0).all()
        torch.testing.assert_close(first @ given.mT @ second, (second.mT @ second).square(), rtol=1e-3, atol=1e-4)


def test_a_network_of_low_rank_computes_the_same_with_fewer_weights() -> None:
    network = Mixed().eval()
    data = images()
    before = network(data)
    change = planned(Factorize(energy=1.0), network)
    Factorize.perform(network, change)
    assert [entry["name"] for entry in change["layers"]] == ["point.0", "mix", "head.0", "head.2"]
    assert {entry["rank"] for entry in change["layers"]} == {8}  # 5, rounded to what runtimes reward
    torch.testing.assert_close(network(data), before, rtol=1e-4, atol=1e-5)
    for entry in change["layers"]:
        pair = network.get_submodule(entry["name"])
        assert sum(part.weight.numel() for part in pair) == entry["after"] < entry["before"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 1, stride=(2, 1), padding=(0, 3)),
        nn.Conv2d(6, 8, 1, padding=2, padding_mode="reflect"),
        nn.Conv2d(6, 8, 1, padding="same", bias=False),
        nn.Conv1d(6, 8, 1, stride=3, padding=1, dilation=2),
        nn.Linear(6, 8),
    ],
    ids=str,
)
def test_stride_padding_and_bias_are_kept(layer: nn.Module) -> None:
    network = nn.Sequential(layer)
    shapes: dict[type, tuple[int, ...]] = {nn.Conv2d: (2, 6, 9, 7), nn.Conv1d: (2, 6, 9), nn.Linear: (2, 3, 6)}
    data = torch.randn(shapes[type(layer)])
    before = network(data)
    split(network, "0", 6)
    assert isinstance(network[0], nn.Sequential)
    torch.testing.assert_close(network(data), before)
    merge(network, "0")
    assert type(network[0]) is type(layer)
    assert network[0].extra_repr() == layer.extra_repr().replace(", bias=False", "") or layer.bias is None
    torch.testing.assert_close(network(data), before)


def test_energy_keeps_at_least_its_share_and_no_rank_too_many() -> None:
    network = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        values = torch.linspace(8, 0.01, 64)
        left, _, right = torch.linalg.svd(torch.randn(64, 64))
        network[0].weight.copy_(left @ torch.diag(values) @ right)
    change = planned(Factorize(energy=0.7, round_to=1), network, torch.randn(2, 64))
    (entry,) = change["layers"]
    kept = values.square().cumsum(0) / values.square().sum()
    assert kept[entry["rank"] - 1] >= 0.7 > kept[entry["rank"] - 2]
    assert entry["energy"] == pytest.approx(float(kept[entry["rank"] - 1]), abs=1e-5)


@pytest.mark.parametrize(("size", "most"), [(0.5, 0.5 * 64 * 96), (2000, 2000)])
def test_size_is_an_upper_limit(size: float, most: float) -> None:
    network = nn.Sequential(nn.Linear(64, 96))
    change = planned(Factorize(size=size), network, torch.randn(2, 64))
    (entry,) = change["layers"]
    assert entry["rank"] % 8 == 0
    assert entry["after"] == entry["rank"] * (64 + 96) <= most < entry["after"] + 8 * (64 + 96)


def test_layers_are_chosen_by_name_and_the_others_are_untouched() -> None:
    network = Mixed()
    change = planned(Factorize(energy=1.0, include=["head.*", "mix"], ignore=["head.2"]), network)
    assert [entry["name"] for entry in change["layers"]] == ["mix", "head.0"]
    head = network.head[2]
    Factorize.perform(network, change)
    assert network.head[2] is head


def test_a_layer_that_would_not_become_smaller_is_left_alone_with_the_reason() -> None:
    network = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(4, 32))
    low_rank(network[0], 4)
    with torch.no_grad():
        network[3].weight.zero_()
    phase = Factorize(energy=0.99)
    change = planned(phase, network, torch.randn(2, 32))
    assert [entry["name"] for entry in change["layers"]] == ["0"]
    assert set(change["left_alone"]) == {"1", "2", "3"}
    assert "1,024" in change["left_alone"]["1"]
    assert change["left_alone"]["3"] == "its weight is zero"
    text = phase.describe(change)
    assert "0 to rank 8" in text
    assert "1,024 -> 512 weights" in text
    assert "left alone: 1: " in text


def test_nothing_that_becomes_smaller_is_an_error() -> None:
    network = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(CompressionError, match=r"energy=0\.99 and round_to=8: 0: at rank 16 .* round_to=1"):
        planned(Factorize(energy=0.99), network, torch.randn(2, 16))
    with pytest.raises(CompressionError, match=r"size=0\.4 allows no rank that is a multiple of 8"):
        planned(Factorize(size=0.4), network, torch.randn(2, 16))


def test_bias_frozen_weights_modes_hooks_and_random_state_are_kept() -> None:
    network = Mixed()
    network.head.eval()
    network.head[0].weight.requires_grad_(False)
    bias, seen = network.head[0].bias, []
    handle = network.head[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    data = images()
    state = torch.get_rng_state()
    change = planned(Factorize(energy=1.0), network, data)
    seen_in_trial, torch_state = list(seen), torch.get_rng_state()
    Factorize.perform(network, change)
    pair = network.head[0]
    assert not seen_in_trial
    assert torch.equal(torch_state, state)
    assert torch.equal(torch.get_rng_state(), state)
    assert pair[1].bias is bias
    assert [parameter.requires_grad for parameter in pair.parameters()] == [False, False, True]
    assert not any(module.training for module in pair.modules())
    assert network.mix[0].training
    assert list(dict(pair.named_parameters())) == ["0.weight", "1.weight", "1.bias"]
    network(images())
    assert seen == [(4, 40)]
    handle.remove()
    network(images())
    assert seen == [(4, 40)]


def test_an_accumulated_gradient_goes_on_to_the_factors() -> None:
    network = nn.Sequential(nn.Linear(6, 5))
    whole, data = copy.deepcopy(network), torch.randn(7, 6)
    whole(data).square().sum().backward()
    network[0].weight.grad = whole[0].weight.grad
    split(network, "0", 5)
    carried = [part.weight.grad.clone() for part in network[0]]
    network.zero_grad()
    network(data).square().sum().backward()
    for part, gradient in zip(network[0], carried, strict=True):
        torch.testing.assert_close(part.weight.grad, gradient, rtol=1e-4, atol=1e-4)


def test_plan_leaves_the_network_and_the_random_state_as_they_are() -> None:
    network = Mixed()
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    change = planned(Factorize(energy=0.8, round_to=1), network, data := images())
    torch.set_rng_state(state)
    expected = images()
    assert torch.equal(expected, data)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert change["output_error"] > 0


def test_the_plan_reports_by_how_much_the_outputs_change() -> None:
    network = Mixed().eval()
    data = images()
    before = network(data)
    change = planned(Factorize(energy=0.8, round_to=1), network, data)
    Factorize.perform(network, change)
    error = float((network(data) - before).detach().norm() / before.detach().norm())
    assert change["output_error"] == pytest.approx(error, rel=1e-4)


def test_it_happens_once_and_not_before_its_moment() -> None:
    network = Mixed()
    phase = Factorize(start=4, energy=1.0)
    assert phase.plan(network, NOW, [], Given(images())) is None
    change = phase.plan(network, Clock(4, None), [], Given(images()))
    assert change is not None
    assert phase.plan(network, Clock(5, None), [change], Given(images())) is None
    assert phase.first_moment() == phase.last_moment() == 4


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.output = nn.Linear(16, 50, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.output(self.embedding(tokens))
        return logits


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.again = self.first

    def forward(self, data: Tensor) -> Tensor:
        return self.again(self.first(data))  # type: ignore[no-any-return]


class Reads(nn.Module):
    """Uses one layer's weight without calling it, another from a list that is no part of the module tree."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.good, self.read = nn.Linear(32, 32), nn.Linear(32, 32)
        for layer in (self.good, self.read):
            low_rank(layer, 4)
        self.unregistered = [self.read]

    def forward(self, data: Tensor) -> Tensor:
        data = self.good(data)
        if self.kind == "weight":
            return nn.functional.linear(data, self.read.weight)
        if self.kind == "weight in training" and not self.training:
            return self.read(data)  # type: ignore[no-any-return]
        if self.kind == "weight in training":
            return nn.functional.linear(data, self.read.weight)
        return self.unregistered[0](data)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("network", "other"), [(Tied(), "embedding.weight"), (Shared(), "again.weight")])
def test_tied_weights_are_refused_with_the_reason(network: nn.Module, other: str) -> None:
    with pytest.raises(CompressionError, match=rf"\.weight is tied: it is also {other}.*ignore=\["):
        planned(Factorize(size=0.5, round_to=1), network, torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("kind", ["weight", "weight in training", "unregistered"])
def test_a_layer_that_is_not_just_called_is_refused_by_name(kind: str) -> None:
    network = Reads(kind)
    with pytest.raises(CompressionError, match=r"in place of read: .*ignore=\['read'\]"):
        planned(Factorize(energy=1.0), network, torch.randn(4, 32))
    assert planned(Factorize(energy=1.0, ignore=["read"]), network, torch.randn(4, 32))["layers"][0]["name"] == "good"


def test_attention_and_its_fast_path() -> None:
    network = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    # In evaluation torch reads linear1.weight and does not call the layer; out_proj it never calls.
    with pytest.raises(CompressionError, match=r"ignore=\['linear1', 'linear2'\]"):
        planned(Factorize(size=0.5), network, torch.randn(2, 5, 32))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.output = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 32)

        def forward(self, data: Tensor) -> Tensor:
            return self.output(self.attention(data, data, data)[0])  # type: ignore[no-any-return]

    change = planned(Factorize(size=0.5), Plain(), torch.randn(2, 5, 32))
    assert [entry["name"] for entry in change["layers"]] == ["output"]
    assert "MultiheadAttention" in change["left_alone"]["attention.out_proj"]


class Twice(nn.Linear):
    def forward(self, data: Tensor) -> Tensor:
        return 2 * super().forward(data)


def test_layers_of_another_kind_are_left_alone_with_the_reason() -> None:
    network = nn.Sequential(nn.Linear(32, 32), Twice(32, 32), nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)))
    change = planned(Factorize(size=0.5), network, torch.randn(2, 32))
    assert "Twice" in change["left_alone"]["1"]
    assert "computed from other parameters" in change["left_alone"]["2"]


def test_patterns_that_match_nothing_and_broken_networks_are_refused() -> None:
    network = Mixed()
    with pytest.raises(CompressionError, match=r"include='haed\.\*' matches no layer.*head\.0"):
        planned(Factorize(energy=1.0, include=["haed.*"]), network)
    with pytest.raises(CompressionError, match=r"ignore='tail' matches nothing.*head\.0"):
        planned(Factorize(energy=1.0, ignore=["tail"]), network)
    with pytest.raises(CompressionError, match="does not run on the batch at hand"):
        planned(Factorize(energy=1.0), network, torch.randn(2, 7))
    network.forward = lambda images: images  # type: ignore[assignment, method-assign]
    with pytest.raises(CompressionError, match="redirected"):
        planned(Factorize(energy=1.0), network)
    diverged = nn.Sequential(nn.Linear(16, 16))
    nn.init.constant_(diverged[0].weight, float("nan"))
    with pytest.raises(CompressionError, match=r"0\.weight is not finite"):
        planned(Factorize(energy=1.0), diverged, torch.randn(2, 16))


def test_a_record_of_another_network_is_refused() -> None:
    change = {"layers": [{"name": "head.0", "rank": 4}]}
    with pytest.raises(CompressionError, match=r"has no layer 'head\.0'"):
        Factorize.perform(nn.Sequential(nn.Linear(4, 4)), change)
    network = Mixed()
    Factorize.perform(network, change)
    with pytest.raises(CompressionError, match=r"head\.0 is a Sequential"):
        Factorize.perform(network, change)
    with pytest.raises(CompressionError, match="mix is a Conv2d"):
        Factorize.undo(network, {"layers": [{"name": "mix", "rank": 4}]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one"),
        ({"energy": 0.9, "size": 0.5}, "exactly one"),
        ({"energy": 0.0}, "energy=0.0 must be above 0"),
        ({"energy": 1.1}, "at most 1"),
        ({"size": 1.0}, "size=1.0 is neither"),
        ({"size": 0}, "size=0 is neither"),
        ({"size": True}, "size=True is neither"),
        ({"energy": 0.9, "round_to": 0}, "round_to=0"),
        ({"energy": 0.9, "start": -1}, "start=-1"),
        ({"energy": 0.9, "include": "head"}, "include='head' must be a list"),
        ({"energy": 0.9, "include": []}, "names no layer"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Factorize(**settings)


def test_settings_are_the_arguments() -> None:
    given = {"start": 0.1, "energy": None, "size": 0.5, "round_to": 4, "include": ["a"], "ignore": ["b"]}
    assert Factorize(**given).settings() == given  # type: ignore[arg-type]


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)


def adamw_in_groups(network: nn.Module) -> torch.optim.Optimizer:
    decayed = [parameter for name, parameter in network.named_parameters() if name.endswith("weight")]
    plain = [parameter for name, parameter in network.named_parameters() if not name.endswith("weight")]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])


def step(network: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    torch.manual_seed(number)
    optimizer.zero_grad()
    network(images()).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("make", [sgd, adamw_in_groups])
def test_resume_is_bitwise_exact(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    network = Mixed()
    optimizer = make(network)
    for number in range(3):
        step(network, optimizer, number)
    change = planned(Factorize(energy=0.9, round_to=1), network)
    kept = {id(p): optimizer.state[p] for name, p in network.named_parameters() if not name.endswith("0.weight")}
    weights = len(optimizer.param_groups[0]["params"])
    follow(optimizer, Factorize.perform(network, change))
    assert len(change["layers"]) == 4
    assert len(optimizer.param_groups[0]["params"]) == weights + 4
    assert optimizer.state[network.head[0][1].bias] is kept[id(network.head[0][1].bias)]
    # The order of an optimizer made anew is the live one's: state goes by index.
    assert [[id(p) for p in group["params"]] for group in make(network).param_groups] == [
        [id(p) for p in group["params"]] for group in optimizer.param_groups
    ]
    step(network, optimizer, 3)
    file = io.BytesIO()
    torch.save({"weights": network.state_dict(), "optimizer": optimizer.state_dict(), "changes": [change]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = Mixed()
    for recorded in saved["changes"]:
        Factorize.perform(fresh, recorded)
    fresh.load_state_dict(saved["weights"])
    fresh_optimizer = make(fresh)
    fresh_optimizer.load_state_dict(saved["optimizer"])
    for number in range(4, 8):
        step(network, optimizer, number)
        step(fresh, fresh_optimizer, number)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), fresh.parameters(), strict=True))
    assert list(network.state_dict()) == list(fresh.state_dict())


def test_undo_gives_the_structure_back() -> None:
    network = Mixed().eval()
    names, order, data = list(network.state_dict()), repr(network), images()
    change = planned(Factorize(energy=0.9, round_to=1), network)
    bias = network.head[0].bias
    Factorize.perform(network, change)
    outputs = network(data)
    Factorize.undo(network, change)
    assert (list(network.state_dict()), repr(network)) == (names, order)
    assert network.head[0].bias is bias
    torch.testing.assert_close(network(data), outputs, rtol=1e-4, atol=1e-5)
    network.load_state_dict(Mixed().state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_factorized_or_refused_with_the_reason(name: str) -> None:
    network, inputs = MODELS[name].build().eval(), MODELS[name].inputs(4)
    batch = Given(*inputs.args, **inputs.kwargs)
    try:
        change = Factorize(size=0.6, round_to=1).plan(network, NOW, [], batch)
    except CompressionError as error:
        assert "matches no layer" in str(error)  # noqa: PT017
        return
    assert change is not None
    before = sum(parameter.numel() for parameter in network.parameters())
    Factorize.perform(network, change)
    saved = sum(entry["before"] - entry["after"] for entry in change["layers"])
    assert before - sum(parameter.numel() for parameter in network.parameters()) == saved > 0
    network(*inputs.args, **inputs.kwargs)


def test_a_factorized_network_is_quantized_like_any_other() -> None:
    network = Mixed().eval()
    Factorize.perform(network, planned(Factorize(energy=1.0), network))
    inputs = Inputs((images(),))
    quantized = quantize(network, [inputs])
    stored = [tensor for tensor in convert(quantized).graph.state_dict().values() if tensor.dtype == torch.int8]
    assert (8, 48, 1, 1) in {tuple(tensor.shape) for tensor in stored}
    outputs, expected = quantized(*inputs.args), network(*inputs.args)
    assert float((outputs - expected).detach().norm() / expected.detach().norm()) < 0.1
    with pytest.raises(CompressionError, match="redirected"):
        planned(Factorize(energy=1.0), quantized)
