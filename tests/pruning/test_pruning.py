"""Structured pruning: what a cut takes and leaves, when, and what is recorded. Against the phase itself, no Trainer."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ARCHITECTURES
from pruned import EPOCHS, SomeBatch, follow_schedule, images, living, planned, state, stays
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.pruning import Prune
from lightning_edge.pruning.copies import bare_copy
from lightning_edge.pruning.cutting import channels_of
from lightning_edge.pruning.importance import CRITERIA, score
from lightning_edge.pruning.traced import trace
from lightning_edge.schedule import Change, Clock
from lightning_edge.succession import follow
from lightning_edge.zoo.networks import MobileNetV2, MobileNetV3Small, ResNet8

# What a cut leaves


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, 1e-2, amsgrad=True),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-3, momentum=0.9, centered=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, 1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("architecture", ["residual", "depthwise", "transposed", "grouped"])
def test_state_of_kept_channels_is_the_same_bit_by_bit(name: str, architecture: str) -> None:
    model = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    network, inputs = model.build(), model.inputs(4)
    frozen = next(iter(network.parameters())).requires_grad_(False)
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[name](trainable)
    for _ in range(3):
        optimizer.zero_grad()
        network(*inputs.args).square().mean().backward()
        optimizer.step()
    objects, held = list(network.parameters()), list(optimizer.param_groups[0]["params"])
    before = {
        n: (p.detach().clone(), None if p.grad is None else p.grad.clone()) for n, p in network.named_parameters()
    }
    kept_state = {
        n: {key: value.clone() for key, value in optimizer.state[p].items() if isinstance(value, Tensor)}
        for n, p in network.named_parameters()
        if p in optimizer.state
    }
    change = planned(network, inputs, Prune(macs=0.5, round_to=2, criterion="random"))
    succession = Prune.perform(network, change)
    follow(optimizer, succession)
    assert all(one is other for one, other in zip(network.parameters(), objects, strict=True))
    assert all(one is other for one, other in zip(optimizer.param_groups[0]["params"], held, strict=True))
    assert frozen.requires_grad is False
    compared = 0
    for n, parameter in network.named_parameters():
        kept = change["kept"].get(n, [])
        data, gradient = before[n]
        assert torch.equal(parameter, stays(data, kept))
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, stays(gradient, kept))
        for key, value in kept_state.get(n, {}).items():
            found = optimizer.state[parameter][key]
            if value.shape == data.shape:
                assert torch.equal(found, stays(value, kept)), (n, key)
                compared += bool(kept)
    assert compared > 3
    optimizer.zero_grad()
    network(*inputs.args).square().mean().backward()
    optimizer.step()
    assert frozen.grad is None


def zeroed(network: nn.Module, change: Change) -> nn.Module:
    """A copy with every element at zero that the cut takes away."""
    twin = copy.deepcopy(network)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, kept in change["kept"].items():
            for dimension, indices, before in kept if name in parameters else []:
                gone = torch.tensor(sorted(set(range(before)) - set(indices.tolist())), dtype=torch.long)
                parameters[name].index_fill_(dimension, gone, 0.0)
    return twin


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "resnet8": (ResNet8, images),
    "mobilenet_v2": (MobileNetV2, images),
    "mobilenet_v3": (lambda: MobileNetV3Small(width=0.5), images),
    "wide_resnet8": (lambda: ResNet8(width=40), images),
}
LINEAR = [name for name in ARCHITECTURES if name != "attention"]


@pytest.mark.parametrize("name", [*LINEAR, "resnet8", "mobilenet_v2", "mobilenet_v3"])
def test_output_is_that_of_the_whole_network_with_the_channels_zeroed(name: str) -> None:
    build, make = NETWORKS[name] if name in NETWORKS else (ARCHITECTURES[name].build, ARCHITECTURES[name].inputs)
    inputs = make(4)
    network = living(build, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change = planned(network, inputs, Prune(macs=0.6, round_to=2, criterion="random"))
    whole, network = zeroed(network, change).eval().double(), network.eval().double()
    inputs = inputs.map(Tensor.double)
    Prune.perform(network, change)
    outputs, expected = network(*inputs.args, **inputs.kwargs), whole(*inputs.args, **inputs.kwargs)
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in whole.parameters())


def test_layer_norm_and_attention_keep_heads_whole() -> None:
    model = ARCHITECTURES["attention"]
    inputs = model.inputs(3)
    network = living(model.build, inputs)
    change = planned(network, inputs, Prune(macs=0.6, round_to=2, criterion="l1"))
    for layer in ("query", "key", "value"):
        assert [dimension for dimension, _, _ in change["kept"].get(f"{layer}.weight", [])] in ([], [1])
    # The norms see fewer channels; everything else must compute as before.
    Prune.perform(network, change)
    assert network.eval()(*inputs.args).shape == (3, 5)


# What is asked for


def count(network: nn.Module, inputs: Inputs) -> int:
    """MACs of one sample, counted apart from the phase."""
    total = 0

    def add(layer: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output[0].numel() * layer.weight[0].numel()
        else:
            total += output[0].numel() * layer.in_features

    handles = [m.register_forward_hook(add) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    network.eval()(*inputs.args)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kept", [0.75, 0.5])
def test_macs_come_within_two_percent_with_channels_in_eights(name: str, kept: float) -> None:
    build, make = NETWORKS[name]
    torch.manual_seed(0)
    network, inputs = build(), make(2)
    base = count(network, inputs)
    change = planned(network, inputs, Prune(macs=kept))
    Prune.perform(network, change)
    assert change["macs"] == [base, base, count(network, inputs)]
    assert change["macs"][2] == pytest.approx(kept * base, rel=0.02)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.out_channels % 8 == 0


@pytest.mark.parametrize("absolute", [False, True])
def test_parameters_and_bytes_are_targets_too(absolute: bool) -> None:
    for keyword, measure in (("params", "params"), ("size", "size_bytes")):
        torch.manual_seed(0)
        network, inputs = ResNet8(), images()
        before = sum(p.numel() * (4 if p.dim() < 2 and keyword == "size" else 1) for p in network.parameters())
        amount = int(before * 0.4) if absolute else 0.4
        change = planned(network, inputs, Prune(**{keyword: amount}))
        Prune.perform(network, change)
        after = sum(p.numel() * (4 if p.dim() < 2 and keyword == "size" else 1) for p in network.parameters())
        assert change[measure] == [before, before, after]
        assert after == pytest.approx(0.4 * before, rel=0.02)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_reaches_the_target(criterion: Any, scope: Any) -> None:
    inputs = images()
    network = living(ResNet8, inputs)
    change = planned(network, inputs, Prune(macs=0.5, criterion=criterion, scope=scope, round_to=4))
    assert change["macs"][2] == pytest.approx(0.5 * change["macs"][0], rel=0.02)
    again = planned(network, inputs, Prune(macs=0.5, criterion=criterion, scope=scope, round_to=4))
    for name, kept in change["kept"].items():
        assert all(torch.equal(one[1], other[1]) for one, other in zip(kept, again["kept"][name], strict=True))


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "taylor", "lamp"])
def test_importance_agrees_with_torch_pruning_where_that_is_right(criterion: Any) -> None:
    import torch_pruning as tp

    inputs = images()
    network = bare_copy(living(ResNet8, inputs))
    network(*inputs.args).square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    groups = [group for group in trace(network, inputs).groups if not group.reason]
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    ours = score(groups, criterion, tensors, gradients, 0)
    convolutions = [nn.modules.conv._ConvNd, nn.Linear]
    theirs = {
        "l1": lambda: tp.importance.MagnitudeImportance(p=1),
        "l2": lambda: tp.importance.MagnitudeImportance(p=2),
        "bn_scale": tp.importance.BNScaleImportance,
        # Its Taylor importance passes over BatchNorm by mistake; without norms both see the same.
        "taylor": lambda: tp.importance.TaylorImportance(target_types=convolutions),
        "lamp": tp.importance.LAMPImportance,
    }[criterion]()
    graph = tp.DependencyGraph().build_dependency(network, inputs.args[0], customized_pruners={}, ignored_layers=[])
    for group, values in zip(groups, ours, strict=True):
        if criterion == "taylor":
            group.slots = [slot for slot in group.slots if slot.role == "kernel"]
            values = score([group], criterion, tensors, gradients, 0)[0]
        layer = network.get_submodule(group.name)
        found = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
        torch.testing.assert_close(torch.from_numpy(values).float(), theirs(found), rtol=1e-4, atol=1e-5)


def test_least_important_channels_go_first() -> None:
    torch.manual_seed(0)
    network, inputs = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), Inputs((torch.randn(4, 4),))
    with torch.no_grad():
        network[0].weight[5:13] *= 0.01
        network[2].weight[:, 5:13] *= 0.01
    change = planned(network, inputs, Prune(macs=0.5))
    assert change["kept"]["0.weight"][0][1].tolist() == [0, 1, 2, 3, 4, 13, 14, 15]


def test_layers_by_pattern_and_ignored_layers() -> None:
    torch.manual_seed(0)
    network, inputs = ResNet8(), images()
    change = planned(network, inputs, Prune(layers={"stages.2.first*": 0.25, "stages.1.first": 0.5}))
    Prune.perform(network, change)
    widths = {name: m.out_channels for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert widths["stages.2.first.1"] == 16
    assert widths["stages.1.first.1"] == 16
    assert widths["stages.0.first.0"] == 16
    assert widths["stages.2.second.0"] == 64
    network = ResNet8()
    change = planned(network, inputs, Prune(params=0.6, ignore=["stem", "stages.1.*"]))
    made = {name for name, counts in change["attributes"].items() if "out_channels" in counts}
    assert made
    assert not any(name.startswith(("stem", "stages.1", "head")) for name in made)
    with pytest.raises(CompressionError, match=r"No channels.*ignored by 'Conv2d'"):
        planned(network, inputs, Prune(params=0.6, ignore=["Conv2d"]))
    with pytest.raises(CompressionError, match="'Convolution' names no layer"):
        planned(network, inputs, Prune(params=0.6, ignore=["Convolution"]))
    with pytest.raises(CompressionError, match="'stage2' names no layer"):
        planned(network, inputs, Prune(layers={"stage2": 0.5}))
    with pytest.raises(CompressionError, match=r"keep their channels.*output"):
        planned(network, inputs, Prune(layers={"head": 0.5}))


# When


@pytest.mark.parametrize(
    ("schedule", "shares"), [("linear", [0.875, 0.75, 0.625, 0.5]), ("cubic", [0.7109, 0.5625, 0.5078, 0.5])]
)
def test_schedules(schedule: Any, shares: list[float]) -> None:
    torch.manual_seed(0)
    network, inputs = MobileNetV2(), images(2)
    phase = Prune(macs=0.5, start=2, end=6, schedule=schedule, round_to=4)
    changes = follow_schedule(phase, EPOCHS, network, inputs)
    assert [change["epoch"] for change in changes] == [3, 4, 5, 6]
    assert [change["cut"] for change in changes] == [0, 1, 2, 3]
    base = changes[0]["macs"][0]
    assert [change["macs"][0] for change in changes] == [base] * 4
    assert [change["macs"][2] / base for change in changes] == pytest.approx(shares, rel=0.02)
    assert changes[1]["macs"][1] == changes[0]["macs"][2]
    assert (phase.first_moment(), phase.last_moment()) == (2, 6)


def test_moments() -> None:
    torch.manual_seed(0)
    inputs = images(2)
    fractions = Prune(macs=0.5, start=0.2, end=0.6, every=0.2)
    assert [change["epoch"] for change in follow_schedule(fractions, EPOCHS, ResNet8(), inputs)] == [4, 6]
    each_epoch = Prune(macs=0.5, start=0.2, end=0.6, round_to=2)
    assert [change["epoch"] for change in follow_schedule(each_epoch, EPOCHS, ResNet8(), inputs)] == [3, 4, 5, 6]
    uneven = Prune(macs=0.5, start=1, end=6, every=2, round_to=2)
    assert [change["epoch"] for change in follow_schedule(uneven, EPOCHS, ResNet8(), inputs)] == [3, 5, 6]
    once = Prune(macs=0.5, start=3)
    assert [change["epoch"] for change in follow_schedule(once, EPOCHS, ResNet8(), inputs)] == [3]
    # A run of one batch (fast_dev_run): everything is due, and one cut goes all the way.
    hurried = follow_schedule(Prune(macs=0.5, start=2, end=6), [Clock(10**9, 1.0)], ResNet8(), inputs)
    assert len(hurried) == 1
    assert hurried[0]["along"] == 1.0
    trial = Prune(macs=0.5, start=0.5).plan(ResNet8(), Clock(5, None), [], SomeBatch(ResNet8(), inputs))
    assert trial is not None
    assert trial["kind"] == "trial"


def test_a_step_too_small_for_rounding_is_recorded() -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES["depthwise"]
    network, phase = model.build(), Prune(macs=0.6, start=0, end=30, round_to=16)
    changes = follow_schedule(phase, EPOCHS[:3], network, model.inputs(2))
    assert [bool(change["kept"]) for change in changes] == [False, False]
    assert "nothing cut" in phase.describe(changes[0])
    assert not Prune.perform(network, changes[0])


# What is recorded


def test_record_repeats_and_undoes_the_cut() -> None:
    inputs = images()
    network = living(MobileNetV2, inputs)
    fresh, before = copy.deepcopy(MobileNetV2()), state(network)
    changes = follow_schedule(Prune(macs=0.5, start=0, end=2), EPOCHS, network, inputs)
    assert len(changes) == 2
    whole, cut = dict(MobileNetV2().named_modules()), dict(network.named_modules())
    told = channels_of(changes)
    assert told
    for name, layer in cut.items():
        if isinstance(layer, nn.Conv2d):
            first = whole[name].out_channels
            assert told.get(name, (first, first)) == (first, layer.out_channels), name
    file = io.BytesIO()
    torch.save(changes, file)
    file.seek(0)
    for change in torch.load(file, weights_only=True):
        Prune.perform(fresh, change)
    fresh.load_state_dict(network.state_dict())
    torch.testing.assert_close(fresh.eval()(*inputs.args), network.eval()(*inputs.args), rtol=0, atol=0)
    objects = list(network.parameters())
    for change in reversed(changes):
        Prune.undo(network, change)
    assert all(one is other for one, other in zip(network.parameters(), objects, strict=True))
    network.load_state_dict(before)
    whole = MobileNetV2()
    whole.load_state_dict(before)
    torch.testing.assert_close(network.eval()(*inputs.args), whole.eval()(*inputs.args), rtol=0, atol=0)
    assert str(network) == str(whole)
    assert changes[1]["macs"][0] == changes[0]["macs"][0]


def test_record_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    torch.manual_seed(0)
    network, other, inputs = ResNet8(), ResNet8(width=24), images()
    change = planned(network, inputs, Prune(macs=0.5))
    before = state(other)
    with pytest.raises(CompressionError, match="does not fit this ResNet8"):
        Prune.perform(other, change)
    with pytest.raises(CompressionError, match="does not fit"):
        Prune.undo(network, change)
    with pytest.raises(CompressionError, match="has no parameter or buffer"):
        Prune.perform(nn.Linear(2, 2), change)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    Prune.perform(network, change)
    with pytest.raises(CompressionError, match="does not fit"):
        Prune.perform(network, change)


def test_planning_leaves_no_trace() -> None:
    inputs = images()
    network = living(MobileNetV2, inputs)
    calls = []
    network[0].register_forward_hook(lambda *_: calls.append(1))
    network[0].weight.requires_grad_(False)
    network[1].eval()
    network[3].layers[0].weight.grad = torch.ones_like(network[3].layers[0].weight)
    before, flags = state(network), [module.training for module in network.modules()]
    random = torch.get_rng_state()
    with torch.inference_mode():
        planned(network, inputs, Prune(macs=0.5))
    assert torch.equal(torch.get_rng_state(), random)
    assert calls == []
    assert [module.training for module in network.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    graded = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
    assert graded == ["3.layers.0.weight"]
    assert not network[0].weight.requires_grad


def test_a_lightning_module_is_copied_without_its_trainer_and_logs_nothing() -> None:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))

        def forward(self, features: Tensor) -> Tensor:
            assert self.trainer is trainer
            self.log("mean", features.mean())  # raises outside of a fit
            outputs: Tensor = self.layers(features)
            return outputs

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module = Module()
    module.trainer = trainer
    change = planned(module, Inputs((torch.randn(2, 4),)), Prune(macs=0.5))
    Prune.perform(module, change)
    assert module.layers[0].out_features == 16
    assert module.trainer is trainer


def test_settings_are_the_arguments() -> None:
    arguments = {"params": 0.5, "start": 1, "end": 4, "every": 1, "schedule": "cubic", "ignore": ["stem"], "seed": 3}
    settings = Prune(**arguments).settings()
    assert settings.items() >= arguments.items()
    assert Prune(**settings).settings() == settings


def test_describe() -> None:
    torch.manual_seed(0)
    network, inputs = ResNet8(), images()
    phase = Prune(macs=0.5)
    line = phase.describe(planned(network, inputs, phase))
    assert line.startswith("12,501,632 -> 6,254,912 MACs (50.0% of 12,501,632), 78,186 -> ")
    assert line.endswith("layers make fewer channels")
