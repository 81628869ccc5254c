"""The record in the LightningModule's own checkpoint hooks.

A callback's load hook comes after the weights, and its save hook not at all for checkpoints of weights only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

Checkpoint = dict[str, Any]


def hook(pl_module: LightningModule, load: Callable[[Checkpoint], None], save: Callable[[Checkpoint], None]) -> None:
    """Call ``load`` before the weights of any checkpoint load, and ``save`` for every one that is written."""
    unhook(pl_module)
    users_load, users_save = pl_module.on_load_checkpoint, pl_module.on_save_checkpoint

    def on_load_checkpoint(checkpoint: Checkpoint) -> None:
        load(checkpoint)
        users_load(checkpoint)

    def on_save_checkpoint(checkpoint: Checkpoint) -> None:
        save(checkpoint)
        users_save(checkpoint)

    for ours, users in ((on_load_checkpoint, users_load), (on_save_checkpoint, users_save)):
        ours.original = users  # type: ignore[attr-defined]
        setattr(pl_module, ours.__name__, ours)


def unhook(pl_module: LightningModule) -> None:
    """Take our hooks away, also those that a training which ended in an error left behind."""
    for name in ("on_load_checkpoint", "on_save_checkpoint"):
        original = getattr(pl_module.__dict__.get(name), "original", None)
        if original is None:
            continue
        if getattr(original, "__func__", None) is getattr(type(pl_module), name):
            del pl_module.__dict__[name]
        else:  # the user's own hook, set on the instance
            setattr(pl_module, name, original)
