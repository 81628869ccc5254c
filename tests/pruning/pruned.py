"""Networks and batches that tests of pruning share, and the change that a phase plans for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_edge.network import Inputs, flatten_outputs
from lightning_edge.pruning import Prune
from lightning_edge.schedule import Change, Clock

NOW = Clock(0, 0.0)
EPOCHS = [Clock(epoch, epoch / 10) for epoch in range(11)]


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


def follow_schedule(phase: Prune, clocks: list[Clock], network: nn.Module, inputs: Inputs) -> list[Change]:
    """Train without training; gives the cuts, behind the trial that comes before them."""
    changes: list[Change] = []
    for clock in clocks:
        while change := phase.plan(network, clock, changes, SomeBatch(network, inputs)):
            phase.perform(network, change)
            changes.append(change)
    return [change for change in changes if change["kind"] == "cut"]


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
