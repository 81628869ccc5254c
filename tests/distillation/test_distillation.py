"""Distillation: each loss against its formula, the teacher beside the student, and knowledge distillation by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge.callbacks.distillation import DistillationWiring
from lightning_edge.distillation import (
    DIST,
    AttentionTransfer,
    Distill,
    Distillation,
    DistillationLoss,
    FeatureMatching,
    KLDivergence,
    LogitsMSE,
)
from lightning_edge.distillation.outputs import select_output
from lightning_edge.distillation.teacher import build_teacher
from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.quantization import Quantize, attach, calibrate, convert, detach, float_copy
from lightning_edge.quantization.feature_taps import add_taps, remove_taps
from lightning_edge.schedule import Clock, Phase
from lightning_edge.succession import Succession, cut, follow_all

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("error:::lightning_edge"),
]

START = Clock(0, 0.0)


class Net(nn.Module):
    """A small CNN; a wider one is the teacher."""

    def __init__(self, width: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, stride=stride, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(self.stem(x)))
        logits: Tensor = self.head(self.drop(x.mean((2, 3))))
        return logits


class Heads(nn.Module):
    """Two outputs by name, and one that is no float."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.label, self.value = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.trunk(x))
        logits = self.label(hidden)
        return {"label": logits, "value": self.value(hidden), "class": logits.argmax(1)}


class NeedsArguments(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Saved(L.LightningModule):
    """A LightningModule whose checkpoint is a teacher; it has no forward of its own."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(width)


class SquaredNorms(DistillationLoss):
    """A user's own loss."""

    name = "norms"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.norm() - teacher.norm()) ** 2


def seeded(build: Callable[..., nn.Module], seed: int, *args: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build(*args)


def images(size: int = 8, seed: int = 5) -> Tensor:
    return torch.randn(size, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def step(distillation: Distillation, *calls: Any, clock: Clock = START) -> dict[str, Tensor]:
    """Call the student as a training step does, and give the losses."""
    with distillation.watching():
        for x in calls:
            distillation._watch.network(x)
        return distillation.compute(clock)


# Each loss against its formula, written out by value.


def softened(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def pearson(x: list[float], y: list[float]) -> float:
    a, b = [v - sum(x) / len(x) for v in x], [v - sum(y) / len(y) for v in y]
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)


def test_kl_is_the_teachers_against_the_students(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    expected = 0.0
    for s_row, t_row in zip(student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(softened(s_row, 3.0), softened(t_row, 3.0), strict=True)
        expected += sum(t * math.log(t / s) for s, t in pairs)
    assert float(KLDivergence(3.0).compare(student, teacher)) == pytest.approx(expected / 6 * 9, rel=1e-12)
    assert float(KLDivergence(3.0).compare(teacher, teacher)) == pytest.approx(0.0, abs=1e-12)


def test_logits_mse_is_the_mean_of_squares(logits: tuple[Tensor, Tensor]) -> None:
    pairs = zip(logits[0].flatten().tolist(), logits[1].flatten().tolist(), strict=True)
    assert float(LogitsMSE().compare(*logits)) == pytest.approx(sum((s - t) ** 2 for s, t in pairs) / 24, rel=1e-12)


def test_dist_is_correlation_within_samples_and_within_classes(logits: tuple[Tensor, Tensor]) -> None:
    students, teachers = ([softened(row, 2.0) for row in side.tolist()] for side in logits)
    inter = 1 - sum(pearson(s, t) for s, t in zip(students, teachers, strict=True)) / 6
    columns = [pearson([row[c] for row in students], [row[c] for row in teachers]) for c in range(4)]
    intra = 1 - sum(columns) / 4
    loss = DIST(beta=2.0, gamma=0.5, temperature=2.0)
    assert float(loss.compare(*logits)) == pytest.approx((2.0 * inter + 0.5 * intra) * 4, rel=1e-9)
    # Relations, not values: what is only scaled in probability space agrees.
    assert float(loss.compare(logits[0], logits[0])) == pytest.approx(0.0, abs=1e-9)


def test_dist_of_one_sample_has_a_gradient(logits: tuple[Tensor, Tensor]) -> None:
    student = logits[0][:1].requires_grad_()
    DIST().compare(student, logits[1][:1]).backward()
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]
    assert student.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_class_probabilities_of_positions_are_taken_per_position(logits: tuple[Tensor, Tensor]) -> None:
    def as_map(rows: Tensor) -> Tensor:  # (6, 4) -> (1, 4, 2, 3)
        return rows.t().reshape(1, 4, 2, 3)

    for loss in (KLDivergence(2.0), DIST()):
        flat, mapped = loss.compare(*logits), loss.compare(as_map(logits[0]), as_map(logits[1]))
        assert float(mapped) == pytest.approx(float(flat), rel=1e-12)


def test_feature_matching_averages_the_larger_to_the_smaller() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)
    pooled = torch.stack(
        [student[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3)) for i in (0, 1) for j in (0, 1)]
    )
    expected = (pooled - teacher.flatten(2).permute(2, 0, 1)).square().mean()
    assert torch.allclose(FeatureMatching(["conv"]).compare(student, teacher), expected)
    assert torch.allclose(FeatureMatching(["conv"]).compare(teacher, student), expected)


def test_attention_transfer_compares_normalized_maps_of_any_width() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 2), torch.randn(2, 5, 2, 2)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        maps = []
        for feature in (s, t):
            energy = [sum(float(feature[c, i, j]) ** 2 for c in range(len(feature))) for i in (0, 1) for j in (0, 1)]
            norm = math.sqrt(sum(e * e for e in energy))
            maps.append([e / norm for e in energy])
        expected += sum((a - b) ** 2 for a, b in zip(*maps, strict=True))
    assert float(AttentionTransfer(["conv"]).compare(student, teacher)) == pytest.approx(expected / 8, rel=1e-5)


