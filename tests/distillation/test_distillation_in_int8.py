"""Distillation in the int8 phase: features of the quantized network, and the float network as its teacher."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from distilled import START, Net, images, seeded, step
from torch import Tensor, nn

from lightning_edge.distillation import (
    AttentionTransfer,
    Distill,
    Distillation,
    FeatureMatching,
)
from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.quantization import attach, calibrate, convert, detach, float_copy
from lightning_edge.quantization.feature_taps import add_taps, remove_taps
from lightning_edge.succession import Succession

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("error:::lightning_edge", "error::lightning_edge.user_warnings.EdgeWarning"),
]


@pytest.mark.parametrize("live", [False, True])
def test_taps_give_the_features_of_the_int8_network(live: bool) -> None:
    net = seeded(Net, 0).train()
    with torch.no_grad():
        for seed in range(10):
            net(images(16, seed) * 2 + 1)
        net.stem[1].weight.uniform_(0.5, 2)
        net.stem[1].bias.uniform_(-1, 1)
    net.drop.p = 1e-9
    if not live:
        net.stem[1].eval()  # a folded BatchNorm uses its running statistics
    x = images(16)
    names = ["stem.0", "stem.1", "stem", "conv", "relu", "drop", "head"]
    seen: dict[str, Tensor] = {}
    handles = [
        net.get_submodule(name).register_forward_hook(lambda m, a, o, n=name: seen.__setitem__(n, o.clone()))
        for name in names
    ]
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    net(x)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for name, value in net.named_buffers():
            value.copy_(buffers[name])
    child = attach(net, Inputs((x,)), live_batch_norm=live)
    state, graph = list(net.state_dict()), str(child._graph.code)  # type: ignore[union-attr]
    tapped: dict[str, Tensor] = {}
    add_taps(child, names, tapped.__setitem__)
    output = net(x)
    assert list(net.state_dict()) == state
    for name in names:
        span = float(seen[name].max() - seen[name].min())
        assert float((tapped[name] - seen[name]).detach().abs().max()) < 0.03 * span, name
        (gradient,) = torch.autograd.grad(tapped[name].sum(), net.stem[0].weight, retain_graph=True)
        assert gradient.abs().sum() > 0
    # What the int8 network goes on with, rounded.
    assert torch.equal(tapped["head"], output)
    assert not torch.equal(tapped["relu"], seen["relu"])
    if live:  # the same when the statistics stand still, and when they are part of the weights
        net.stem[1].eval()
        net(x)
        still = tapped["stem.0"]
        child.fold_batch_norms()
        net(x)
        assert torch.allclose(tapped["stem.0"], still, atol=1e-3)  # ranges moved
        assert float((still - seen["stem.0"]).detach().abs().max()) < 0.03 * float(seen["stem.0"].max())
    # Copies are silent, files know nothing of taps, and they come off.
    tapped.clear()
    copied = copy.deepcopy(net)
    assert torch.equal(copied.eval()(x), copy.deepcopy(net).eval()(x))
    float_copy(net)(x)
    assert tapped == {}
    with_taps = convert(net)
    remove_taps(child)
    assert with_taps.graph.code == convert(net).graph.code  # type: ignore[union-attr]
    assert str(child._graph.code) == graph  # type: ignore[union-attr]
    net(x)
    assert tapped == {}
    detach(net)


def test_a_layer_without_a_place_in_the_graph_is_refused() -> None:
    net = Net()
    net.unused = nn.Conv2d(1, 1, 1)
    child = attach(net, Inputs((images(),)))
    with pytest.raises(CompressionError, match=r"no layer 'nope'; it has: 'stem', 'stem.0'"):
        add_taps(child, ["nope"], print)
    with pytest.raises(CompressionError, match=r"'unused' computes nothing .*'conv', .*'stem.1'"):
        add_taps(child, ["unused"], print)


def test_feature_matching_goes_on_in_int8() -> None:
    student, teacher = seeded(Net, 0), seeded(Net, 1, 6)
    losses = [FeatureMatching({"stem.1": "stem.1", "relu": "relu"}), AttentionTransfer(["conv"])]
    distillation = Distillation(Distill(teacher, losses), student)
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    distillation.adapters.join(optimizer)
    x = images()
    student.stem[1].eval()  # the statistics that the int8 network goes on with
    in_float = step(distillation, x)
    adapters = list(distillation.adapters.parameters())
    attach(student, Inputs((x,)))
    calibrate(student, Inputs((x,)))
    distillation.set_network(student, Succession())
    in_int8 = step(distillation, x)
    for name in ("features", "attention"):
        assert float(in_int8[name]) == pytest.approx(float(in_float[name]), rel=0.05)
        assert not torch.equal(in_int8[name], in_float[name])
    assert list(distillation.adapters.parameters()) == adapters
    before = student.stem[0].weight.detach().clone()
    distillation.total(torch.zeros(()), in_int8).backward()
    optimizer.step()
    assert not torch.equal(student.stem[0].weight, before)
    distillation.remove()
    assert "edge_tap" not in str(student.edge_quantizers._graph.code)  # type: ignore[union-attr]


def test_the_float_network_teaches_its_int8_self() -> None:
    student = seeded(Net, 0)
    phase = Distill("self", temperature=1.0)
    distillation = Distillation(phase, student)
    assert distillation.active(START) == {}
    changes: list[Any] = []
    assert phase.plan(student, START, changes, None) is None  # type: ignore[arg-type]
    x = images()
    baseline = float_copy(student)
    attach(student, Inputs((x,)))
    calibrate(student, Inputs((x,)))
    begun = phase.plan(student, START, changes, None)  # type: ignore[arg-type]
    assert begun is not None
    assert "the float network" in phase.describe(begun)
    distillation.set_teacher(baseline)
    distillation.set_network(student)
    student.drop.p = 0.0
    value = step(distillation, x)["kl"]
    assert 0 < float(value) < 0.01
