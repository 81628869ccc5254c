"""Layers that are cut together or left alone: what hangs together in a network, and the trial of each cut."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, MODELS
from pruned import EPOCHS, NOW, Hard, SomeBatch, follow_schedule, images, living, planned, state
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.pruning import Prune, plan
from lightning_edge.pruning.cutting import make_cut
from lightning_edge.pruning.verification import find_fault
from lightning_edge.schedule import Change
from lightning_edge.zoo.networks import ResNet8


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
    assert told.startswith("tried on a copy, 1 group of layers can be cut. Left alone are 'last': its channels")
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