# The student, its teacher, and a step.


def test_losses_count_in_their_windows_and_with_their_weights() -> None:
    losses = [KLDivergence(2.0, weight=0.5), LogitsMSE(weight=3.0, start=0.5, end=0.75), LogitsMSE(end=1)]
    student, teacher = seeded(Net, 0), seeded(Net, 1)
    distillation = Distillation(Distill(teacher, losses, task_weight=0.25, start=0.25, end=0.9), student)
    assert distillation.active(Clock(0, 0.2)) == {}
    assert list(distillation.active(Clock(0, 0.25))) == ["kl", "mse#2"]
    assert list(distillation.active(Clock(1, 0.5))) == ["kl", "mse"]
    assert list(distillation.active(Clock(1, 0.75))) == ["kl"]
    assert distillation.active(Clock(1, 0.9)) == {}
    x = images()
    computed = step(distillation, x, clock=Clock(1, 0.5))
    task = torch.tensor(2.0)
    expected = 0.25 * task + 0.5 * computed["kl"] + 3.0 * computed["mse"]
    assert torch.equal(distillation.total(task, computed), expected)


def test_a_fast_dev_run_goes_through_every_loss() -> None:
    import sys

    clock = Clock(sys.maxsize, 1.0)
    phase = Distill(seeded(Net, 1), [LogitsMSE(start=0.5, end=0.6), KLDivergence()], end=0.7)
    assert list(Distillation(phase, seeded(Net, 0)).active(clock)) == ["mse", "kl"]


def test_several_calls_of_a_step_add_up() -> None:
    student, teacher = seeded(Net, 0).train(), seeded(Net, 1)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    distillation = Distillation(Distill(teacher), student)
    first, second = images(seed=1), images(seed=2)
    both = step(distillation, first, second)["kl"]
    assert torch.equal(both, step(distillation, first)["kl"] + step(distillation, second)["kl"])


def test_only_training_calls_with_gradients_count() -> None:
    student = seeded(Net, 0)
    distillation = Distillation(Distill(seeded(Net, 1)), student)
    with torch.no_grad():
        assert step(distillation, images()) == {}
    student.eval()
    assert step(distillation, images()) == {}
    assert not distillation.called
    student.train().requires_grad_(False)
    assert step(distillation, images()) == {}
    student.requires_grad_(True)
    assert list(step(distillation, images())) == ["kl"]
    with distillation.watching(), distillation.suspended():
        student(images())
        assert not distillation.pending


def test_the_teacher_is_a_frozen_copy_beside_the_student() -> None:
    student, given = seeded(Net, 0), seeded(Net, 1, 6)
    names = list(student.state_dict())
    before = copy.deepcopy(given.state_dict())
    distillation = Distillation(Distill(given), student.double())
    teacher = distillation.teacher
    assert teacher is not None
    sgd = torch.optim.SGD(student.parameters(), 0.1)
    for _ in range(3):
        computed = step(distillation, images().double())
        distillation.total(torch.zeros((), dtype=torch.float64), computed).backward()
        sgd.step()
    assert list(student.state_dict()) == names
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name].to(value.dtype))
    # The user's own object is as it was.
    assert given.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in given.parameters())
    assert len(student._forward_hooks) == len(student._forward_pre_hooks) == 0


