from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.surgery import capture_inputs, find_network, in_mode, misfits, redirected


class OneNetwork(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.loss = nn.CrossEntropyLoss()


class TwoNetworks(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 4), nn.Linear(4, 2)


class OwnForward(TwoNetworks):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out


def test_the_only_child_with_layers_is_the_network() -> None:
    module = OneNetwork()
    assert find_network(module) is module.net


def test_a_module_with_layers_and_its_own_forward_is_the_network() -> None:
    module = OwnForward()
    assert find_network(module) is module


def test_several_candidates_are_listed() -> None:
    with pytest.raises(CompressionError, match=r"'encoder', 'head'.*module="):
        find_network(TwoNetworks())


def test_the_network_can_be_named() -> None:
    module = TwoNetworks()
    assert find_network(module, "head") is module.head
    assert find_network(module, "") is module
    with pytest.raises(CompressionError, match=r"module='nett' is not a submodule.*'encoder', 'head'"):
        find_network(module, "nett")


def test_a_compiled_child_gives_the_module_inside() -> None:
    module = OneNetwork()
    inner = module.net
    module.net = torch.compile(inner)  # type: ignore[assignment]
    assert find_network(module) is inner


def test_redirected_calls_come_back_even_after_an_error() -> None:
    network = nn.Linear(3, 2)
    with redirected(network, lambda x: x):
        assert torch.equal(network(torch.ones(1, 3)), torch.ones(1, 3))

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), redirected(network, fail):
        network(torch.ones(1, 3))
    assert network(torch.ones(1, 3)).shape == (1, 2)
    assert copy.deepcopy(network)(torch.ones(1, 3)).shape == (1, 2)


def test_captured_inputs_are_those_of_the_first_call_and_the_step_goes_no_further() -> None:
    network, went_on = nn.Linear(3, 2), []

    def step() -> None:
        try:
            network(torch.ones(1, 3))
        except Exception:  # a user's handler must not swallow the capture
            went_on.append(True)
        went_on.append(True)

    inputs = capture_inputs(network, step)
    assert inputs is not None
    assert torch.equal(inputs.tensors[0], torch.ones(1, 3))
    assert went_on == []
    assert capture_inputs(network, lambda: None) is None


class Keeps(nn.Module):
    """Keeps in evaluation what it computes from its weight, and throws it away in training, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.kept: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> Keeps:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return x + 2 * self.weight
        if not self.kept:
            self.kept["bias"] = 2 * self.weight
        return x + self.kept["bias"]


def test_modules_throw_away_what_they_keep_in_evaluation() -> None:
    network = nn.Sequential(Keeps(), nn.Dropout())
    network[1].eval()
    with in_mode(network, training=False):
        network(torch.zeros(3))
        assert network[0].kept
    assert not network[0].kept
    assert [module.training for module in network.modules()] == [True, True, False]


def test_weights_that_do_not_fit_are_told_in_a_line() -> None:
    deep = nn.Sequential(*(nn.Linear(3, 3) for _ in range(40)))
    weights = {**nn.Sequential(nn.Linear(2, 3)).state_dict(), "other": 3}
    told = misfits(deep, weights, RuntimeError("much"))
    assert told == (
        "78 missing ('1.weight', '1.bias', '2.weight' and 75 more), 1 not of it ('other'), "
        "1 of another shape ('0.weight' 3x2 for 3x3)"
    )
    assert misfits(deep, deep.state_dict(), RuntimeError("a reason\nand more")) == "a reason"
