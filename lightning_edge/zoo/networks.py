"""Reference networks: the four of MLPerf Tiny, ResNet-56, two of the MobileNet family, and a small one for digits.

The MLPerf Tiny ones follow the Keras models they were published as. Two points decide whether their weights give
their published accuracy: every convolution has a bias and BatchNorm an epsilon of 1e-3, and "same" padding at
stride 2 puts the odd row and column behind the image, not before it, which ``padding=1`` does not.
None ends in a softmax: they give logits.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

_Norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


def _convolution(channels: int, filters: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution with bias and TensorFlow's "same" padding, for an even input where the stride is 2."""
    missing = max(kernel - stride, 0)
    if missing % 2 == 0:
        return [nn.Conv2d(channels, filters, kernel, stride, missing // 2, groups=groups)]
    before, after = missing // 2, missing - missing // 2
    pad = nn.ZeroPad2d((before, after, before, after))
    return [pad, nn.Conv2d(channels, filters, kernel, stride, groups=groups)]


def _normalized(channels: int, filters: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [*_convolution(channels, filters, kernel, stride, groups), _Norm(filters), nn.ReLU()]


def _separable(channels: int, filters: int, stride: int = 1) -> list[nn.Module]:
    return [*_normalized(channels, channels, 3, stride, groups=channels), *_normalized(channels, filters, 1)]


class _Residual(nn.Module):
    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_normalized(channels, filters, 3, stride))
        self.second = nn.Sequential(*_convolution(filters, filters))
        # Registered before the last BatchNorm: Keras counts the layers in this order.
        self.shortcut = nn.Conv2d(channels, filters, 1, stride) if stride > 1 else nn.Identity()
        self.norm = _Norm(filters)
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.relu(self.norm(self.second(self.first(images))) + self.shortcut(images))
        return features


class _ResNet(nn.Module):
    """Three stages of residual blocks on images of 32 pixels, each at half the size of the one before."""

    def __init__(self, width: int, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_normalized(3, width))
        plan = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        self.stages = nn.Sequential(
            *[
                _Residual(filters if block else channels, filters, 1 if block else stride)
                for channels, filters, stride in plan
                for block in range(blocks)
            ]
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Classify images (N, 3, 32, 32), values 0..255."""
        logits: Tensor = self.head(self.stages(self.stem(images)))
        return logits


class ResNet8(_ResNet):
    """MLPerf Tiny's image classification network (``ic01``; with ``width=40`` ``ic02``).

    Maps images (N, 3, 32, 32) with values 0..255, not normalized, to logits (N, ``num_classes``).

    Args:
        width: Filters of the first stage; the second and third have twice and four times as many.
        num_classes: Number of logits.
    """

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__(width, 1, num_classes)


class ResNet56(_ResNet):
    """ResNet-56 for CIFAR-10 (He et al. 2015, arXiv:1512.03385): nine residual blocks in each of three stages.

    Where the size changes, the shortcut is a 1x1 convolution (their option B; theirs for CIFAR pads with zeros).
    Maps images (N, 3, 32, 32) with values 0..255, not normalized, to logits (N, ``num_classes``).

    Args:
        width: Filters of the first stage; the second and third have twice and four times as many.
        num_classes: Number of logits.
    """

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__(width, 9, num_classes)


class DSCNN(nn.Sequential):
    """MLPerf Tiny's keyword spotting network (``kws01``): features (N, 1, 49, 10) to logits (N, ``num_classes``).

    Args:
        width: Channels of every layer.
        num_classes: Number of logits.
    """

    def __init__(self, width: int = 64, num_classes: int = 12) -> None:
        # 49 rows are odd, so "same" puts 4 rows before and 5 behind.
        super().__init__(
            nn.ZeroPad2d((1, 1, 4, 5)),
            nn.Conv2d(1, width, (10, 4), 2),
            _Norm(width),
            nn.ReLU(),
            nn.Dropout(0.2),
            *[layer for _ in range(4) for layer in _separable(width, width)],
            nn.Dropout(0.4),
            nn.AvgPool2d((24, 5)),  # drops the last of 25 rows, as the reference does
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )


class MobileNetV1(nn.Sequential):
    """MLPerf Tiny's visual wake words network (``vww01``).

    Maps images (N, 3, 96, 96) with values 0..1 to logits (N, ``num_classes``).

    Args:
        width: Multiplier of every layer's channels.
        num_classes: Number of logits.
    """

    def __init__(self, width: float = 0.25, num_classes: int = 2) -> None:
        plan = [(1, 64), (2, 128), (1, 128), (2, 256), (1, 256), (2, 512), *[(1, 512)] * 5, (2, 1024), (1, 1024)]
        channels = int(32 * width)
        layers = _normalized(3, channels, 3, 2)
        for stride, filters in plan:
            layers += _separable(channels, int(filters * width), stride)
            channels = int(filters * width)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class Autoencoder(nn.Sequential):
    """MLPerf Tiny's anomaly detection network (``ad01``): features (N, 640) to their reconstruction (N, 640)."""

    def __init__(self) -> None:
        sizes = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs, eps=1e-3, momentum=0.01), nn.ReLU()]
        super().__init__(*layers, nn.Linear(128, 640))


class DigitsCNN(nn.Sequential):
    """A network of 12,000 parameters for 8x8 digits: images (N, 1, 8, 8) to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__(
            *_small(1, 16),
            *_small(16, 32),
            nn.MaxPool2d(2),
            *_small(32, 16),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(16 * 4 * 4, 10),
        )


def _small(channels: int, filters: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]


def _rounded(channels: float) -> int:
    """The multiple of 8 nearest to ``channels``, never more than a tenth below it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = _rounded(channels / 4)
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, images: Tensor) -> Tensor:
        weights: Tensor = self.weigh(images)
        return images * weights


