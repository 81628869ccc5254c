"""The regularizer of groups: what it pushes to zero before a cut."""

from __future__ import annotations

import copy

import pytest
import torch
from pruned import EPOCHS, Hard, SomeBatch, images, living, planned

from lightning_edge.network import Inputs
from lightning_edge.pruning import Prune
from lightning_edge.schedule import Clock
from lightning_edge.zoo.networks import ResNet8


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
