"""The group regularizer that drives channels towards zero before they are cut.

Group-SL of DepGraph (Fang et al. 2023, arXiv:2301.12900, equation 4): each group of coupled weights decays, the less
important the faster, at a rate between 1 and 2^4 times the strength.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_edge.pruning.groups import Group

_ALPHA = 4.0
# Of a group: name of each tensor that counts, its dimension, and the unit of each index along it.
_Held = list[tuple[str, int, Tensor]]


class GroupRegularizer:
    """Adds the regularizer's gradient for one structure of a network.

    Args:
        groups: The network's groups; those that keep their channels are left out.
        parameters: Its parameters by name.
    """

    def __init__(self, groups: Sequence[Group], parameters: Mapping[str, nn.Parameter]) -> None:
        self._groups: list[tuple[int, _Held]] = []
        for group in groups:
            slots = [slot for slot in group.slots if slot.role != "rest"]
            if slots and not group.reason:
                # What belongs to no unit is counted as one more.
                held = [
                    (slot.tensor, slot.dimension, torch.from_numpy(slot.units % (group.units + 1))) for slot in slots
                ]
                device = parameters[slots[0].tensor].device
                self._groups.append((group.units, [(name, side, units.to(device)) for name, side, units in held]))

    @torch.no_grad()
    def add_gradients(self, parameters: Mapping[str, nn.Parameter], strength: float) -> None:
        """Add to the gradients of the weights and norm scales of every group that may be cut.

        Args:
            parameters: The network's parameters by name; those without a gradient are left out.
            strength: Factor of the gradient.
        """
        for count, held in self._groups:
            squares = torch.zeros(count + 1, device=held[0][2].device)
            for name, dimension, units in held:
                squares.index_add_(0, units, _squares(parameters[name], dimension))
            norms = (squares[:-1] / len(held)).sqrt()
            spread = (norms.max() - norms.min()).clamp_min(torch.finfo(norms.dtype).tiny)
            rates = nn.functional.pad(2 ** (_ALPHA * (norms.max() - norms) / spread), (0, 1))
            for name, dimension, units in held:
                parameter = parameters[name]
                if parameter.grad is not None:
                    shape = [-1 if other == dimension else 1 for other in range(parameter.dim())]
                    rate = rates[units].to(parameter.dtype).reshape(shape)
                    parameter.grad.addcmul_(parameter.detach(), rate, value=strength)


def _squares(parameter: Tensor, dimension: int) -> Tensor:
    squares = parameter.detach().float().square()
    others = [other for other in range(parameter.dim()) if other != dimension]
    return squares.sum(others) if others else squares
