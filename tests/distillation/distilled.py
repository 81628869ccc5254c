"""Networks that tests of distillation share, and one step of a distillation without a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_edge.distillation import (
    Distillation,
    DistillationLoss,
)
from lightning_edge.schedule import Clock

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
