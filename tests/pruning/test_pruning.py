"""Structured pruning: what a cut takes, what it leaves, and what it refuses. Against the phase itself, no Trainer."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, MODELS
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs, flatten_outputs
from lightning_edge.pruning import Prune, plan
from lightning_edge.pruning.copies import bare_copy
from lightning_edge.pruning.cutting import channels_of, make_cut
from lightning_edge.pruning.importance import CRITERIA, score
from lightning_edge.pruning.traced import trace
from lightning_edge.pruning.verification import find_fault
from lightning_edge.schedule import Change, Clock
from lightning_edge.succession import follow
from lightning_edge.zoo.networks import DSCNN, MobileNetV2, MobileNetV3Small, ResNet8

NOW = Clock(0, 0.0)


class SomeBatch:
    """A batch whose loss is the mean square of the outputs."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        self.network = network
        self._inputs = inputs

    def inputs(self) -> Inputs:
        return self._inputs

    def gradients(self, *, per_sample: bool = False) -> Iterator[dict[str, Tensor]]:
        size = self._inputs.batch_size
        for part in [self._inputs.sample(i) for i in range(size)] if per_sample else [self._inputs]:
            twin = copy.deepcopy(self.network).eval().requires_grad_(True)
            sum(out.square().mean() for out in flatten_outputs(twin(*part.args, **part.kwargs))).backward()
            yield {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def images(batch: int = 4, size: int = 32) -> Inputs:
    return Inputs((torch.randn(batch, 3, size, size),))


def planned(network: nn.Module, inputs: Inputs, phase: Prune, clock: Clock = NOW, changes: Any = ()) -> Change:
    change = phase.plan(network, clock, list(changes), SomeBatch(network, inputs))
    assert change is not None
    return change


def living(build: Callable[[], nn.Module], inputs: Inputs) -> nn.Module:
    """A network in training mode whose norms and weights are not at their initial values."""
    torch.manual_seed(0)
    network = build().train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for _ in range(3):
            network(*inputs.args, **inputs.kwargs)
    return network


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def stays(tensor: Tensor, kept: Any) -> Tensor:
    for dimension, indices, before in kept:
        assert tensor.shape[dimension] == before
        tensor = tensor.index_select(dimension, indices)
    return tensor


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


def follow_schedule(phase: Prune, clocks: list[Clock], network: nn.Module, inputs: Inputs) -> list[Change]:
    """Train without training; gives the cuts, behind the trial that comes before them."""
    changes: list[Change] = []
    for clock in clocks:
        while change := phase.plan(network, clock, changes, SomeBatch(network, inputs)):
            phase.perform(network, change)
            changes.append(change)
    return [change for change in changes if change["kind"] == "cut"]


EPOCHS = [Clock(epoch, epoch / 10) for epoch in range(11)]


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


# What hangs together


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("round_to", [8, 2])
def test_every_architecture_is_cut_and_trains_on(name: str, round_to: int) -> None:
    model = ARCHITECTURES[name]
    inputs = model.inputs(4)
    network = living(model.build, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eights are coarse for networks as small as these
        change = planned(network, inputs, Prune(macs=0.5, round_to=round_to))
    Prune.perform(network, change)
    assert change["macs"][2] < change["macs"][0]
    network.train()(*inputs.args, **inputs.kwargs).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_every_small_model_is_cut_or_refused_with_a_reason(name: str) -> None:
    model = MODELS[name]
    inputs = model.inputs(2)
    network = living(model.build, inputs)
    phase = Prune(params=0.8, round_to=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change = planned(network, inputs, phase)
    phase.perform(network, change)
    network(*inputs.args, **inputs.kwargs)
    assert change["params"][2] < change["params"][0]


def test_tied_parameters_stay_tied() -> None:
    model = ARCHITECTURES["shared"]
    inputs = model.inputs(4)
    network = living(model.build, inputs)
    change = planned(network, inputs, Prune(layers={"left": 0.5, "expand": 0.5, "stem": 0.5}))
    Prune.perform(network, change)
    assert network.left.weight is network.right.weight
    assert network.left.weight.shape == (8, 16)
    assert network.again.weight.shape == (8, 8, 3, 3)


class TiedEnds(nn.Module):
    """The output layer's weight is the first layer's: what may be cut in one may not in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)
        self.last.weight = self.first.weight

    def forward(self, features: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.relu(self.middle(torch.relu(self.first(features)))))
        return outputs


def test_tied_parameters_that_would_differ_are_refused() -> None:
    with pytest.raises(CompressionError, match=r"is shared by 'first.weight', 'last.weight', which differ"):
        planned(TiedEnds(), Inputs((torch.randn(4, 8),)), Prune(params=0.5, round_to=2))


def test_recurrent_and_attention_layers_are_left_alone_with_their_neighbours() -> None:
    model = ARCHITECTURES["recurrent"]
    torch.manual_seed(0)
    network = model.build()
    with pytest.raises(CompressionError, match=r"layers would be empty.*GRU is left alone"):
        planned(network, model.inputs(2), Prune(macs=0.1))
    encoder = nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 2, 64, 0.0, batch_first=True))
    network = nn.Sequential(encoder, nn.Linear(16, 3)).eval()
    inputs = Inputs((torch.randn(2, 5, 6),))
    change = planned(network, inputs, Prune(params=0.6, round_to=2))
    Prune.perform(network, change)
    assert network[0][1].linear1.out_features < 64
    assert network[0][1].self_attn.embed_dim == network[0][0].out_features == 16
    network(*inputs.args)


class Hard(nn.Module):
    """A size written into forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 64), nn.Linear(64, 16), nn.Linear(16, 2)

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.relu(self.first(features))
        hidden = torch.relu(self.second(hidden)).reshape(len(features), 4, 4).flatten(1)
        outputs: Tensor = self.last(hidden)
        return outputs


class Shuffled(nn.Module):
    """Channels that change places: the layers still fit after a wrong cut, and would compute something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 16), nn.Linear(16, 64), nn.Linear(64, 2)

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.relu(self.first(features)).flip(1)
        outputs: Tensor = self.last(torch.relu(self.second(hidden)))
        return outputs


@pytest.mark.parametrize(("kind", "left"), [(Hard, "second"), (Shuffled, "first")])
def test_what_would_be_cut_wrongly_is_found_and_left_alone(kind: type[nn.Module], left: str) -> None:
    torch.manual_seed(0)
    network, inputs = kind(), Inputs((torch.randn(4, 4),))
    change = planned(network, inputs, Prune(params=0.7, round_to=1, scope="local"))
    made = {name for name, counts in change["attributes"].items() if "out_features" in counts}
    assert made == {"first", "second"} - {left}
    with pytest.warns(UserWarning, match="was tried and does not work"):
        change = planned(network, inputs, Prune(params=0.7, round_to=1, scope="local", ignore=list(made)))
    assert not change["kept"]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of the groups that were tried together, in each trial, sorted."""
    names: list[list[str]] = []

    def counted(network: nn.Module, calls: Any, change: Change, groups: Any, kept: Any) -> str:
        names.append(sorted(group.name for group in groups))
        return find_fault(network, calls, change, groups, kept)

    monkeypatch.setattr(plan, "find_fault", counted)
    return names


def test_what_stood_is_not_tried_again(tried: list[list[str]]) -> None:
    torch.manual_seed(0)
    network = ResNet8()
    cuts = follow_schedule(Prune(macs=0.5, start=2, end=6, round_to=2), EPOCHS, network, images(2))
    assert len(cuts) == 4
    assert len(tried) == 1
    assert all(set(cut["stood"]) == set(cuts[0]["stood"]) for cut in cuts)


def test_what_the_trial_did_not_cut_is_tried_when_it_is(tried: list[list[str]]) -> None:
    torch.manual_seed(0)
    network, inputs = Shuffled(), Inputs((torch.randn(4, 4),))
    trial = Prune(layers={"second": 0.5}, start=1).plan(network, EPOCHS[0], [], SomeBatch(network, inputs))
    assert trial is not None
    assert tried == [["second"]]
    phase = Prune(params=0.7, round_to=1, scope="local", start=1)
    cut = phase.plan(network, EPOCHS[1], [trial], SomeBatch(network, inputs))
    assert cut is not None
    # Both together, then each alone; what is left has stood already.
    assert sorted(tried[1:]) == [["first"], ["first", "second"], ["second"]]
    assert len(cut["faulty"]) == 1


def test_what_did_not_stand_the_trial_is_left_alone(tried: list[list[str]]) -> None:
    torch.manual_seed(0)
    network, inputs = Hard(), Inputs((torch.randn(4, 4),))
    phase = Prune(params=0.8, round_to=1, start=1, end=3)
    cuts = follow_schedule(phase, EPOCHS, network, inputs)
    assert len(cuts) == 2
    assert not any("out_features" in cut["attributes"].get("second", {}) for cut in cuts)
    # The trial's own: both together, each alone, the two ways to take the heads that the view looks like, and the rest.
    assert sorted(tried) == [["first"], ["first"], ["first", "second"], ["second"], ["second"], ["second"]]


def test_groups_that_only_stand_alone_are_tried_when_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def together(network: nn.Module, calls: Any, change: Change, groups: Any, kept: Any) -> str:
        make_cut(network, change)
        return "they differ" if len(groups) > 1 else ""

    monkeypatch.setattr(plan, "find_fault", together)
    network, inputs = Shuffled(), Inputs((torch.randn(4, 4),))
    phase = Prune(params=0.7, round_to=1, start=1)
    trial = phase.plan(network, EPOCHS[0], [], SomeBatch(network, inputs))
    assert trial is not None
    assert trial["stood"] == []
    with pytest.raises(CompressionError, match="though each group of layers can be cut alone"):
        phase.plan(network, EPOCHS[1], [trial], SomeBatch(network, inputs))


def test_the_trial_says_what_can_be_cut_and_cuts_nothing() -> None:
    torch.manual_seed(0)
    network, inputs = Hard(), Inputs((torch.randn(4, 4),))
    before = state(network)
    phase = Prune(params=0.8, round_to=1, start=5)
    trial = phase.plan(network, EPOCHS[0], [], SomeBatch(network, inputs))
    assert trial is not None
    assert not phase.perform(network, trial)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    told = phase.describe(trial)
    assert told.startswith("tried on a copy, 1 group(s) of layers can be cut. Left alone are 'last': its channels")
    assert "'second': cutting it was tried and does not work: its forward then fails" in told
    assert not phase.began([trial])
    assert phase.plan(network, EPOCHS[1], [trial], SomeBatch(network, inputs)) is None


class Positions(nn.Module):
    """Attention with a bias for each pair of positions, which torch-pruning takes for one of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.free = nn.Linear(8, 16), nn.Linear(8, 16)
        self.heads, self.last = nn.Linear(16, 48), nn.Linear(32, 2)
        self.bias = nn.Parameter(torch.randn(1, 4, 4, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.heads(self.embed(tokens)).view(-1, 4, 3, 4, 4).permute(2, 0, 3, 1, 4)
        mixed = (query @ key.transpose(-2, -1) + self.bias).softmax(-1) @ value
        outputs: Tensor = self.last(torch.cat([mixed.transpose(1, 2).flatten(2), self.free(tokens)], -1))
        return outputs


def test_layers_whose_channels_do_not_fit_a_parameter_are_left_alone() -> None:
    torch.manual_seed(0)
    network, inputs = Positions(), Inputs((torch.randn(2, 4, 8),))
    change = planned(network, inputs, Prune(params=0.8, round_to=1))
    assert "out_features" not in change["attributes"]["heads"]
    with pytest.raises(CompressionError, match=r"its channels do not fit those of 'bias'"):
        planned(network, inputs, Prune(params=0.8, round_to=1, ignore=["free", "embed"]))


def test_chunks_stay_equal() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 32, 3), nn.Conv2d(16, 4, 1)

        def forward(self, features: Tensor) -> Tensor:
            value, gate = self.first(features).chunk(2, dim=1)
            outputs: Tensor = self.last(value * torch.sigmoid(gate)).mean((2, 3))
            return outputs

    network, inputs = Gated(), images(2, 8)
    change = planned(network, inputs, Prune(params=0.5, round_to=2))
    kept = change["kept"]["first.weight"][0][1]
    assert torch.equal(kept[: len(kept) // 2] + 16, kept[len(kept) // 2 :])


def test_frozen_layers_are_cut_with_the_rest() -> None:
    torch.manual_seed(0)
    network, inputs = ResNet8(), images()
    network.stem.requires_grad_(False)
    change = planned(network, inputs, Prune(macs=0.4))
    Prune.perform(network, change)
    assert network.stem[0].out_channels == 8
    assert not any(parameter.requires_grad for parameter in network.stem.parameters())
    network(*inputs.args)


@pytest.mark.parametrize("criterion", ["taylor", "obd"])
def test_channels_without_gradients_are_not_taken_for_unimportant(criterion: Any) -> None:
    class Frozen(SomeBatch):
        def gradients(self, *, per_sample: bool = False) -> Iterator[dict[str, Tensor]]:
            for gradients in super().gradients(per_sample=per_sample):
                yield {name: gradient for name, gradient in gradients.items() if not name.startswith("stages.2")}

    torch.manual_seed(0)
    network, inputs = ResNet8(), images()
    change = Prune(macs=0.7, criterion=criterion).plan(network, NOW, [], Frozen(network, inputs))
    assert change is not None
    assert change["kept"]
    assert "out_channels" not in change["attributes"].get("stages.2.first.1", {})


def test_half_precision_networks_are_planned() -> None:
    torch.manual_seed(0)
    network, inputs = ResNet8().bfloat16(), images().map(Tensor.bfloat16)
    change = planned(network, inputs, Prune(macs=0.5))
    Prune.perform(network, change)
    assert network(*inputs.args).dtype == torch.bfloat16


# Sparse learning


def test_group_regularizer_pushes_the_least_important_channels_hardest() -> None:
    inputs = images()
    network = living(ResNet8, inputs)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    phase = Prune(macs=0.5, start=2, sparse_learning=0.1, sparse_start=1)
    batch = SomeBatch(network, inputs)
    phase.before_step(network, Clock(0, 0.0), [], batch)
    assert all(not parameter.grad.any() for parameter in network.parameters())
    phase.before_step(network, Clock(1, 0.1), [], batch)
    scale = network.stages[2].first[2].weight
    rates = (scale.grad / scale).detach() / 0.1
    kernel, reader = network.stages[2].first[1].weight, network.stages[2].second[0].weight
    with torch.no_grad():
        norms = kernel.square().sum((1, 2, 3)) + scale.square() + reader.square().sum((0, 2, 3))
    assert rates.min().item() == pytest.approx(1, rel=1e-4)
    assert rates.max().item() == pytest.approx(16, rel=1e-4)
    assert torch.equal(norms.argsort(), rates.argsort(descending=True))
    assert network.head[2].bias.grad.abs().max() == 0
    first = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad.zero_()
    Prune(macs=0.5, start=2, sparse_learning=0.1, sparse_start=1).before_step(network, Clock(1, 0.1), [], batch)
    assert all(torch.equal(first[name], parameter.grad) for name, parameter in network.named_parameters())
    change = planned(network, inputs, phase, Clock(2, 0.2))
    phase.perform(network, change)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    phase.before_step(network, Clock(2, 0.2), [change], batch)
    assert all(not parameter.grad.any() for parameter in network.parameters())
    assert phase.first_moment() == 1
    copy.deepcopy(phase)


def test_the_regularizer_spares_what_did_not_stand_the_trial() -> None:
    torch.manual_seed(0)
    network, inputs = Hard(), Inputs((torch.randn(4, 4),))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    phase = Prune(params=0.8, round_to=1, start=5, sparse_learning=0.1)
    trial = phase.plan(network, EPOCHS[0], [], SomeBatch(network, inputs))
    assert trial is not None
    phase.before_step(network, EPOCHS[0], [trial], SomeBatch(network, inputs))
    pushed = {name: bool((parameter.grad != 0).any()) for name, parameter in network.named_parameters()}
    # The second reads what the first makes; what it makes itself is not pushed, nor is what reads that.
    assert pushed == {
        "first.weight": True,
        "first.bias": False,
        "second.weight": True,
        "second.bias": False,
        "last.weight": False,
        "last.bias": False,
    }


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Give one of macs, params, size and layers; given: none"),
        ({"macs": 0.5, "params": 0.5}, "given: macs, params"),
        ({"macs": 1.5}, "macs=1.5 is no target"),
        ({"size": 0}, "size=0 is no target"),
        ({"params": True}, "params=True is no target"),
        ({"layers": {}}, "prunes nothing"),
        ({"layers": {"stem": 0.0}}, "above 0.0"),
        ({"macs": 0.5, "start": 1.5}, "start=1.5 is not a moment"),
        ({"macs": 0.5, "start": 3, "end": 2}, "comes before"),
        ({"macs": 0.5, "start": 3, "end": 0.9}, "must be of one kind"),
        ({"macs": 0.5, "every": 2}, "every=2 needs an end"),
        ({"macs": 0.5, "start": 1, "end": 5, "every": 0.1}, "of the kind of start=1"),
        ({"macs": 0.5, "schedule": "quadratic"}, "schedule='quadratic'"),
        ({"macs": 0.5, "criterion": "l3"}, "criterion='l3'"),
        ({"macs": 0.5, "scope": "all"}, "scope='all'"),
        ({"macs": 0.5, "round_to": 0}, "round_to=0"),
        ({"macs": 0.5, "seed": -1}, "seed=-1"),
        ({"macs": 0.5, "ignore": "stem"}, "must be a list"),
        ({"macs": 0.5, "sparse_learning": -1.0}, "sparse_learning=-1.0"),
        ({"macs": 0.5, "start": 1, "sparse_start": 2}, "comes before"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prune(**settings)


def test_a_cut_that_would_empty_layers_is_refused() -> None:
    with pytest.raises(CompressionError, match=r"a single channel left.*layers would be empty"):
        planned(ResNet8(), images(), Prune(macs=1000))


def test_a_target_that_rounding_keeps_away_is_told() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"macs=0.05.*reached .*multiples of round_to=8.*Left alone are 'head.2'"):
        change = planned(ResNet8(), images(), Prune(macs=0.05))
    for name, kept in change["kept"].items():
        assert all(len(indices) >= 8 for _, indices, _ in kept), name


def test_a_target_that_cuts_nothing_is_told() -> None:
    with pytest.warns(UserWarning, match="cuts nothing: params=100000 allows more than the 78,186"):
        change = planned(ResNet8(), images(), Prune(params=100_000))
    assert not change["kept"]
    with pytest.warns(UserWarning, match=r"Prune\(layers=.*cuts nothing: rounded to multiples of round_to=8"):
        planned(ResNet8(), images(), Prune(layers={"stem": 0.9}))


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, features: Tensor) -> Tensor:
            return torch.zeros(len(features), dtype=torch.long)

    class Broken(Opaque):
        def forward(self, features: Tensor) -> Tensor:
            raise RuntimeError("not in eval mode")

    for kind, message in ((Opaque, "No channels of Opaque"), (Broken, "cannot trace it.*not in eval mode")):
        with pytest.raises(CompressionError, match=message):
            planned(kind(), Inputs((torch.randn(2, 4),)), Prune(macs=0.5))


def test_weights_that_are_not_numbers_are_refused() -> None:
    network = ResNet8()
    with torch.no_grad():
        network.stem[0].weight[0] = float("nan")
    with pytest.raises(CompressionError, match="is not finite"):
        planned(network, images(), Prune(macs=0.5))


def test_parametrized_layers_are_left_alone() -> None:
    torch.manual_seed(0)
    network = ResNet8()
    nn.utils.parametrizations.weight_norm(network.stages[2].first[1])
    change = planned(network, images(), Prune(macs=0.6))
    assert (
        "stages.2.first.1" not in change["attributes"] or "out_channels" not in change["attributes"]["stages.2.first.1"]
    )
    Prune.perform(network, change)
    network(*images().args)


def test_keyword_spotting_network_with_pads_and_dropout() -> None:
    torch.manual_seed(0)
    network, inputs = DSCNN(), Inputs((torch.randn(2, 1, 49, 10),))
    change = planned(network, inputs, Prune(macs=0.5))
    assert change["macs"][2] == pytest.approx(0.5 * change["macs"][0], rel=0.02)
