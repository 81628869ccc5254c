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
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_edge.pruning.groups import Group, Slot
from lightning_edge.schedule import Batch

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
    elements = _Elements(criterion, tensors, sensitivity)
    return [_score(group, criterion, elements) for group in groups]


def _score(group: Group, criterion: Criterion, elements: _Elements) -> Floats | None:
    roles = {"bn_scale": ("scale",), "fpgm": ("kernel",)}.get(criterion, ("kernel", "scale"))
    total = np.zeros(group.units)
    scored = 0
    for slot in group.slots:
        if slot.role not in roles or not elements.known(slot.tensor):
            continue
        # One place before the units for the indices that belong to none.
        total += np.bincount(slot.units + 1, elements.along(slot), minlength=group.units + 1)[1:]
        scored += 1
    if not scored:
        return None
    mean = total / scored
    return _lamp(mean) if criterion == "lamp" else mean / max(float(mean.mean()), np.finfo(np.float64).tiny)


class _Elements:
    """What a criterion gives the elements of each tensor.

    The weight of a layer is scored twice, with the group of its outputs and with that of its inputs. What both have in
    common, the elements of a kernel and their sums over its positions, is computed once.
    """

    def __init__(self, criterion: Criterion, tensors: Mapping[str, Tensor], sensitivity: Mapping[str, Tensor]) -> None:
        self._criterion = criterion
        self._tensors = tensors
        self._sensitivity = sensitivity
        self._needs_slope = criterion in ("taylor", "obd")
        self._kernels: dict[str, Tensor] = {}

    def known(self, name: str) -> bool:
        """Whether the tensor can be scored: frozen weights may have no slope."""
        return not self._needs_slope or name in self._sensitivity

    @torch.no_grad()
    def along(self, slot: Slot) -> NDArray[Any]:
        """Sum up what belongs to each index along the slot's dimension."""
        if self._criterion == "fpgm":
            tensor = _real(self._tensors[slot.tensor])
            filters = tensor.movedim(slot.dimension, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]
            sums = torch.cdist(filters, filters).sum(1)
        else:
            sums = self._of(slot.tensor)
            if sums.dim() > 1:
                sums = sums.sum([axis for axis in range(sums.dim()) if axis != slot.dimension])
        return sums.cpu().numpy()

    def _of(self, name: str) -> Tensor:
        if name in self._kernels:
            return self._kernels[name]
        values = _real(self._tensors[name])
        if self._needs_slope:
            slopes = self._sensitivity[name].detach().to(values)
            each = (values * slopes).abs() if self._criterion == "taylor" else values.square() * slopes
        else:
            each = values.abs() if self._criterion in ("l1", "bn_scale") else values.square()
        if each.dim() > 2:  # the channels of a layer lie in the first two dimensions
            each = self._kernels[name] = each.flatten(2).sum(2)
        return each


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _lamp(scores: Floats) -> Floats:
    ascending = np.argsort(scores, kind="stable")
    ordered = scores[ascending]
    larger = ordered[::-1].cumsum()[::-1]
    result = np.empty_like(scores)
    result[ascending] = ordered / np.maximum(larger, np.finfo(np.float64).tiny)
    return result


def sensitivities(criterion: Criterion, batch: Batch) -> dict[str, Tensor]:
    """Give what a criterion wants to know of each parameter beside its values: gradients, or their mean squares."""
    if criterion == "taylor":
        return next(iter(batch.gradients()))
    if criterion != "obd":
        return {}
    squares: dict[str, Tensor] = {}
    for count, gradients in enumerate(batch.gradients(per_sample=True), start=1):
        for name, gradient in gradients.items():
            mean = squares.setdefault(name, torch.zeros_like(gradient))
            mean += (gradient.square() - mean) / count
    return squares
