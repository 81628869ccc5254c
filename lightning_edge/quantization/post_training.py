"""Post-training quantization: the same network and quantizers, ranges from calibration batches, no training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_edge.network import Inputs
from lightning_edge.quantization.network import attach, float_copy, quantized_forward


def quantize(model: nn.Module, calibration_batches: Iterable[Any]) -> nn.Module:
    """Quantize a trained network without training: post-training quantization.

    Args:
        model: A float network; it is copied and left as it was.
        calibration_batches: What the network is fed, as it is fed in training: each batch a tensor, a tuple of
            positional arguments, a dict of keyword arguments, or `Inputs`. Some hundred samples are enough.

    Returns:
        A copy in eval mode whose calls go through fake-quantizers with the observed ranges. `convert` and
        `lightning_edge.export` take it.

    Raises:
        CompressionError: If the network cannot be captured or has nothing to quantize.
        ValueError: If there is no batch.
    """
    network = float_copy(model).eval()
    child = None
    with torch.no_grad():
        for batch in calibration_batches:
            inputs = Inputs.of(batch)
            if child is None:
                child = attach(network, inputs, averaging=None)
            calibrate(network, inputs)
    if child is None:
        raise ValueError("calibration_batches is empty; give at least one batch of what the network is fed")
    child.freeze_observers()
    return network


def calibrate(network: nn.Module, inputs: Inputs) -> None:
    """Run one batch through a quantized network in eval mode and let it move the ranges."""
    _, child = quantized_forward(network)
    with torch.no_grad(), _eval_mode(network):
        for module in child.fake_quantizers():
            module.training = True
        child(*inputs.args, **inputs.kwargs)


@contextmanager
def _eval_mode(network: nn.Module) -> Iterator[None]:
    """Set eval mode and put back, module by module, what it was."""
    modes = {module: module.training for module in network.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
