"""Post-training quantization: the same network and quantizers, ranges from calibration batches, no training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_edge.network import Inputs, fed
from lightning_edge.quantization.network import attach, float_copy, quantized_forward
from lightning_edge.quantization.plan import LinearWeights, check_linear_weights, check_plan
from lightning_edge.surgery import in_mode

# Of the first calibration batch so much is kept, for `export` to compare its files on.
_KEPT_SAMPLES = 32
_KEPT_BYTES = 2**24


def quantize(
    model: nn.Module,
    calibration_batches: Iterable[Any],
    *,
    skip: Sequence[str] | None = None,
    precisions: Mapping[str, str] | None = None,
    validation_batches: Iterable[Any] | None = None,
    linear_weights: LinearWeights = "per_channel",
) -> nn.Module:
    """Quantize a trained network without training: post-training quantization.

    Args:
        model: A float network; it is copied and left as it was.
        calibration_batches: What the network is fed, as it is fed in training: each batch a tensor, a tuple of
            positional arguments, a dict of keyword arguments, or `Inputs`; of ``(inputs, target)``, as a dataloader
            gives it, the inputs. Some hundred samples are enough.
        skip: Patterns of module names (fnmatch) that stay float: a layer, or a module with everything inside it.
        precisions: Pattern of module names -> ``"int8"``, ``"int8_a16"`` (int8 weights, 16-bit activations; LiteRT
            only) or ``"float"``; the last pattern that matches decides, what none matches is int8. `mixed_plan`
            makes one.
        validation_batches: What the network will be fed in use; where it differs from the calibration batches, a
            warning says so, see `check_calibration`.
        linear_weights: ``"per_channel"``, a scale for each output of a linear layer, or ``"per_tensor"``, one for
            all of them: smaller files, and coarser weights where outputs differ in range. Convolutions keep theirs.

    Returns:
        A copy in eval mode whose calls go through fake-quantizers with the observed ranges. `convert` and
        `lightning_edge.export` take it. It is the network as it is in evaluation: to train on, take `Quantize`.

    Raises:
        CompressionError: If the network cannot be captured, has nothing to quantize, or a pattern matches nothing.
        ValueError: If there is no batch, the network does not take it, or ``skip``, ``precisions`` or
            ``linear_weights`` is not of that form.
    """
    joined = check_plan(precisions, skip)
    scales = check_linear_weights(linear_weights)
    network = float_copy(model).eval()
    child = None
    with torch.no_grad():
        for batch in calibration_batches:
            inputs = fed(network, batch)
            if child is None:
                child = attach(network, inputs, averaging=None, plan=joined, linear_weights=scales)
                child.calibration = _first_samples(inputs)
            calibrate(network, inputs)
    if child is None:
        raise ValueError("calibration_batches is empty; give at least one batch of what the network is fed")
    child.freeze_observers()
    if validation_batches is not None:
        from lightning_edge.quantization.calibration_check import check_calibration, warn_of

        warn_of(check_calibration(network, validation_batches))
    return network


def _first_samples(inputs: Inputs) -> Inputs | None:
    """Copy the first samples of a batch, as many as are kept; ``None`` where one alone is too large."""
    kept = inputs.sample(size=_KEPT_SAMPLES)
    size = sum(tensor.numel() * tensor.element_size() for tensor in kept.tensors)
    fitting = kept.batch_size * _KEPT_BYTES // max(1, size)
    if not fitting:
        return None
    return kept.sample(size=min(kept.batch_size, fitting)).map(lambda tensor: tensor.detach().cpu().clone())


def calibrate(network: nn.Module, inputs: Inputs) -> None:
    """Run one batch through a quantized network in eval mode and let it move the ranges."""
    _, child = quantized_forward(network)
    with torch.no_grad(), in_mode(network, training=False):
        for module in child.fake_quantizers():
            module.training = True
        child(*inputs.args, **inputs.kwargs)
