"""One table of tiny networks, each with what it is fed: a new phase or target is covered by running over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_edge.network import Inputs
from lightning_edge.zoo.networks import Autoencoder, DigitsCNN, MobileNetV2, MobileNetV3Small


@dataclass(frozen=True)
class Model:
    """A network and a way to make one call of it.

    Attributes:
        build: Makes the network with fresh weights; seed torch first for the same ones.
        inputs: Makes the arguments of a call with this many samples.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]


class Plain(nn.Module):
    """Convolutions with BatchNorm, a ReLU6, dropout and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8, eps=1e-3, momentum=0.03),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
            nn.BatchNorm2d(8, eps=1e-3, momentum=0.03),
            nn.ReLU6(),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(32, 5))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


class Residual(nn.Module):
    """Two branches that are added, one with an odd padding, and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8))
        self.shortcut = nn.Conv2d(8, 8, 1, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = torch.relu(self.branch(features) + self.shortcut(features))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class TwoInputs(nn.Module):
    """An image and a vector, the vector by keyword, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.join = nn.Sequential(nn.Linear(8 + 4, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, images: Tensor, *, extra: Tensor) -> Tensor:
        logits: Tensor = self.join(torch.cat([self.look(images).flatten(1), extra], dim=1))
        return logits


class DictOutput(nn.Module):
    """Two heads, returned by name."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.label = nn.Linear(16, 3)
        self.value = nn.Linear(16, 1)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(features)
        return {"label": self.label(hidden), "value": self.value(hidden)}


def _images(channels: int, size: int) -> Callable[[int], Inputs]:
    return lambda batch: Inputs((torch.randn(batch, channels, size, size),))


MODELS: dict[str, Model] = {
    "plain": Model(Plain, _images(3, 8)),
    "residual": Model(Residual, _images(3, 8)),
    "two_inputs": Model(
        TwoInputs, lambda batch: Inputs((torch.randn(batch, 3, 8, 8),), {"extra": torch.randn(batch, 4)})
    ),
    "dict_output": Model(DictOutput, lambda batch: Inputs((torch.randn(batch, 6),))),
    "digits": Model(DigitsCNN, _images(1, 8)),
    "autoencoder": Model(Autoencoder, lambda batch: Inputs((torch.randn(batch, 640),))),
    "mobilenet_v2": Model(lambda: MobileNetV2(width=0.1), _images(3, 32)),
    "mobilenet_v3": Model(lambda: MobileNetV3Small(width=0.1), _images(3, 32)),
}
