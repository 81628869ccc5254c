"""How important the channels of a group are. Every criterion scores each tensor that holds them, then averages.

- ``l1``, ``l2``: sum of absolute or squared weights (Li et al. 2017, arXiv:1608.08710), over the group.
- ``bn_scale``: absolute BatchNorm scales (Liu et al. 2017, arXiv:1708.06519).
- ``taylor``: first-order change of the loss, sum of |weight x gradient| (Molchanov et al. 2019, arXiv:1906.10771).
- ``obd``: second-order change, sum of weight² x mean squared gradient of a sample (LeCun et al. 1989, with the
  empirical Fisher information for the diagonal of the Hessian).
- ``fpgm``: distance to the other filters (He et al. 2019, arXiv:1811.00250).
- ``lamp``: squared weights over the squares of all that are larger (Lee et al. 2021, arXiv:2010.07611).
- ``random``: uniform, from a seed.

Scores are divided by the group's mean, so that groups compare; those of ``lamp`` compare as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_edge.pruning.groups import Group, Slot

Criterion = Literal["l1", "l2", "bn_scale", "taylor", "fpgm", "lamp", "obd", "random"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
Floats = NDArray[np.float64]


def score(
    groups: Sequence[Group],
    criterion: Criterion,
    tensors: Mapping[str, Tensor],
    sensitivity: Mapping[str, Tensor],
    seed: int,
) -> list[Floats | None]:
    """Score the units of each group.

    Args:
        groups: The groups.
        criterion: By what.
        tensors: The network's parameters and buffers by name.
        sensitivity: For ``taylor`` each parameter's gradient, for ``obd`` the mean of its squares; else unused.
        seed: For ``random``.

    Returns:
        For each group one score per unit, higher is more important; ``None`` where it holds nothing to score.
    """
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(group.units, generator=generator, dtype=torch.float64).numpy() for group in groups]
    return [_score(group, criterion, tensors, sensitivity) for group in groups]


@torch.no_grad()
def _score(
    group: Group, criterion: Criterion, tensors: Mapping[str, Tensor], sensitivity: Mapping[str, Tensor]
) -> Floats | None:
    roles = {"bn_scale": ("scale",), "fpgm": ("kernel",)}.get(criterion, ("kernel", "scale"))
    needs_slope = criterion in ("taylor", "obd")  # which frozen weights may not have
    total = np.zeros(group.units)
    scored = 0
    for slot in group.slots:
        if slot.role not in roles or (needs_slope and slot.tensor not in sensitivity):
            continue
        values = _along(tensors[slot.tensor], slot)
        if needs_slope:
            slopes = _along(sensitivity[slot.tensor], slot).to(values)
            each = (values * slopes).abs() if criterion == "taylor" else values.square() * slopes
        elif criterion == "fpgm":
            each = torch.cdist(values, values)
        else:
            each = values.abs() if criterion in ("l1", "bn_scale") else values.square()
        held = slot.units >= 0
        total += np.bincount(slot.units[held], each.sum(1).double().cpu().numpy()[held], minlength=group.units)
        scored += 1
    if not scored:
        return None
    mean = total / scored
    return _lamp(mean) if criterion == "lamp" else mean / max(float(mean.mean()), np.finfo(np.float64).tiny)


def _along(tensor: Tensor, slot: Slot) -> Tensor:
    """The tensor as (indices along the slot's dimension, everything else)."""
    values = tensor.detach().movedim(slot.dimension, 0).flatten(1) if tensor.dim() > 1 else tensor.detach()[:, None]
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _lamp(scores: Floats) -> Floats:
    ascending = np.argsort(scores, kind="stable")
    ordered = scores[ascending]
    larger = ordered[::-1].cumsum()[::-1]
    result = np.empty_like(scores)
    result[ascending] = ordered / np.maximum(larger, np.finfo(np.float64).tiny)
    return result
