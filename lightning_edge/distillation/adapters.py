"""Trained maps from a student's channels to a teacher's, outside of the network and in its optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_edge.errors import CompressionError
from lightning_edge.succession import Succession, cut, follow, resize

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Adapter(nn.Module):
    """A linear map of a feature's channels: a 1x1 convolution, whatever the number of dimensions.

    Its first weights depend on its name and widths alone: the same on every process, without a number drawn from
    torch's random state.

    Args:
        name: What to draw the weights by.
        student_width: Channels in.
        teacher_width: Channels out.
    """

    def __init__(self, name: str, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(self._drawn(student_width, teacher_width))
        self.bias = nn.Parameter(torch.zeros(teacher_width))

    def forward(self, feature: Tensor, axis: int) -> Tensor:
        """Map the channels in dimension ``axis`` of a feature."""
        if axis == feature.dim() - 1:
            return F.linear(feature, self.weight, self.bias)
        if axis == 1 and feature.dim() in _CONVOLUTIONS:
            weight = self.weight.view(*self.weight.shape, *[1] * (feature.dim() - 2))
            mapped: Tensor = _CONVOLUTIONS[feature.dim()](feature, weight, self.bias)
            return mapped
        return F.linear(feature.movedim(axis, -1), self.weight, self.bias).movedim(-1, axis)

    @property
    def student_width(self) -> int:
        """Channels in."""
        return self.weight.shape[1]

    @property
    def teacher_width(self) -> int:
        """Channels out."""
        return self.weight.shape[0]

    def remake(self, student_width: int) -> None:
        """Begin anew for another number of channels, as the same parameters."""
        fresh = self._drawn(student_width, self.teacher_width)
        resize(self.weight, fresh.to(self.weight.device, self.weight.dtype))
        resize(self.bias, torch.zeros_like(self.bias))

    def _drawn(self, student_width: int, teacher_width: int) -> Tensor:
        digest = hashlib.sha256(f"{self.name} {student_width} {teacher_width}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bound = student_width**-0.5
        return torch.empty(teacher_width, student_width).uniform_(-bound, bound, generator=generator)


class Adapters:
    """Every adapter of a training, by name, and the optimizer that trains them.

    Args:
        like: The network, whose device and float type they take.
    """

    def __init__(self, like: nn.Module) -> None:
        self._like = like
        self._adapters: dict[str, Adapter] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    def adapt(self, name: str, feature: Tensor, axis: int, teacher_width: int) -> Tensor:
        """Give a feature the teacher's width; one that has it already and has no adapter yet stays as it is.

        Raises:
            CompressionError: If a new adapter has no optimizer to be trained by.
        """
        width = feature.shape[axis]
        adapter = self._adapters.get(name)
        if adapter is None:
            if width == teacher_width:
                return feature
            adapter = self._add(Adapter(name, width, teacher_width))
            self._join([adapter])
        elif adapter.student_width != width:
            # Which of its channels the network kept is not known, or it would have been cut with them.
            adapter.remake(width)
            self._forget(adapter)
        mapped: Tensor = adapter(feature, axis)
        return mapped

    def join(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Let an optimizer train what is there and what will come: last in its first group."""
        self._optimizer = optimizer
        self._join(list(self._adapters.values()))

    def cut(self, name: str, kept: Tensor) -> None:
        """Follow a student layer that kept these channels, with the optimizer's state."""
        adapter = self._adapters.get(name)
        if adapter is None or int(kept.max()) >= adapter.student_width:
            return
        indices = ((1, kept),)
        cut(adapter.weight, indices)
        if self._optimizer is not None:
            follow(self._optimizer, Succession(cut={adapter.weight: indices}))

    def parameters(self, prefixes: Sequence[str] = ("",)) -> Iterator[nn.Parameter]:
        """Every parameter of the adapters whose names begin so, in the order in which the optimizer has them."""
        for name, adapter in self._adapters.items():
            if name.startswith(tuple(prefixes)):
                yield from adapter.parameters()

    def trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether there are adapters, and this optimizer trains them."""
        return bool(self._adapters) and optimizer is self._optimizer

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Give weights and biases by name, as copies on the CPU."""
        return {
            name: {key: value.detach().cpu().clone() for key, value in adapter.named_parameters()}
            for name, adapter in self._adapters.items()
        }

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make the adapters of a checkpoint, in their order."""
        self._adapters = {}
        for name, values in state.items():
            adapter = self._add(Adapter(name, values["weight"].shape[1], values["weight"].shape[0]))
            with torch.no_grad():
                adapter.weight.copy_(values["weight"])
                adapter.bias.copy_(values["bias"])

    def _add(self, adapter: Adapter) -> Adapter:
        like = next((p for p in self._like.parameters() if p.is_floating_point()), None)
        if like is not None:
            adapter.to(like.device, like.dtype)
        self._adapters[adapter.name] = adapter
        return adapter

    def _join(self, adapters: list[Adapter]) -> None:
        if not adapters:
            return
        if self._optimizer is None:
            raise CompressionError(
                f"the features of {adapters[0].name!r} differ in width from the teacher's, and there is no optimizer "
                "to train the adapter between them; return one from configure_optimizers, or name layers of one width"
            )
        group: dict[str, Any] = self._optimizer.param_groups[0]
        for adapter in adapters:
            for name, parameter in adapter.named_parameters():
                group["params"].append(parameter)
                if "param_names" in group:  # it was given named parameters
                    group["param_names"].append(f"{adapter.name}.{name}")

    def _forget(self, adapter: Adapter) -> None:
        if self._optimizer is not None:
            for parameter in adapter.parameters():
                self._optimizer.state.pop(parameter, None)