def test_hooks_are_gone_after_an_error() -> None:
    student = seeded(Net, 0)
    distillation = Distillation(Distill(seeded(Net, 1), [FeatureMatching(["conv"])]), student)
    with distillation.watching():
        assert student.conv._forward_hooks
        with pytest.raises(ValueError, match="4D"):
            student(torch.zeros(1, 2, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert list(step(distillation, images())) == ["features"]


def test_outputs_are_chosen_by_name() -> None:
    student, teacher = seeded(Heads, 0), seeded(Heads, 1)
    losses = [KLDivergence(output="label"), LogitsMSE(output="value"), SquaredNorms(output="value")]
    distillation = Distillation(Distill(teacher, losses), student)
    x = torch.randn(4, 6)
    computed = step(distillation, x)
    assert list(computed) == ["kl_label", "mse_value", "norms_value"]
    ours, theirs = student(x), teacher(x)
    assert torch.equal(computed["mse_value"], F.mse_loss(ours["value"], theirs["value"]))
    assert torch.equal(computed["norms_value"], (ours["value"].norm() - theirs["value"].norm()) ** 2)
    # A teacher of one task beside a student of two.
    lone = nn.Linear(6, 3)
    computed = step(Distillation(Distill(lone, [LogitsMSE(output="label")]), student), x)
    assert torch.equal(computed["mse_label"], F.mse_loss(student(x)["label"], lone(x)))


def test_outputs_that_are_not_clear_are_refused() -> None:
    pair = (torch.zeros(2), {"a": torch.zeros(3)})
    assert select_output(pair, 0, "it").shape == (2,)
    assert select_output(pair, "1.a", "it").shape == (3,)
    with pytest.raises(CompressionError, match=r"several outputs and the loss names none; there is: '0', '1.a'"):
        select_output(pair, None, "the student Net")
    with pytest.raises(CompressionError, match=r"no output 'b'; there is: '0', '1.a'"):
        select_output(pair, "b", "the student Net", lone=True)
    with pytest.raises(CompressionError, match="there is: one tensor without a name"):
        select_output(torch.zeros(2), "b", "the student Net")
    with pytest.raises(CompressionError, match="no tensor of floating point"):
        select_output([torch.zeros(2, dtype=torch.long)], None, "the student Net")


def test_what_training_step_writes_into_an_output_does_not_count() -> None:
    student, teacher = seeded(Net, 0), seeded(Net, 1)
    student.drop.p = 0.0
    distillation = Distillation(Distill(teacher, [LogitsMSE()]), student)
    x = images()
    with distillation.watching():
        student(x).add_(1000.0)
        value = distillation.compute(START)["mse"]
    assert torch.equal(value, F.mse_loss(student(x), teacher.eval()(x)))


# Features.


def test_features_are_matched_where_widths_and_sizes_agree() -> None:
    student, teacher = seeded(Net, 0), seeded(Net, 1)
    loss = FeatureMatching(["stem.1", "conv"])
    distillation = Distillation(Distill(teacher, [loss]), student)
    value = step(distillation, images())["features"]
    assert list(distillation.adapters.parameters()) == []
    teacher.eval()
    x = images()
    # stem.1 as it is before the in-place ReLU behind it.
    ours, theirs = student.stem[1](student.stem[0](x)), teacher.stem[1](teacher.stem[0](x))
    expected = F.mse_loss(ours, theirs) + F.mse_loss(student.conv(ours.relu()), teacher.conv(theirs.relu()))
    assert torch.allclose(value, expected)


def test_an_adapter_maps_narrow_features_and_is_trained_last_in_the_first_group() -> None:
    student, teacher = seeded(Net, 0), seeded(Net, 1, 6)
    distillation = Distillation(Distill(teacher, [FeatureMatching({"relu": "conv"})]), student)
    sgd = torch.optim.SGD([{"params": student.stem.parameters()}, {"params": student.head.parameters()}], 0.1)
    distillation.adapters.join(sgd)
    state = torch.get_rng_state()
    student.drop.eval()
    value = step(distillation, images())["features"]
    assert torch.equal(torch.get_rng_state(), state)
    weight, bias = distillation.adapters.parameters()
    assert sgd.param_groups[0]["params"][-2:] == [weight, bias]
    assert weight.shape == (6, 4)
    assert list(distillation.trained(START)) == [weight, bias]
    x = images()
    student.train().drop.eval()
    seen = student.relu(student.conv(student.stem(x)))
    wanted = teacher.eval().conv(teacher.stem(x))
    mapped = torch.einsum("nchw,tc->nthw", seen, weight) + bias.view(1, -1, 1, 1)
    assert torch.allclose(value, F.mse_loss(mapped, wanted), atol=1e-6)
    before = weight.detach().clone()
    value.backward()
    sgd.step()
    assert not torch.equal(weight, before)
    # The same by name and width on every process.
    again = Distillation(Distill(teacher, [FeatureMatching({"relu": "conv"})]), student)
    again.adapters.join(sgd)
    step(again, x)
    assert torch.equal(next(again.adapters.parameters()), before)


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 4), None), ((2, 7, 4), None), ((2, 4, 7), 1), ((2, 4, 3, 3, 3), None)]
)
def test_adapters_take_tokens_vectors_and_volumes(shape: tuple[int, ...], axis: int | None) -> None:
    from lightning_edge.distillation.adapters import Adapter
    from lightning_edge.distillation.shapes import channel_axis

    feature, adapter = torch.randn(*shape), Adapter("a", 4, 6)
    where = channel_axis(feature, axis)
    expected = torch.einsum("n...c,tc->n...t", feature.movedim(where, -1), adapter.weight).movedim(-1, where)
    assert torch.allclose(adapter(feature, where), expected, atol=1e-6)