class _InvertedResidual(nn.Module):
    def __init__(
        self,
        channels: int,
        expanded: int,
        filters: int,
        stride: int,
        activation: type[nn.Module],
        kernel: int = 3,
        squeeze: bool = False,
        norm: partial[nn.BatchNorm2d] = _Norm,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if expanded != channels:
            layers += [nn.Conv2d(channels, expanded, 1, bias=False), norm(expanded), activation()]
        depthwise = nn.Conv2d(expanded, expanded, kernel, stride, kernel // 2, groups=expanded, bias=False)
        layers += [depthwise, norm(expanded), activation()]
        if squeeze:
            layers.append(_SqueezeExcite(expanded))
        layers += [nn.Conv2d(expanded, filters, 1, bias=False), norm(filters)]
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and channels == filters

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.layers(images)
        return images + outputs if self.adds else outputs


class MobileNetV2(nn.Sequential):
    """MobileNetV2 with ReLU6: images (N, 3, H, W), H and W multiples of 32, to logits (N, ``num_classes``).

    Args:
        width: Multiplier of every layer's channels.
        num_classes: Number of logits.
        dropout: Probability of the dropout before the classifier.
    """

    def __init__(self, width: float = 0.35, num_classes: int = 10, dropout: float = 0.2) -> None:
        # expansion, filters, repeats, stride
        plan = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        norm = partial(nn.BatchNorm2d)
        channels = _rounded(32 * width)
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, 1, bias=False), norm(channels), nn.ReLU6()]
        for expansion, filters, repeats, stride in plan:
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                wide = _rounded(filters * width)
                layers.append(_InvertedResidual(channels, channels * expansion, wide, step, nn.ReLU6, norm=norm))
                channels = wide
        last = _rounded(1280 * min(width, 1.0))
        layers += [nn.Conv2d(channels, last, 1, bias=False), norm(last), nn.ReLU6()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(last, num_classes)]
        super().__init__(*layers)


class MobileNetV3Small(nn.Sequential):
    """MobileNetV3-Small, with hard-swish and squeeze-and-excitation.

    Maps images (N, 3, H, W), H and W multiples of 32, to logits (N, ``num_classes``).

    Args:
        width: Multiplier of every layer's channels.
        num_classes: Number of logits.
        dropout: Probability of the dropout before the classifier.
    """

    def __init__(self, width: float = 0.5, num_classes: int = 10, dropout: float = 0.2) -> None:
        # kernel, expanded channels, filters, squeeze-and-excitation, hard-swish, stride
        plan = [
            (3, 16, 16, True, False, 2),
            (3, 72, 24, False, False, 2),
            (3, 88, 24, False, False, 1),
            (5, 96, 40, True, True, 2),
            (5, 240, 40, True, True, 1),
            (5, 240, 40, True, True, 1),
            (5, 120, 48, True, True, 1),
            (5, 144, 48, True, True, 1),
            (5, 288, 96, True, True, 2),
            (5, 576, 96, True, True, 1),
            (5, 576, 96, True, True, 1),
        ]
        channels = _rounded(16 * width)
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, 1, bias=False), _Norm(channels), nn.Hardswish()]
        for kernel, expanded, filters, squeeze, swish, stride in plan:
            activation = nn.Hardswish if swish else nn.ReLU
            wide, middle = _rounded(filters * width), _rounded(expanded * width)
            layers.append(_InvertedResidual(channels, middle, wide, stride, activation, kernel, squeeze))
            channels = wide
        last = _rounded(576 * width)
        layers += [nn.Conv2d(channels, last, 1, bias=False), _Norm(last), nn.Hardswish()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, int(1024 * width)), nn.Hardswish()]
        super().__init__(*layers, nn.Dropout(dropout), nn.Linear(int(1024 * width), num_classes))


def load_reference_weights(network: nn.Module, path: str | Path) -> None:
    """Load weights stored layer by layer into a network whose layers come in the same order.

    Args:
        network: One of the four MLPerf Tiny networks above.
        path: An ``.npz`` with keys ``<position>.<kind>.<parameter>``, ``weight``, ``bias``, ``running_mean`` and
            ``running_var`` in PyTorch's layout.

    Raises:
        ValueError: If the file does not hold exactly the layers of ``network``.
    """
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    with np.load(path) as arrays:
        stored = {key: torch.from_numpy(arrays[key]) for key in sorted(arrays.files)}
    ours = _by_layer(state)
    theirs = _by_layer(stored)
    if [_shapes(layer) for layer in ours] != [_shapes(layer) for layer in theirs]:
        raise ValueError(
            f"{path} holds {len(theirs)} layers, {type(network).__name__} has {len(ours)}, or their shapes differ. "
            f"First of the file: {_shapes(theirs[0]) if theirs else 'none'}; of the network: {_shapes(ours[0])}."
        )
    with torch.no_grad():
        for mine, given in zip(ours, theirs, strict=True):
            for name, value in given.items():
                mine[name].copy_(value)


def _by_layer(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, name = key.rsplit(".", 1)
        layers.setdefault(layer, {})[name] = value
    return list(layers.values())


def _shapes(layer: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer[name].shape) for name in sorted(layer)}
