"""Quantization without a Trainer: capture, quantizers, ranges, conversion, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import MODELS, Model
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs, flatten_outputs
from lightning_edge.quantization import (
    Quantize,
    attach,
    calibrate,
    convert,
    detach,
    float_copy,
    is_quantized,
    quantize,
    quantized_forward,
)
from lightning_edge.quantization.capture.graph import capture

# The MobileNets have ten times the layers of the others, and no kind of layer that the others lack but hard-swish.
every_model = pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, marks=pytest.mark.slow if name.startswith("mobilenet") else ())
        for name, model in MODELS.items()
    ],
    ids=MODELS.keys(),
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def warmed(model: Model) -> nn.Module:
    """A network whose BatchNorm statistics are not those of a fresh one."""
    network = model.build().train()
    with torch.no_grad():
        for _ in range(3):
            call(network, model.inputs(8))
    return network.eval()


def call(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Flattened outputs, with gradients where the network trains."""
    return flatten_outputs(network(*inputs.args, **inputs.kwargs))


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


@every_model
def test_the_captured_graph_is_the_network_for_any_batch_size(model: Model) -> None:
    network = warmed(model)
    graph = capture(network, model.inputs(4)).graph
    for batch_size in (1, 3, 6):
        inputs = model.inputs(batch_size)
        assert worst(call(graph, inputs), call(network, inputs)) < 1e-4


@every_model
def test_what_is_trained_is_what_ships(model: Model) -> None:
    network = warmed(model)
    quantized = quantize(network, [model.inputs(8) for _ in range(3)])
    converted = convert(quantized)
    inputs = model.inputs(5)
    # The arithmetic is the same; float sums in another order may tip a value over a rounding edge, one step at most.
    for ours, theirs, scale in zip(
        call(quantized, inputs), call(converted, inputs), converted.output_scales, strict=True
    ):
        assert scale is not None
        assert float((ours - theirs).abs().max()) <= scale * 1.01
        assert float((ours - theirs).abs().mean()) <= scale * 0.05
    assert worst(call(converted, inputs), call(network, inputs)) < 0.25


@every_model
def test_the_module_keeps_its_tree_parameters_and_keys(model: Model) -> None:
    network = warmed(model)
    before, state, parameters = list(network.named_modules()), list(network.state_dict()), list(network.parameters())
    inputs = model.inputs(4)
    expected = call(network, inputs)
    attach(network, inputs)
    assert [name for name in network.state_dict() if "edge_quantizers" not in name] == state
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    detach(network)
    assert list(network.named_modules()) == before
    assert not is_quantized(network)
    assert worst(call(network, inputs), expected) == 0


def test_gradients_reach_weights_and_both_batch_norm_parameters() -> None:
    model = MODELS["plain"]
    network = model.build().train()
    inputs = model.inputs(8)
    attach(network, inputs)
    call(network, inputs)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_ranges_move_in_training_only_and_not_when_frozen() -> None:
    model = MODELS["plain"]
    network = model.build().train()
    child = attach(network, model.inputs(8))

    def ranges() -> list[Tensor]:
        return [module.scale.clone() for module in child.fake_quantizers()]  # type: ignore[operator, union-attr]

    def moved() -> bool:
        before = ranges()
        call(network, model.inputs(8).map(lambda tensor: 10 * tensor))
        return any(not torch.equal(a, b) for a, b in zip(before, ranges(), strict=True))

    assert moved()
    network.eval()
    assert not moved()
    network.train()
    assert moved()
    child.freeze_observers()
    assert not moved()


def test_a_frozen_state_survives_a_state_dict() -> None:
    model = MODELS["plain"]
    first, second = model.build(), model.build()
    inputs = model.inputs(4)
    child = attach(first, inputs)
    calibrate(first, inputs)
    child.freeze_observers()
    restored = attach(second, inputs)
    second.load_state_dict(first.state_dict())
    assert restored.frozen
    assert torch.equal(call(first.eval(), inputs)[0], call(second.eval(), inputs)[0])


def test_a_deep_copy_is_independent_and_complete() -> None:
    model = MODELS["plain"]
    network = quantize(warmed(model), [model.inputs(8)])
    copied, inputs = copy.deepcopy(network), model.inputs(4)
    assert torch.equal(call(copied, inputs)[0], call(network, inputs)[0])
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not torch.equal(call(copied, inputs)[0], call(network, inputs)[0])
    assert not call(copied, inputs)[0].any()