def test_an_adapter_follows_a_cut_with_its_optimizer_state() -> None:
    student, teacher = seeded(Net, 0), seeded(Net, 1, 6)
    distillation = Distillation(Distill(teacher, [FeatureMatching({"conv": "conv", "relu": "relu"})]), student)
    adam = torch.optim.Adam(student.parameters())
    distillation.adapters.join(adam)
    step(distillation, images())["features"].backward()
    adam.step()
    weights = list(distillation.adapters.parameters())[::2]
    before = [(w.detach().clone(), adam.state[w]["exp_avg"].clone()) for w in weights]
    kept = torch.tensor([0, 2])
    cuts = {
        student.conv.weight: ((0, kept),),
        student.conv.bias: ((0, kept),),
        student.head.weight: ((1, kept),),
    }
    for parameter, indices in cuts.items():
        cut(parameter, indices)
    follow_all([adam], Succession(cut=cuts))
    distillation.set_network(student, Succession(cut=cuts))
    assert torch.equal(weights[0], before[0][0][:, kept])
    assert torch.equal(adam.state[weights[0]]["exp_avg"], before[0][1][:, kept])
    # What a ReLU kept is not told: its adapter is made anew, as the same parameter, when its width is seen.
    step(distillation, images())["features"].backward()
    assert weights[1].shape == weights[1].grad.shape == (6, 2)  # type: ignore[union-attr]
    assert weights[1] not in adam.state
    adam.step()
    assert adam.state[weights[1]]["exp_avg"].shape == (6, 2)


