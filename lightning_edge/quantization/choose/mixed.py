"""Choose a precision for each layer, for a stated size or a stated loss, and measure what was chosen.

The increases of the layers are taken to add up (Nagel et al. 2021, arXiv:2106.08295, section 4.2, and Dong et al. 2019,
arXiv:1905.03696, rest on the same), and layers are given more bits greedily, by increase saved for each byte spent: the
greedy solution of the knapsack. What was chosen is then quantized as a whole and measured, which does not rest on that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.quantization.choose.sensitivity import LayerSensitivity, Loss, Measured, Sensitivities, sensitivity
from lightning_edge.quantization.plan import LayerPrecision, Plan, named_by
from lightning_edge.quantization.post_training import quantize
from lightning_edge.surgery import in_mode

_FLOAT_BYTES = 4
# What float layers may add to the weights of all layers in int8: a first or a last layer, and not half of the network.
_MORE_BYTES = 0.1


@dataclass(frozen=True)
class MixedPlan:
    """Precisions that were chosen, and what they come to.

    Attributes:
        precisions: Layer -> precision, for ``Quantize(precisions=...)`` and ``quantize(..., precisions=...)``; layers
            that are not named are int8.
        weight_bytes: Bytes of the weights of all layers under it.
        predicted_increase: Sum of the layers' own increases of the loss.
        measured_increase: Increase with the plan as a whole, activations between layers included.
        loss: What was measured.
        sensitivities: What it was chosen from.
    """

    precisions: dict[str, LayerPrecision]
    weight_bytes: int
    predicted_increase: float
    measured_increase: float
    loss: str
    sensitivities: Sensitivities


def mixed_plan(
    model: nn.Module,
    calibration_batches: Iterable[Any],
    evaluation_batches: Iterable[Any],
    *,
    weight_bytes: int | None = None,
    loss_increase: float | None = None,
    loss: Loss = "mse",
    sensitivities: Sensitivities | None = None,
    wide_activations: bool = False,
) -> MixedPlan:
    """Choose which layers stay int8 and which get more, for a stated size or a stated increase of the loss.

    Args:
        model: A float network; it is left as it was.
        calibration_batches: As for `quantize`.
        evaluation_batches: As for `sensitivity`.
        weight_bytes: Spend at most this many bytes on the weights of all layers.
        loss_increase: Spend as few bytes as keep the measured increase of the loss at or below this.
        loss: As for `sensitivity`.
        sensitivities: What `sensitivity` found on the same network; measured if not given.
        wide_activations: Allow ``"int8_a16"``, which costs no bytes and only LiteRT can run.

    Raises:
        CompressionError: If no plan keeps to the limit; the message says what is nearest.
        ValueError: If not exactly one limit is given, or it is negative.
    """
    if (weight_bytes is None) == (loss_increase is None):
        raise ValueError("give either weight_bytes=... (a size) or loss_increase=... (a loss), and not both")
    limit = loss_increase if weight_bytes is None else weight_bytes
    if limit is None or not limit >= 0:
        raise ValueError(f"a limit of {limit!r} is not allowed; give a number of 0 or more")
    calibration, evaluation = list(calibration_batches), list(evaluation_batches)
    if sensitivities is None:
        sensitivities = sensitivity(model, calibration, evaluation, loss=loss)
    layers = sensitivities.layers
    smallest = sum(layer.weights for layer in layers)
    if weight_bytes is not None and weight_bytes < smallest:
        raise CompressionError(
            f"weight_bytes={weight_bytes} is below the {smallest} bytes of all layers in int8, the least that a plan "
            "can take. Prune the network first, or give a larger size."
        )

    chosen: dict[str, LayerPrecision] = {}
    spent = smallest
    left = _upgrades(layers, wide_activations)

    def measure() -> float:
        return plan_increase(model, chosen, calibration, evaluation, loss=loss)

    increase = None
    while left:
        if loss_increase is not None:
            increase = measure()
            if increase <= loss_increase:
                break
        affordable = [upgrade for upgrade in left if weight_bytes is None or spent + upgrade.bytes <= weight_bytes]
        affordable = [upgrade for upgrade in affordable if loss_increase is not None or upgrade.saved > 0]
        # With every layer in float there is nothing left to quantize.
        floats = sum(precision == "float" for precision in chosen.values())
        affordable = [u for u in affordable if u.precision != "float" or floats < len(layers) - 1]
        if not affordable:
            break
        best = max(affordable, key=lambda upgrade: (upgrade.saved / max(upgrade.bytes, 1e-9), upgrade.saved))
        chosen[best.layer] = best.precision
        spent += best.bytes
        left = [u for u in left if u.layer != best.layer or (best.precision == "int8_a16" and u.precision == "float")]
        increase = None
    increase = measure() if increase is None else increase
    if loss_increase is not None and not increase <= loss_increase:
        raise CompressionError(
            f"no plan keeps the increase of {sensitivities.loss} at {loss_increase:g}: with all layers but one in "
            f"float it is {increase:.4g}. Quantize with training, or allow a larger increase."
        )
    return MixedPlan(
        precisions=dict(sorted(chosen.items())),
        weight_bytes=spent,
        predicted_increase=sum(_increase(layer, chosen.get(layer.name, "int8")) for layer in layers),
        measured_increase=increase,
        loss=sensitivities.loss,
        sensitivities=sensitivities,
    )


def plan_increase(
    model: nn.Module,
    precisions: dict[str, LayerPrecision],
    calibration_batches: Sequence[Any],
    evaluation_batches: Sequence[Any],
    *,
    loss: Loss = "mse",
) -> float:
    """Measure a plan as a whole: loss of the network quantized by it, minus that of the float network.

    Args:
        model: A float network; it is left as it was.
        precisions: The plan.
        calibration_batches: As for `quantize`.
        evaluation_batches: As for `sensitivity`.
        loss: As for `sensitivity`.
    """
    quantized = quantize(model, calibration_batches, precisions=precisions)
    measured = Measured(loss)
    with torch.no_grad(), in_mode(model, training=False):
        for batch in evaluation_batches:
            inputs, target = measured.split(model, batch)
            measured.begin(model(*inputs.args, **inputs.kwargs), target, inputs.batch_size)
            measured.add("plan", quantized(*inputs.args, **inputs.kwargs))
    return measured.increases()["plan"]


def least_lossy(network: nn.Module, inputs: Inputs, fixed: Plan) -> dict[str, LayerPrecision]:
    """Choose the layers that stay float where a training in int8 begins: what ``Quantize(precisions="mixed")`` does.

    The layers whose int8 form moves the outputs most for each byte stay float, as long as the weights of all layers
    take at most a tenth more bytes than in int8.

    Args:
        network: The network as it was trained so far; it is left as it was.
        inputs: A batch, to calibrate and to measure on.
        fixed: Layers whose precision is given; they are left out of the choice.

    Returns:
        The layers that stay float. Empty where none is small enough.

    Raises:
        CompressionError: If the network cannot be captured or has no layer to quantize.
    """
    found = sensitivity(network, [inputs], [inputs])
    free = tuple(layer for layer in found.layers if not named_by(fixed, layer.name))
    most = int((1 + _MORE_BYTES) * sum(layer.weights for layer in free))
    if not free:
        return {}
    return mixed_plan(
        network, [inputs], [inputs], weight_bytes=most, sensitivities=replace(found, layers=free)
    ).precisions


@dataclass(frozen=True)
class _Upgrade:
    layer: str
    precision: LayerPrecision
    saved: float
    bytes: int


def _upgrades(layers: Iterable[LayerSensitivity], wide_activations: bool) -> list[_Upgrade]:
    found = []
    for layer in layers:
        rest = layer.increase
        if wide_activations and layer.increase_a16 < layer.increase:
            found.append(_Upgrade(layer.name, "int8_a16", layer.increase - layer.increase_a16, 0))
            rest = layer.increase_a16
        found.append(_Upgrade(layer.name, "float", rest, (_FLOAT_BYTES - 1) * layer.weights))
    return found


def _increase(layer: LayerSensitivity, precision: LayerPrecision) -> float:
    return {"int8": layer.increase, "int8_a16": layer.increase_a16, "float": 0.0}[precision]
