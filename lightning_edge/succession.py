"""What becomes of parameters when a network changes its structure, and optimizers that follow. Knows torch only.

A parameter that loses channels stays the same object with fewer elements, so that everything that holds it (optimizer
groups, the user's own references, hooks) goes on. A parameter that makes way for others is replaced in its group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_edge.errors import CompressionError

# Dimension and the indices kept in it, ascending; several, each of another dimension.
Kept = Sequence[tuple[int, Tensor]]


@dataclass(frozen=True)
class Succession:
    """What became of the parameters that a change touched.

    Attributes:
        cut: For each parameter that lost channels, as the same object, the indices it kept.
        replaced: For each parameter that is gone, those that take its place in the optimizer; none: it just leaves.
    """

    cut: Mapping[nn.Parameter, Kept] = field(default_factory=dict)
    replaced: Mapping[nn.Parameter, Sequence[nn.Parameter]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether any parameter was touched."""
        return bool(self.cut) or bool(self.replaced)


def select(tensor: Tensor, kept: Kept) -> Tensor:
    """Copy what is kept of a tensor; dimensions of size one, over which something was shared or reduced, stay."""
    for dimension, indices in kept:
        if tensor.shape[dimension] != 1 or indices.numel() == 1:
            tensor = tensor.index_select(dimension, indices.to(tensor.device))
    return tensor


def resize(parameter: nn.Parameter, data: Tensor, gradient: Tensor | None = None) -> None:
    """Give a parameter other data, of any shape, and a gradient; it stays the same object."""
    parameter.grad = None
    # A node of autograd that is still alive, in a loss that somebody kept, remembers the old shape and would refuse
    # the next gradient. Only a change of type makes the parameter forget it (torch's set_data).
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data
    parameter.grad = gradient


def cut(parameter: nn.Parameter, kept: Kept) -> None:
    """Take channels out of a parameter and of its accumulated gradient, in place."""
    gradient = parameter.grad
    resize(parameter, select(parameter.data, kept), None if gradient is None else select(gradient, kept))


def follow(optimizer: torch.optim.Optimizer, succession: Succession) -> None:
    """Bring an optimizer over a change: same object, groups and settings; the state of kept channels bit by bit.

    Every state tensor of the parameter's shape is cut as the parameter was (momentum, exp_avg, exp_avg_sq, ...), one
    with dimensions reduced to size one (Adafactor) in the others; counters stay. Parameters that take another's place
    begin without state, in its group.

    Raises:
        CompressionError: If the optimizer keeps state of another shape, which cannot be cut by channel.
    """
    for group in optimizer.param_groups:
        # An optimizer that was given named parameters keeps the names beside them.
        names = group.get("param_names", group["params"])
        members: list[tuple[Any, nn.Parameter]] = []
        for name, parameter in zip(names, group["params"], strict=True):
            successors = succession.replaced.get(parameter)
            if successors is None:
                members.append((name, parameter))
                continue
            for index, successor in enumerate(successors):
                members.append((name if successor is parameter else f"{name}.{index}", successor))
            if optimizer.state.pop(parameter, None) and _needs_momentum(optimizer, group):
                optimizer.state.update({new: {"momentum_buffer": torch.zeros_like(new)} for new in successors})
        group["params"][:] = [parameter for _, parameter in members]
        if "param_names" in group:
            group["param_names"][:] = [name for name, _ in members]
        for _, parameter in members:
            if parameter in succession.cut and parameter in optimizer.state:
                _cut_state(optimizer, parameter, succession.cut[parameter])


def _needs_momentum(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether torch's kernel takes the momentum of all parameters or of none; zeros are then a fresh start."""
    return isinstance(optimizer, torch.optim.SGD) and bool(group.get("fused")) and group["momentum"] != 0


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that cannot be brought over a change, before anything is changed.

    Raises:
        CompressionError: If it is LBFGS, which keeps one flat history of all parameters.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise CompressionError(
            "LBFGS keeps one flat history of all parameters, which cannot be cut by channel. Use an optimizer with "
            "state of each parameter's shape (SGD, Adam, AdamW, RMSprop, ...), or leave out Prune and Factorize."
        )


def _cut_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kept: Kept) -> None:
    state: dict[str, Any] = optimizer.state[parameter]
    indices = dict(kept)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue  # a counter
        # What the size was before: unknown here for kept dimensions, but the last index must lie within.
        fits = value.dim() == parameter.dim() and all(
            size == 1 or (size > int(indices[d].max()) if d in indices else size == parameter.shape[d])
            for d, size in enumerate(value.shape)
        )
        if not fits:
            raise CompressionError(
                f"{type(optimizer).__name__} keeps {name!r} of shape {tuple(value.shape)} for a parameter that was cut "
                f"to {tuple(parameter.shape)}, and it is not known how to cut that by channel. Use an optimizer whose "
                "state has the parameter's shape (SGD, Adam, AdamW, RMSprop, Adagrad, Adafactor, ...)."
            )
        state[name] = select(value, kept)


def follow_all(optimizers: Iterable[torch.optim.Optimizer], succession: Succession) -> None:
    """Bring every optimizer over a change."""
    if succession:
        for optimizer in optimizers:
            follow(optimizer, succession)