def test_adapters_come_back_from_their_state() -> None:
    student, teacher = seeded(Net, 0), seeded(Net, 1, 6)
    phase = Distill(teacher, [FeatureMatching(["conv"])])
    first = Distillation(phase, student)
    first.adapters.join(torch.optim.SGD(student.parameters(), 0.1))
    step(first, images())
    with torch.no_grad():
        next(first.adapters.parameters()).add_(1.0)
    second = Distillation(phase, student)
    second.load_state(first.state())
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    second.adapters.join(optimizer)
    for ours, theirs in zip(first.adapters.parameters(), second.adapters.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert optimizer.param_groups[0]["params"][-2:] == list(second.adapters.parameters())


# In the int8 phase.


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


# In a Trainer: against knowledge distillation written by hand into training_step.


class Task(L.LightningModule):
    """The user's module: nothing in it knows of distillation."""

    def __init__(self, manual: bool = False, output: str = "tensor", calls: int = 1) -> None:
        super().__init__()
        self.net = seeded(Net, 0)
        self.automatic_optimization = not manual
        self.output, self.calls = output, calls

    def task_loss(self, batch: list[Tensor]) -> Tensor:
        losses = []
        for _ in range(self.calls):
            logits = self.net(batch[0])
            losses.append(F.cross_entropy(logits, batch[1]) + self.extra(logits, batch[0]))
        return torch.stack(losses).sum() if self.calls > 1 else losses[0]

    def extra(self, logits: Tensor, x: Tensor) -> Any:
        return 0.0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if self.output == "none" and batch_idx % 2:
            return None
        loss = self.task_loss(batch)
        self.log("users_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            optimizer.step()  # type: ignore[union-attr]
            return None
        return {"loss": loss, "more": 1} if self.output == "dict" else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class ByHand(Task):
    """The same with distillation written into it."""

    def __init__(self, teacher: nn.Module, task_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._teacher = [teacher.eval().requires_grad_(False)]
        self.task_weight = task_weight

    def task_loss(self, batch: list[Tensor]) -> Tensor:
        if self.calls == 1:
            logits = self.net(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            return (loss if self.task_weight == 1 else loss * self.task_weight) + self.kl(logits, batch[0])
        return super().task_loss(batch)

    def extra(self, logits: Tensor, x: Tensor) -> Any:
        return self.kl(logits, x)

    def kl(self, logits: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._teacher[0](x)
        kl = F.kl_div(F.log_softmax(logits / 2, 1), F.softmax(wanted / 2, 1), reduction="batchmean")
        return 0.7 * (kl * 2**2)


class Compression(L.Callback):
    """As much of EdgeCompressionCallback as distillation needs."""

    def __init__(self, settings: Distill, phases: list[Phase] | None = None) -> None:
        self.wiring = DistillationWiring(settings, phases or [settings])
        self.saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.wiring.attach(trainer, pl_module, pl_module.net, self.saved)  # type: ignore[arg-type]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        done = (trainer.current_epoch + batch_idx / trainer.num_training_batches) / (trainer.max_epochs or 1)
        self.wiring.begin_step(Clock(trainer.current_epoch, done))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.wiring.before_optimizer_step(optimizer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["distillation"] = self.wiring.state()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["distillation"]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.wiring.detach(pl_module)


def loader(size: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (size,), generator=generator)
    # With a generator of its own, as a loader draws a number at each epoch, at a resumed one at another time.
    return DataLoader(TensorDataset(images(size), labels), batch_size=4, generator=generator)


def fit(module: L.LightningModule, *callbacks: L.Callback, **trainer: Any) -> L.Trainer:
    torch.manual_seed(11)
    ckpt_path = trainer.pop("ckpt_path", None)
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": checkpoints, **trainer}
    fitted = L.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    fitted.fit(module, loader(), ckpt_path=ckpt_path)
    return fitted


def difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.net.parameters(), second.net.parameters(), strict=True)  # type: ignore[union-attr]
    return max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("module", "trainer"),
    [
        ({}, {}),
        ({"output": "dict"}, {}),
        ({"output": "none"}, {}),
        ({"manual": True}, {}),
        ({"calls": 2}, {}),
        ({}, {"precision": "bf16-mixed"}),
        ({"manual": True}, {"precision": "bf16-mixed"}),
        ({}, {"precision": "bf16-true"}),
        ({}, {"accumulate_grad_batches": 4}),
        ({}, {"gradient_clip_val": 0.1}),
    ],
)
def test_equals_distillation_by_hand(module: dict[str, Any], trainer: dict[str, Any]) -> None:
    teacher = seeded(Net, 1, 6)
    hand, ours, plain = ByHand(copy.deepcopy(teacher), **module), Task(**module), Task(**module)
    if trainer.get("precision") == "bf16-true":
        hand._teacher[0].bfloat16()
    fit(hand, **trainer)
    fit(plain, **trainer)
    fit(ours, Compression(Distill(teacher, [KLDivergence(2.0, weight=0.7)])), **trainer)
    # Calls that add up are added in another order.
    assert difference(hand, ours) <= (1e-6 if module.get("calls") else 0)
    assert difference(plain, ours) > 1e-4


def test_task_weight_equals_the_weight_by_hand() -> None:
    teacher = seeded(Net, 1, 6)
    hand, ours = ByHand(copy.deepcopy(teacher), task_weight=0.3), Task()
    fit(hand)
    fit(ours, Compression(Distill(teacher, [KLDivergence(2.0, weight=0.7)], task_weight=0.3)))
    assert difference(hand, ours) == 0


def test_a_window_leaves_the_rest_of_training_as_it_was() -> None:
    class HalfByHand(ByHand):
        def kl(self, logits: Tensor, x: Tensor) -> Any:
            return super().kl(logits, x) if self.current_epoch == 1 else 0.0

    teacher = seeded(Net, 1, 6)
    hand, ours = HalfByHand(copy.deepcopy(teacher)), Task()
    fit(hand, max_epochs=3)
    fit(ours, Compression(Distill(teacher, [KLDivergence(2.0, weight=0.7)], start=1, end=2)), max_epochs=3)
    assert difference(hand, ours) == 0


def test_losses_are_logged_apart() -> None:
    class Remember(Compression):
        seen: dict[str, Tensor]

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.seen = dict(trainer.callback_metrics)

    teacher = seeded(Net, 1, 6)
    callback = Remember(Distill(teacher, [KLDivergence(2.0, weight=0.7), AttentionTransfer(["conv"])]))
    fit(Task(), callback)
    logged = callback.seen
    assert {"edge/task_loss", "edge/distill/kl", "edge/distill/attention", "users_loss"} <= set(logged)
    assert torch.equal(logged["edge/task_loss"], logged["users_loss_step"])
    assert float(logged["edge/distill/kl"]) > 0


def test_the_module_is_left_as_it_was_also_after_an_error() -> None:
    class Breaks(Task):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            if batch_idx == 2:
                raise KeyError("the user's own")
            return super().training_step(batch, batch_idx)

    callback = Compression(Distill(seeded(Net, 1)))
    module = Breaks()
    with pytest.raises(KeyError, match="the user's own"):
        fit(module, callback)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    callback.wiring.detach(module)
    assert "training_step" not in vars(module)
    module = Task(manual=True)
    module.manual_backward = users = lambda loss: loss.backward()  # type: ignore[method-assign, assignment]
    fit(module, Compression(Distill(seeded(Net, 1))))
    assert vars(module)["manual_backward"] is users
    assert "training_step" not in vars(module)
    assert list(module.state_dict()) == list(Task().state_dict())


def test_gradients_of_adapters_are_averaged_over_processes() -> None:
    """The trainer's reduction stands in for one over processes, which tests with real ones need seconds to start."""

    class Halved:
        world_size, optimizers = 2, ()

        class strategy:
            @staticmethod
            def reduce(gradient: Tensor, reduce_op: str) -> Tensor:
                assert reduce_op == "mean"
                return gradient / 2

    module, teacher = Task(), seeded(Net, 1, 6)
    losses = [FeatureMatching(["conv"]), FeatureMatching(["relu"], start=0.5)]
    wiring = DistillationWiring(Distill(teacher, losses), [])
    trainer: Any = Halved()
    sgd = torch.optim.SGD(module.parameters(), 0.1)
    trainer.optimizers = [sgd]
    wiring.attach(trainer, module, module.net, None)  # type: ignore[arg-type]
    distillation = wiring._distillation
    assert distillation is not None
    step(distillation, images(), clock=Clock(0, 0.5))
    wiring.begin_step(START)
    first, second, third, _ = distillation.adapters.parameters()
    first.grad = torch.ones_like(first)
    wiring.before_optimizer_step(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1))
    assert torch.equal(first.grad, torch.ones_like(first))
    wiring.before_optimizer_step(sgd)
    assert torch.equal(first.grad, torch.ones_like(first) / 2)
    assert torch.equal(second.grad, torch.zeros_like(second))  # type: ignore[arg-type]
    assert third.grad is None  # its loss has not begun
    wiring.detach(module)


def test_a_second_fit_is_not_wrapped_twice() -> None:
    teacher = seeded(Net, 1, 6)
    callback = Compression(Distill(teacher, [KLDivergence(2.0, weight=0.7)]))
    hand, ours = ByHand(copy.deepcopy(teacher)), Task()
    for _ in range(2):
        fit(hand)
        torch.manual_seed(11)
        fit(ours, callback)
    assert difference(hand, ours) == 0


def test_resuming_is_exact_with_adapters(tmp_path: Path) -> None:
    teacher = seeded(Net, 1, 6)

    def compression() -> Compression:
        return Compression(Distill(teacher, [FeatureMatching(["conv"]), KLDivergence(end=1)]))

    class Deterministic(Task):
        def on_train_epoch_start(self) -> None:
            torch.manual_seed(self.current_epoch)  # dropout

    whole, again = Deterministic(), Deterministic()
    callbacks = [compression(), compression()]
    fit(whole, callbacks[0], ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=3)
    path = tmp_path / "epoch=0.ckpt"
    assert list(torch.load(path, weights_only=True)["distillation"]["adapters"]) == ["features/conv"]
    resumed = fit(again, callbacks[1], max_epochs=3, ckpt_path=path)
    assert difference(whole, again) == 0
    states = [callback.wiring.state()["adapters"]["features/conv"] for callback in callbacks]
    assert torch.equal(states[0]["weight"], states[1]["weight"])
    parameters = resumed.optimizers[0].param_groups[0]["params"]
    assert len(parameters) == len(list(again.parameters())) + 2
    assert all(p in resumed.optimizers[0].state for p in parameters)


def test_manual_optimization_of_two_networks() -> None:
    """The student's loss is added where its gradients are on, and once."""

    class Adversarial(Task):
        def __init__(self) -> None:
            super().__init__(manual=True)
            self.judge = seeded(lambda: nn.Linear(3, 1), 2)
            self.grads: list[list[bool]] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            student, judge = self.optimizers()  # type: ignore[misc, union-attr]
            for optimizer, sign in ((judge, 1), (student, -1)):
                self.toggle_optimizer(optimizer)
                self.manual_backward(sign * self.judge(self.net(batch[0])).mean())
                self.grads.append([p.grad is not None for p in self.net.parameters()])
                optimizer.step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), 0.0) for net in (self.net, self.judge)]

    class Count(Compression):
        counted = 0

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.counted += "edge/distill/kl" in trainer.callback_metrics

    callback, module = Count(Distill(seeded(Net, 1))), Adversarial()
    fit(module, callback, limit_train_batches=2)
    assert callback.counted == 2
    assert [all(flags) for flags in module.grads] == [any(flags) for flags in module.grads] == [False, True] * 2


