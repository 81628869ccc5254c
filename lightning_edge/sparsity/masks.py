"""Which weights stay: masks by magnitude, and the eight-fold smaller form they are kept in. Knows torch only.

A mask is boolean, of its weight's shape, true where the weight stays. Weights are scored on the CPU in float64, and
equal scores keep their order, so that every device comes to the same mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """A weight to be masked.

    Attributes:
        data: The weight.
        input_dimension: Which of its dimensions the layer sums over, besides the positions of a kernel.
        inputs: Inputs that one output is a sum over: fewer than that dimension's size in a grouped transposed
            convolution.
        mask: What is left of it by an earlier mask; ``None``: all.
    """

    data: Tensor
    input_dimension: int
    inputs: int
    mask: Tensor | None = None

    def scores(self) -> Tensor:
        """Give the magnitudes; weights that are gone come before all others."""
        scores = self.data.detach().abs().to("cpu", torch.float64)
        return scores if self.mask is None else scores.masked_fill(~self.mask, -1.0)


def unstructured(weights: Mapping[str, Weight], sparsity: float, *, over_all: bool) -> dict[str, Tensor]:
    """Drop the smallest weights (Han et al. 2015, arXiv:1506.02626).

    Args:
        weights: The weights, by name.
        sparsity: Share to drop, from 0 up to, but not including, 1.
        over_all: Compare all weights with each other, instead of those of each layer.

    Returns:
        The masks, by name; what was gone stays gone.
    """
    scores = {name: weight.scores().flatten() for name, weight in weights.items()}
    if over_all:
        kept = _without_smallest(torch.cat(list(scores.values())), sparsity)
        parts = kept.split([score.numel() for score in scores.values()])
    else:
        parts = tuple(_without_smallest(score, sparsity) for score in scores.values())
    return {name: part.view(weights[name].data.shape) for name, part in zip(weights, parts, strict=True)}


def n_of_m(weights: Mapping[str, Weight], n: int, m: int, share: float) -> dict[str, Tensor]:
    """Keep the ``n`` largest of every ``m`` consecutive inputs (2:4: Mishra et al. 2021, arXiv:2104.08378).

    Inputs are grouped for each output and each position of a kernel.

    Args:
        weights: The weights, by name, of a whole number of groups each.
        n: Weights of a group that stay.
        m: Weights in a group.
        share: How much of what has to go, goes: the smallest first. 1.0 reaches the pattern.

    Returns:
        The masks, by name; what was gone stays gone.
    """
    masks = {}
    for name, weight in weights.items():
        scores = weight.scores().movedim(weight.input_dimension, -1)
        groups = scores.reshape(-1, m)
        goes = torch.zeros_like(groups, dtype=torch.bool)
        goes.scatter_(1, groups.argsort(dim=1, stable=True)[:, : m - n], True)
        candidates = goes.flatten().nonzero().squeeze(1)
        kept = torch.ones(groups.numel(), dtype=torch.bool)
        kept[candidates] = _without_smallest(groups.flatten()[candidates], share)
        masks[name] = kept.view(scores.shape).movedim(-1, weight.input_dimension).contiguous()
    return masks


def pack(mask: Tensor) -> Tensor:
    """Give a mask as bits, eight to a byte, the first in the lowest bit."""
    bits = mask.flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """Give the mask of a weight of this shape that was packed."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten()[: math.prod(shape)].bool().view(shape)


def _without_smallest(scores: Tensor, share: float) -> Tensor:
    # 0.29 * 100 is 28.999999999999996.
    count = int(share * scores.numel() + 1e-9)
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept[scores.argsort(stable=True)[:count]] = False
    return kept
