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


class Depthwise(nn.Module):
    """Depthwise separable layers with ReLU6, as in the MobileNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.separable = nn.Sequential(
            nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            nn.Conv2d(16, 32, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU6(),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.separable(self.stem(images)))
        return logits


class Flattened(nn.Module):
    """Plain convolutions whose feature map, not its average, goes into linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


class WideResidual(nn.Module):
    """Two residual blocks, one with a projection in the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.first = self._branch(16, 16, 1)
        self.second = self._branch(16, 32, 2)
        self.shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
        self.head = nn.Linear(32, 5)

    @staticmethod
    def _branch(channels: int, filters: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, filters, 3, stride, 1, bias=False),
            nn.BatchNorm2d(filters),
            nn.ReLU(),
            nn.Conv2d(filters, filters, 3, padding=1, bias=False),
            nn.BatchNorm2d(filters),
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = torch.relu(features + self.first(features))
        features = torch.relu(self.shortcut(features) + self.second(features))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class Dense(nn.Module):
    """Each layer reads everything before it, concatenated, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, bias=False))
        self.second = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1, bias=False))
        self.norm = nn.BatchNorm2d(48)
        self.head = nn.Linear(48, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = torch.cat([features, self.first(features)], dim=1)
        features = torch.cat([features, self.second(features)], dim=1)
        logits: Tensor = self.head(torch.relu(self.norm(features)).mean((2, 3)))
        return logits


class Grouped(nn.Module):
    """A convolution in four groups between two plain ones, as in ResNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=4, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(images).mean((2, 3)))
        return logits


class Shared(nn.Module):
    """One convolution called twice, and two linear layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.again = nn.Conv2d(16, 16, 3, padding=1)
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU())
        self.left, self.right = nn.Linear(32, 16), nn.Linear(32, 16)
        self.right.weight = self.left.weight
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = torch.relu(self.again(torch.relu(self.again(features))))
        pooled = self.expand(features).mean((2, 3))
        logits: Tensor = self.head(torch.relu(self.left(pooled) + self.right(pooled)))
        return logits


class Transposed(nn.Module):
    """Down by a convolution, up by a transposed one: a small autoencoder of images."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
        )
        self.up = nn.Sequential(nn.ConvTranspose2d(32, 16, 2, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        reconstruction: Tensor = self.head(self.up(self.down(images)))
        return reconstruction


class Attention(nn.Module):
    """A transformer block in plain layers: LayerNorm, attention of two heads, and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.embed = nn.Linear(12, 16)
        self.before, self.between = nn.LayerNorm(16), nn.LayerNorm(16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.project = nn.Linear(16, 16)
        self.feed = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16))
        self.head = nn.Linear(16, 5)

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(tokens.shape[0], tokens.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.embed(tokens)
        normal = self.before(tokens)
        query, key, value = (self._split(layer(normal)) for layer in (self.query, self.key, self.value))
        scores = torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1)
        attended = (scores @ value).transpose(1, 2).flatten(2)
        tokens = tokens + self.project(attended)
        tokens = tokens + self.feed(self.between(tokens))
        logits: Tensor = self.head(tokens.mean(1))
        return logits


class Recurrent(nn.Module):
    """A linear layer per time step, a GRU over the steps, and two linear layers on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 8), nn.ReLU())
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 5))

    def forward(self, steps: Tensor) -> Tensor:
        outputs, _ = self.recurrent(self.embed(steps))
        logits: Tensor = self.head(outputs[:, -1])
        return logits


class SqueezeExcite(nn.Module):
    """Channels weighed by what their averages say, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.Hardswish())
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.Hardsigmoid()
        )
        self.mix = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32), nn.Hardswish())
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = self.mix(features * self.weigh(features))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


# One tiny network for each way in which channels hang together; round_to=8 cuts them all.
ARCHITECTURES: dict[str, Model] = {
    "plain": Model(Flattened, _images(3, 8)),
    "residual": Model(WideResidual, _images(3, 8)),
    "depthwise": Model(Depthwise, _images(3, 8)),
    "dense": Model(Dense, _images(3, 8)),
    "grouped": Model(Grouped, _images(3, 8)),
    "shared": Model(Shared, _images(3, 8)),
    "transposed": Model(Transposed, _images(3, 8)),
    "attention": Model(Attention, lambda batch: Inputs((torch.randn(batch, 6, 12),))),
    "recurrent": Model(Recurrent, lambda batch: Inputs((torch.randn(batch, 6, 12),))),
    "squeeze_excite": Model(SqueezeExcite, _images(3, 8)),
}
