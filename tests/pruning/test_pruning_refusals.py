"""What pruning refuses: settings, targets that cannot be met, and networks that it cannot read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruned import images, planned
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.pruning import Prune
from lightning_edge.zoo.networks import DSCNN, ResNet8


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
