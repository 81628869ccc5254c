"""Distillation without a Trainer: the teacher beside the student, and features with their adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from distilled import START, Heads, Net, SquaredNorms, images, seeded, step
from torch import nn
from torch.nn import functional as F

from lightning_edge.distillation import (
    Distill,
    Distillation,
    FeatureMatching,
    KLDivergence,
    LogitsMSE,
)
from lightning_edge.distillation.outputs import select_output
from lightning_edge.errors import CompressionError
from lightning_edge.schedule import Clock
from lightning_edge.succession import Succession, cut, follow_all

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("error:::lightning_edge", "error::lightning_edge.user_warnings.EdgeWarning"),
]


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
