"""What quantization itself costs: int8 networks in torch, held against the float one and against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_edge.errors import EdgeError
from lightning_edge.measure import Agreement
from lightning_edge.network import Inputs
from lightning_edge.quantization import sensitivity
from lightning_edge.reporting.monitor import Monitor
from lightning_edge.verdict import MetricChange

# Below this, what int8 changes is as large as a third of what the outputs tell apart.
_NOISE_DB = 10.0
_NAMED_LAYERS = 3


def noise_warning(
    label: str, agreement: Agreement, change: MetricChange | None, network: nn.Module, calls: Sequence[Inputs]
) -> str | None:
    """Say that an int8 network's outputs are noise beside the float one's, and which layers lose most.

    Args:
        label: What the int8 network is called.
        agreement: How far its outputs lay from the float network's.
        change: The user's metric of the float (``network``) and the int8 network (``file``).
        network: The float network.
        calls: What the network is fed, to measure its layers on where there is something to say.

    Returns:
        The warning; ``None`` where the int8 network still does its job: the metric decides where there is one.
    """
    ratios = [output.snr_db for output in agreement.outputs if output.snr_db is not None]
    noisy = bool(ratios) and min(ratios) < _NOISE_DB
    if change is not None:
        noisy = change.lost or (noisy and not change.kept)
    if not noisy:
        return None
    loss = f"signal to noise is {min(ratios):.3g} dB" if ratios else "the float outputs do not vary"
    if change is not None:
        loss += f" and {change.name} {change.file:.4g}, against {change.network:.4g} in float"
    return (
        f"{label}: int8 leaves little of the float network's outputs: {loss}. {_most_sensitive(network, calls)} "
        "Train with Quantize for longer or at a lower learning rate, or keep those layers float (skip=[...])."
    )


def training_warning(
    monitor: Monitor, trained: Mapping[str, float], after: Mapping[str, float], split: str
) -> str | None:
    """Say that training with quantizers gave a worse network than quantization after training; ``None`` if not.

    Args:
        monitor: The metric that decides.
        trained: Metrics of the network that was trained with quantizers.
        after: Metrics of the float network, quantized after training.
        split: The split they were measured on.
    """
    ours, theirs = trained[monitor.metric], after[monitor.metric]
    if not monitor.worse(ours, theirs):
        return None
    return (
        f"Quantization-aware training is worse than post-training quantization: {monitor.metric} {ours:.4f} against "
        f"{theirs:.4f} on the {split} split ({monitor.mode} is better). Lower the learning rate (3 to 10 times), start "
        "later, move fold_batch_norm, or keep the most sensitive layers float (Quantize(skip=[...]); "
        "lightning_edge.sensitivity names them). Or ship the post-training one."
    )


def _most_sensitive(network: nn.Module, calls: Sequence[Inputs]) -> str:
    # Copies: those of a validation loop were made in inference mode, in which nothing can be captured.
    fed = [call.map(Tensor.clone) for call in calls]
    try:
        layers = sensitivity(network, fed, fed[:1]).layers[:_NAMED_LAYERS]
    except EdgeError as error:
        # What explains a warning must not take its place.
        return f"Which layers lose most could not be measured ({error})."
    return f"The layers that lose most by themselves: {', '.join(layer.name for layer in layers)}."