def test_a_step_around_the_network_is_refused() -> None:
    class Around(Task):
        def task_loss(self, batch: list[Tensor]) -> Tensor:
            return F.cross_entropy(self.net.forward(batch[0]), batch[1])

    class Eval(Task):
        def task_loss(self, batch: list[Tensor]) -> Tensor:
            self.net.eval()
            return super().task_loss(batch)

    for module in (Around(), Eval()):
        with pytest.raises(CompressionError, match="does not call the network as a whole in training mode"):
            fit(module, Compression(Distill(seeded(Net, 1))))


def test_a_backward_around_lightning_is_told() -> None:
    class Direct(Task):
        def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.task_loss(batch).backward()

    with pytest.warns(UserWarning, match="Call self.manual_backward"):
        fit(Direct(manual=True), Compression(Distill(seeded(Net, 1))), limit_train_batches=1)


# Teachers from files and import paths.


def test_a_teacher_from_a_checkpoint(tmp_path: Path) -> None:
    saved = Saved(6)
    path = tmp_path / "teacher.ckpt"
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(saved)
    trainer.save_checkpoint(path)
    spec = {"checkpoint": str(path), "class_path": f"{__name__}.Saved"}
    for teacher in (build_teacher(spec), build_teacher({**spec, "module": "net"}), build_teacher(saved)):
        assert isinstance(teacher, Net)
        assert torch.equal(teacher.head.weight, saved.net.head.weight)
    phase = Distill({**spec, "module": "net"})
    assert list(step(Distillation(phase, Net()), images())) == ["kl"]
    assert phase.settings()["teacher"]["checkpoint"] == "teacher.ckpt"
    with pytest.raises(CompressionError, match="no submodule 'nets'; its children: 'net'"):
        build_teacher({**spec, "module": "nets"})
    with pytest.raises(CompressionError, match=r"do not fit .*size mismatch.*init_args"):
        build_teacher({**spec, "init_args": {"width": 5}})
    # Bare weights, with the arguments given.
    torch.save(Net(6).state_dict(), path)
    assert build_teacher({"checkpoint": path, "class_path": f"{__name__}.Net", "init_args": {"width": 6}}) is not None
    torch.save({"state_dict": Net()}, path)
    with pytest.raises(CompressionError, match="cannot be read with weights_only=True"):
        build_teacher(spec)