def test_live_batch_norm_learns_as_the_float_network_does_and_folds_exactly() -> None:
    model = MODELS["plain"]
    network = warmed(model).train()
    dropout = next(module for module in network.modules() if isinstance(module, nn.Dropout))
    dropout.p = 0.0
    inputs = model.inputs(16)
    reference = copy.deepcopy(network)
    child = attach(network, inputs, live_batch_norm=True)
    calibrate(network, inputs)
    call(network, inputs)
    call(reference, inputs)
    for ours, theirs in zip(network.modules(), reference.modules(), strict=False):
        if isinstance(ours, nn.BatchNorm2d) and isinstance(theirs, nn.BatchNorm2d):
            # int8 weights and activations in front of it: equal up to their rounding, and far from momentum 0.1.
            torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=0.02, atol=1e-3)
    network.eval()
    live = call(network, inputs)[0]
    assert child.live_batch_norms()
    child.freeze_observers()
    child.fold_batch_norms()
    assert torch.equal(call(network.train(), inputs)[0], live)
    converted = convert(network)
    assert float((call(converted, inputs)[0] - live).abs().max()) <= 1.01 * (converted.output_scales[0] or 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(dtype: torch.dtype) -> None:
    model = MODELS["plain"]
    network = model.build().train()
    inputs = model.inputs(4)
    attach(network, inputs)
    with torch.autocast("cpu", dtype=dtype):
        out = call(network, inputs)[0]
    out.float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return torch.tanh(x) if self.training else x


class ReadsValues(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else x


class NothingToQuantize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Branches(), r"Branches computes something else in training.*tanh.*self.training"),
        (
            ReadsValues(),
            r"ReadsValues cannot be captured as one graph.*not branch on values.*The line is .*_quantization.py",
        ),
        (NothingToQuantize(), r"NothingToQuantize has no operation that can run in int8.*cumsum"),
    ],
    ids=["branch on training", "branch on values", "nothing to quantize"],
)
def test_what_cannot_be_captured_is_refused_with_the_reason(network: nn.Module, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        attach(network, Inputs.of(torch.ones(2, 4)))
    assert not is_quantized(network)


def test_quantizing_twice_is_refused() -> None:
    model = MODELS["plain"]
    network = quantize(model.build(), [model.inputs(2)])
    with pytest.raises(CompressionError, match="quantized already"):
        attach(network, model.inputs(2))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        out: Tensor = self.layer(x) * factor
        return out


def test_a_call_that_the_graph_would_answer_wrongly_is_refused() -> None:
    images = torch.randn(4, 3, 8, 8)
    network = quantize(Scaled(), [Inputs((images,), {"factor": 2.0})])
    expected = network(images, factor=2.0)
    assert torch.equal(network(images, 2.0), expected)
    assert torch.equal(network(factor=2.0, x=images), expected)
    with pytest.raises(CompressionError, match=r"called with an argument: 3.0; it was captured with: 2.0"):
        network(images, factor=3.0)
    with pytest.raises(CompressionError, match=r"shape \(batch, 3, 9, 9\).*captured with.*\(batch, 3, 8, 8\)"):
        network(torch.randn(4, 3, 9, 9), factor=2.0)
    default = quantize(Scaled(), [images])
    assert torch.equal(default(images, factor=1.0), default(images))
    with pytest.raises(CompressionError, match="factor"):
        default(images, factor=2.0)


def test_converting_what_never_saw_data_or_saw_nan_is_refused() -> None:
    model = MODELS["plain"]
    network = model.build()
    with pytest.raises(CompressionError, match="holds no quantized network"):
        convert(network)
    attach(network, model.inputs(2))
    with pytest.raises(CompressionError, match="never saw a finite value"):
        convert(network)
    broken = model.build()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(CompressionError, match="NaN"):
        convert(quantize(broken, [model.inputs(4)]))


def test_converting_weights_that_diverged_after_calibration_is_refused() -> None:
    model = MODELS["plain"]
    network = quantize(model.build(), [model.inputs(4)])
    with torch.no_grad():
        next(network.parameters())[0] = float("nan")
    with pytest.raises(CompressionError, match=r"features.0.weight of the network is not finite"):
        convert(network)


def test_the_converted_network_takes_calls_as_the_network_does() -> None:
    images = torch.randn(4, 3, 8, 8)
    converted = convert(quantize(Scaled(), [Inputs((images,), {"factor": 2.0})]))
    assert torch.equal(converted(images, 2.0), converted(factor=2.0, x=images))
    with pytest.raises(CompressionError, match=r"3.0; it was captured with: 2.0"):
        converted(images, 3.0)


def test_calibration_needs_a_batch() -> None:
    with pytest.raises(ValueError, match="calibration_batches is empty"):
        quantize(nn.Linear(2, 2), [])


def test_post_training_quantization_leaves_the_model_as_it_was() -> None:
    model = MODELS["residual"]
    network = warmed(model)
    state = copy.deepcopy(network.state_dict())
    quantized = quantize(network, (model.inputs(4) for _ in range(2)))
    assert not is_quantized(network)
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert quantized_forward(quantized)[1].frozen
    inputs = model.inputs(2)
    assert worst(call(float_copy(quantized), inputs), call(network, inputs)) == 0


def test_weights_and_activations_are_int8_in_the_converted_graph() -> None:
    model = MODELS["residual"]
    converted = convert(quantize(model.build(), [model.inputs(4)]))
    graph = converted.graph
    weights = [value for name, value in graph.named_buffers() if "frozen_param" in name]
    convolutions = [m for m in model.build().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [value.dtype for value in weights] == [torch.int8] * len(convolutions)
    assert not any(isinstance(node.target, str) and "batch_norm" in node.target for node in graph.graph.nodes)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 1.5}, "start=1.5"),
        ({"start": 3, "freeze_observers": 2}, "freeze_observers=2 comes before start=3"),
        ({"start": 0.5, "fold_batch_norm": 0.2}, "fold_batch_norm=0.2 comes before"),
        ({"averaging": 0.0}, "averaging=0.0 must be above 0"),
    ],
)
def test_bad_settings_are_refused_at_construction(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(**arguments)


def activation_scales(network: nn.Module) -> set[float]:
    """The different scales of its activations."""
    return {float(module.scale) for module in network.modules() if getattr(module, "is_per_channel", None) is False}


class Moved(nn.Module):
    """What only moves values, or repeats them, between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.function(self.first(x)))
        return logits


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y.movedim(1, -1).moveaxis(-1, 1),
        lambda y: y.swapaxes(2, 3),
        lambda y: y.mT,
        lambda y: y.narrow(2, 0, 4),
        lambda y: y.roll((1, 2), (2, 3)),
        lambda y: y.repeat(1, 1, 2, 1),
        lambda y: y.tile(1, 1, 2, 1),
        lambda y: y.repeat_interleave(2, 2),
        lambda y: nn.functional.pixel_shuffle(nn.functional.pixel_unshuffle(y, 2), 2),
        lambda y: y[:, :1].expand_as(y),
        lambda y: torch.concat([y, y.flip(2)], 2),
        lambda y: torch.hstack([y, y.relu()])[:, 4:12],
        lambda y: torch.cat([nn.functional.pad(y[:, :, 1:], (0, 0, 0, 1)), y, y[:, :, :1]], 2),
        lambda y: y.unbind(2)[1].float()[:, :, None, 2:],
    ],
    ids=[
        "movedim",
        "swapaxes",
        "mT",
        "narrow",
        "roll",
        "repeat",
        "tile",
        "interleave",
        "unshuffle",
        "expand_as",
        "concat",
        "hstack",
        "shifts",
        "casts",
    ],
)
def test_what_moves_values_keeps_their_scale(function: Callable[[Tensor], Tensor]) -> None:
    """Another scale would round them once more, and be an operation more in every file."""
    images = torch.randn(8, 3, 8, 8)
    quantized = quantize(Moved(function).eval(), [images])
    scales = activation_scales(quantized)
    assert len(scales) == 3  # of the input, of the first layer's output, of the last one's


def test_an_input_that_is_joined_to_what_was_made_of_it_has_one_scale() -> None:
    """As shifted tokens beside the tokens: torchao follows who shares with whom, here in a circle."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            later, earlier = nn.functional.pad(x[:, 1:], (0, 0, 0, 1)), nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
            logits: Tensor = self.layer(torch.cat([later, x, earlier], 2))
            return logits

    quantized = quantize(Shifted().eval(), [torch.randn(8, 5, 4)])
    scales = activation_scales(quantized)
    assert len(scales) == 2  # of the input and of the layer's output


class Normed(nn.Module):
    """A norm that is written out, between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(6, 8), nn.Linear(8, 3), function
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, 8))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.scale * self.function(self.first(x)))
        return logits


def root_mean_square(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def centred(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).square().mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    "function",
    [
        root_mean_square,
        centred,
        lambda x: x / (x * x).sum(-1, keepdim=True).sqrt().clamp_min(1e-6),
        lambda x: nn.functional.normalize(x, dim=-1),
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6),
        lambda x: x * (x.var(-1, keepdim=True) + 1e-6).sqrt().reciprocal().expand_as(x),
    ],
    ids=["rms", "layer norm", "length", "normalize", "deviation", "reciprocal"],
)
def test_norms_that_are_written_out_are_float_inside(function: Callable[[Tensor], Tensor]) -> None:
    """Rows of very different sizes: in int8 all that the small ones are divided by was zero."""
    rows = [torch.randn(16, 5, 6) * torch.logspace(-3, 0, 5)[:, None] for _ in range(2)]
    network = Normed(function).eval()
    network.first.bias.data.zero_()
    quantized = quantize(network, rows)
    scales = activation_scales(quantized)
    assert len(scales) == 4  # of the input, the first layer's output, the norm's with its scale, the last one's


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / (x.relu() + 1.0),
        lambda x: x * torch.rsqrt(x.abs() + 1.0),
        lambda x: x - x.mean(-1, keepdim=True),
    ],
    ids=["quotient", "root", "difference"],
)
def test_what_is_no_norm_is_quantized(function: Callable[[Tensor], Tensor]) -> None:
    quantized = quantize(Normed(function).eval(), [torch.randn(16, 5, 6)])
    scales = activation_scales(quantized)
    assert len(scales) > 4
