"""What goes into the graph behind the quantizers: dropout and BatchNorm again, and rounded biases. Torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class GraphDropout(nn.Module):
    """A dropout of the user's, put back behind the quantizers; its mode is that of the submodule which calls it.

    Args:
        operator: The dropout.
        probability: The user's.
        owner: Name of that submodule in the network.
    """

    def __init__(self, operator: Any, probability: float, owner: str) -> None:
        super().__init__()
        self.operator = operator
        self.probability = probability
        self.owner = owner

    def forward(self, x: Tensor) -> Tensor:
        """Drop at random while training."""
        dropped: Tensor = self.operator(x, self.probability, True) if self.training else x
        return dropped


class StopGradient(nn.Module):
    """A detach of the user's, or the end of their ``torch.no_grad()``, put back behind the quantizers."""

    def forward(self, x: Tensor) -> Tensor:
        """Let no gradient through."""
        return x.detach()


class RoundedBias(nn.Module):
    """A bias on the grid of the accumulator that it is added to.

    Integer kernels keep a bias as a 32-bit integer in steps of input scale times weight scale. Left out, its rounding
    is the largest difference between a trained network and its files: on ResNet-8 one output step on average.

    Args:
        input_quantizer: The fake-quantizer of the layer's input.
        weight_quantizer: The fake-quantizer of its weight.
    """

    quantizers: tuple[Any, Any]

    def __init__(self, input_quantizer: nn.Module, weight_quantizer: nn.Module) -> None:
        super().__init__()
        # A tuple, so that they are read and not owned: both are modules of the graph already.
        self.quantizers = (input_quantizer, weight_quantizer)

    def forward(self, bias: Tensor) -> Tensor:
        """Round, with a gradient of one."""
        input_quantizer, weight_quantizer = self.quantizers
        return round_bias(bias, input_quantizer.scale, weight_quantizer.scale)


def round_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Round a bias to steps of input scale times weight scale, with a gradient of one."""
    with torch.no_grad():
        step = (input_scale * weight_scale).double()
        rounding: Tensor = (bias / step).round_().mul_(step).to(bias.dtype) - bias
    return bias + rounding


class LiveBatchNorm(nn.Module):
    """BatchNorm behind a layer whose weights already carry its scale, while its statistics still learn.

    In training the layer's output is divided by that scale again and normalized by the batch; otherwise, and once
    `folded`, what is left of BatchNorm is the layer's bias. Its mode is that of the user's BatchNorm, frozen or not.

    Args:
        momentum: The user's.
        eps: The user's.
        owner: Name of the user's BatchNorm in the network.
    """

    def __init__(self, momentum: float, eps: float, owner: str) -> None:
        super().__init__()
        self.owner = owner
        self.momentum = momentum
        self.eps = eps
        self.folded = False

    @property
    def learns(self) -> bool:
        """Whether it normalizes by the batch and its statistics move."""
        return self.training and not self.folded

    def forward(
        self,
        y: Tensor,
        scale: Tensor | None,
        bias: Tensor,
        layer_bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        variance: Tensor,
    ) -> Tensor:
        """Normalize the layer's output ``y``, which has no bias yet, channels in dimension 1.

        Without ``scale``, ``y`` has been divided by it already while this layer `learns`.
        """
        shape = [1, -1] + [1] * (y.dim() - 2)
        if not self.learns:
            return y + bias.view(shape)
        if scale is not None:
            # A channel whose gamma is zero has no scale to divide by; its output is zero either way.
            y = y / torch.where(scale == 0, 1.0, scale).view(shape)
        if layer_bias is not None:
            y = y + layer_bias.view(shape)
        return nn.functional.batch_norm(y, mean, variance, gamma, beta, True, self.momentum, self.eps)