def test_building_a_teacher_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    teacher = build_teacher({"class_path": f"{__name__}.Net", "init_args": {"width": 5}})
    assert teacher.head.in_features == 5  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"class_path": "nowhere.Net"}, "cannot be imported"),
        ({"class_path": "torch.nn.Nothing"}, "cannot be imported"),
        ({"class_path": "Net"}, "cannot be imported"),
        ({"class_path": f"{__name__}.NeedsArguments"}, "cannot be built"),
        ({"class_path": "builtins.dict"}, "is a dict; class_path must name an nn.Module"),
    ],
)
def test_a_teacher_that_cannot_be_built_is_refused(teacher: Any, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        build_teacher(teacher)


def test_builds_from_yaml() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--phases", type=list[Phase])
    here = "lightning_edge.distillation"
    config = f"""
    phases:
      - class_path: {here}.Distill
        init_args:
          teacher: {{class_path: {__name__}.Net, init_args: {{width: 6}}}}
          losses:
            - class_path: {here}.KLDivergence
              init_args: {{temperature: 2.0, weight: 0.5, end: 0.8}}
            - class_path: {here}.FeatureMatching
              init_args: {{layers: {{relu: conv}}, start: 2}}
          end: 0.9
      - class_path: {here}.Distill
        init_args: {{teacher: {{checkpoint: a.ckpt, class_path: {__name__}.Saved, module: net}}}}
      - class_path: {here}.Distill
        init_args: {{teacher: self, temperature: 2}}
    """
    built, from_file, from_self = parser.instantiate_classes(parser.parse_string(config)).phases
    assert isinstance(built.teacher, Net)
    assert built.teacher.head.in_features == 6
    assert [type(loss) for loss in built.losses] == [KLDivergence, FeatureMatching]
    assert (built.losses[0].temperature, built.losses[0].end, built.losses[1].start, built.end) == (2.0, 0.8, 2, 0.9)
    assert from_file.teacher == {"checkpoint": "a.ckpt", "class_path": f"{__name__}.Saved", "module": "net"}
    assert from_self.from_self
    settings = built.settings()
    assert settings["losses"][0]["temperature"] == 2.0
    assert settings["losses"][1]["layers"] == {"relu": "conv"}
    assert settings["teacher"] == f"{__name__}.Net"


# The phase, and what it refuses.


def test_the_phase_begins_and_ends() -> None:
    phase, net = Distill(Net(), start=0.25, end=0.5), Net()
    changes: list[Any] = []

    def due(clock: Clock) -> Any:
        change = phase.plan(net, clock, changes, None)  # type: ignore[arg-type]
        if change is not None:
            assert not phase.perform(net, change)
            phase.undo(net, change)
            changes.append(change)
        return change

    assert due(Clock(0, 0.2)) is None
    begin = due(Clock(1, 0.25))
    assert begin == {"kind": "begin", "epoch": 1, "progress": 0.25}
    assert phase.describe(begin) == "learning from Net by KLDivergence"
    assert due(Clock(1, 0.4)) is None
    end = due(Clock(2, 0.5))
    assert end["kind"] == "end"
    assert phase.describe(end) == "the teacher left"
    assert due(Clock(3, 0.9)) is None
    assert (phase.first_moment(), phase.last_moment()) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": "me"}, "'self'"),
        ({"teacher": None}, "is no teacher"),
        ({"teacher": {"checkpoint": "a.ckpt"}}, "no class_path"),
        ({"teacher": {"class_path": "a.B", "args": 1}}, r"unknown keys \['args'\]"),
        ({"start": -1}, "not a moment"),
        ({"start": 0.5, "end": 0.25}, "comes before"),
        ({"losses": []}, "compares nothing"),
        ({"losses": [nn.MSELoss()]}, "no DistillationLoss"),
        ({"losses": [LogitsMSE()], "temperature": 2.0}, "KLDivergence"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"task_weight": -1.0}, "must be 0 or more"),
        ({"losses": [LogitsMSE(start=0.1)], "start": 0.2}, "LogitsMSE's start"),
        ({"losses": [LogitsMSE(end=0.6)], "end": 0.5}, "LogitsMSE's end"),
        ({"losses": [LogitsMSE(end=0.1)], "start": 0.2}, "LogitsMSE's end"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distill(**{"teacher": Net(), **arguments})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KLDivergence(temperature=-1.0), "must be above 0"),
        (lambda: LogitsMSE(weight=0.0), "must be above 0"),
        (lambda: LogitsMSE(weight=float("nan")), "must be above 0"),
        (lambda: LogitsMSE(start=0.5, end=0.1), "comes before"),
        (lambda: LogitsMSE(start=1.5), "not a moment"),
        (lambda: DIST(beta=0.0, gamma=0.0), "not both 0"),
        (lambda: DIST(beta=-1.0), "not be negative"),
        (lambda: FeatureMatching([]), "names no layers"),
        (lambda: AttentionTransfer("conv"), "names no layers"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_of_losses_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_self_distillation_asks_for_a_quantization_before_its_end() -> None:
    with pytest.raises(ValueError, match="no Quantize among the phases"):
        DistillationWiring(Distill("self"), [Distill("self")])
    with pytest.raises(ValueError, match="Distill's end"):
        DistillationWiring(Distill("self", end=0.5), [Quantize(start=0.7)])
    DistillationWiring(Distill("self"), [Quantize(start=0.7)])
    DistillationWiring(Distill(Net()), [])


@pytest.mark.parametrize(
    ("student", "teacher", "losses", "x", "message"),
    [
        (Net(), nn.Linear(6, 3), [LogitsMSE()], images(), r"the student's \(8, 3\) with the teacher's \(8, 1, 6, 3\)"),
        (Net(), Net(), [FeatureMatching(["conv", "nope"])], images(), "Net has no layer 'nope'; it has: 'stem'"),
        (Net(), Net(), [FeatureMatching({"conv": "nope"})], images(), "Net has no layer 'nope'; it has: 'stem'"),
        (Net(), Net(), [FeatureMatching({"conv": "head"})], images(), "differ in more than channels"),
        (Net(), Net(6), [FeatureMatching(["conv"])], images(), "no optimizer to train the adapter"),
        (Heads(), Heads(), [LogitsMSE()], torch.ones(2, 6), "the loss names none; there is: 'label', 'value'"),
        (Heads(), Heads(), [LogitsMSE(output="labels")], torch.ones(2, 6), "no output 'labels'; there is: 'label'"),
        (nn.LSTM(6, 3), nn.LSTM(6, 3), [LogitsMSE(output=2)], torch.ones(2, 6), "no output 2"),
        (
            nn.Sequential(nn.LSTM(6, 3)),
            nn.Sequential(nn.LSTM(6, 3)),
            [FeatureMatching(["0"])],
            torch.ones(2, 6),
            "layer '0' returns 3 tensors",
        ),
        (nn.Linear(6, 3), nn.Bilinear(6, 6, 3), [LogitsMSE()], torch.ones(2, 6), "does not take what training_step"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    student: nn.Module, teacher: nn.Module, losses: list[DistillationLoss], x: Tensor, message: str
) -> None:
    with pytest.raises(CompressionError, match=message):
        step(Distillation(Distill(teacher, losses), student.train()), x)


def test_layers_that_are_called_unequally_often_are_refused() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.conv(self.relu(self.conv(self.stem(x)))))
            logits: Tensor = self.head(x.mean((2, 3)))
            return logits

    with pytest.raises(CompressionError, match=r"'relu', called 1 times, with the teacher's 'relu', called 2 times"):
        step(Distillation(Distill(Twice(), [FeatureMatching(["relu"])]), Net()), images())
    value = step(Distillation(Distill(Twice(), [FeatureMatching(["relu"])]), Twice()), images())["features"]
    assert torch.isfinite(value)


def test_shapes_without_classes_or_positions_are_refused() -> None:
    with pytest.raises(CompressionError, match="no dimension 1 of classes"):
        KLDivergence().compare(torch.zeros(4), torch.zeros(4))
    with pytest.raises(CompressionError, match="has no positions"):
        AttentionTransfer(["head"]).compare(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(CompressionError, match="no dimension 5 of channels"):
        FeatureMatching(["head"], channel_dim=5).compare(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(CompressionError, match="differ in more than channels"):
        FeatureMatching(["head"]).compare(torch.zeros(4, 5, 3), torch.zeros(4, 6, 3))
