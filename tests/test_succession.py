"""Parameters that are cut or replaced, and what optimizers make of it: kept state bit by bit, order, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.succession import Succession, cut, follow, select

KEPT = [(0, torch.tensor([0, 2, 5])), (1, torch.tensor([1, 3]))]


def loss(weight: Tensor) -> Tensor:
    return (weight.sin() * torch.arange(weight.numel()).view_as(weight)).sum()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "sgd nesterov": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "adam foreach": lambda p: torch.optim.Adam(p, 1e-2, foreach=True),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_of_kept_channels_is_bitwise_the_same(name: str) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = OPTIMIZERS[name]([weight])
    for _ in range(3):
        optimizer.zero_grad()
        loss(weight).backward()
        optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[weight].items() if isinstance(value, Tensor)}
    values, gradient = weight.detach().clone(), weight.grad
    assert gradient is not None
    cut(weight, KEPT)
    follow(optimizer, Succession(cut={weight: KEPT}))
    rows, columns = KEPT[0][1], KEPT[1][1]
    assert torch.equal(weight, values[rows][:, columns])
    assert weight.grad is not None
    assert torch.equal(weight.grad, gradient[rows][:, columns])
    assert list(optimizer.state) == [weight]
    for key, value in optimizer.state[weight].items():
        expected = before[key]
        if expected.dim() == 2:
            expected = expected[rows] if expected.shape[0] == 6 else expected
            expected = expected[:, columns] if expected.shape[1] == 4 else expected
        assert torch.equal(value, expected), key
    optimizer.zero_grad()
    loss(weight).backward()
    optimizer.step()


def test_a_loss_that_somebody_kept_does_not_hinder_the_next_backward() -> None:
    weight = nn.Parameter(torch.randn(6, 4))
    seen: list[torch.Size] = []
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.shape))  # type: ignore[union-attr, arg-type]
    kept_alive = loss(weight)
    kept_alive.backward()
    cut(weight, KEPT)
    loss(weight).backward()
    assert seen == [(6, 4), (3, 2)]


def test_successors_take_the_place_of_the_parameter_in_its_group() -> None:
    first, gone, last = (nn.Parameter(torch.randn(2, 2)) for _ in range(3))
    named = [("first", first), ("gone", gone), ("last", last)]
    optimizer = torch.optim.AdamW([{"params": named, "weight_decay": 0.1}], 1e-2)
    sum(loss(p) for p in (first, gone, last)).backward()  # type: ignore[union-attr]
    optimizer.step()
    new = [nn.Parameter(torch.randn(2, 1)), nn.Parameter(torch.randn(1, 2))]
    follow(optimizer, Succession(replaced={gone: new}))
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in (first, *new, last)]
    assert group["param_names"] == ["first", "gone.0", "gone.1", "last"]
    assert group["weight_decay"] == 0.1
    assert {id(p) for p in optimizer.state} == {id(first), id(last)}
    optimizer.load_state_dict(optimizer.state_dict())


def test_state_that_cannot_be_cut_by_channel_is_refused() -> None:
    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = torch.optim.LBFGS([weight])

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (weight**2).sum()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    cut(weight, KEPT)
    with pytest.raises(CompressionError, match=r"LBFGS keeps .* by channel. Use an optimizer"):
        follow(optimizer, Succession(cut={weight: KEPT}))


def test_select_leaves_dimensions_of_size_one() -> None:
    assert torch.equal(select(torch.arange(4.0).view(1, 4), KEPT), torch.tensor([[1.0, 3.0]]))
    assert not Succession()
