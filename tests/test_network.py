"""How a batch becomes the call of a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_edge.network import Deployable, Inputs, fed

IMAGES, LABELS = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


class TwoInputs(nn.Module):
    """Takes two tensors."""

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Add them."""
        return image + mask


@pytest.mark.parametrize("kind", [list, tuple])
def test_labels_behind_what_a_network_takes_are_left_out(kind: type) -> None:
    call = fed(nn.Linear(3, 2), kind((IMAGES, LABELS)))
    assert len(call.args) == 1
    assert call.args[0] is IMAGES
    nested = fed(TwoInputs(), kind(((IMAGES, IMAGES), LABELS)))
    assert len(nested.args) == 2


def test_what_a_network_takes_is_not_left_out() -> None:
    assert fed(TwoInputs(), (IMAGES, LABELS)).args[1] is LABELS
    assert fed(TwoInputs(), {"mask": IMAGES, "image": LABELS}).kwargs.keys() == {"mask", "image"}


def test_a_finished_network_is_fed_as_many_arguments_as_it_was_made_with() -> None:
    network = Deployable(nn.Linear(3, 2), Inputs((IMAGES,)), "fp32")
    assert len(fed(network, (IMAGES, LABELS)).args) == 1


@pytest.mark.parametrize("batch", [{"label": LABELS, "image": IMAGES}, ({"image": IMAGES}, LABELS), ()])
def test_a_batch_that_fits_no_way_is_one_error(batch: object) -> None:
    with pytest.raises(ValueError, match=r"does not fit Linear.forward\(\): .* as the network is fed"):
        fed(nn.Linear(3, 2), batch)
