"""The user's data loaders in the middle of a training: looked at, and left as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader


@contextmanager
def generators_kept(*dataloaders: Any) -> Iterator[None]:
    """Within this context, loaders may be iterated over; behind it they shuffle as if they had not been.

    Args:
        dataloaders: What ``Trainer.fit`` takes, or ``None``. The states of their generators, of torch, are put back.
    """
    found: dict[int, torch.Generator] = {}
    for loader in CombinedLoader([given for given in dataloaders if given is not None], "sequential").flattened:
        for owner in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                found[id(generator)] = generator
    states = {key: generator.get_state() for key, generator in found.items()}
    try:
        yield
    finally:
        for key, generator in found.items():
            generator.set_state(states[key])
