"""What was done to a network, in order: repeat it on a fresh one, with or without a Trainer.

A checkpoint carries it under `KEY`, as plain values and tensors: ``{"changes": [...], "float_state": {...}}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_edge.errors import RecordError
from lightning_edge.quantization import detach
from lightning_edge.quantization.network import CHILD
from lightning_edge.quantization.phase import Quantize
from lightning_edge.schedule import Change, Phase
from lightning_edge.surgery import find_network

KEY = "lightning_edge"

# Literal, so that nothing a file names is imported.
PHASES: dict[str, type[Phase]] = {Quantize.name: Quantize}


def restore(network: nn.Module, changes: Sequence[Change]) -> None:
    """Bring ``network`` into the structure that ``changes`` lead to, from whatever structure it has.

    Raises:
        RecordError: If a change is of a phase this version does not know.
    """
    detach(network)
    for change in changes:
        if change.get("phase") not in PHASES:
            raise RecordError(
                f"the checkpoint records a change by phase {change.get('phase')!r}; this version knows "
                f"{sorted(PHASES)}. Use the lightning-edge version that wrote it."
            )
        PHASES[change["phase"]].restore(network, change)


def load_compressed(checkpoint: str | Path, module: nn.Module, name: str | None = None) -> nn.Module:
    """Load a checkpoint of a compressed training into a fresh module, without a Trainer.

    Args:
        checkpoint: Path of a checkpoint that Lightning wrote.
        module: The LightningModule, newly made.
        name: Its submodule that was compressed, as given to ``EdgeCompressionCallback(module=...)``.

    Returns:
        ``module``, compressed as it was when the checkpoint was written, with its weights, in eval mode.

    Raises:
        RecordError: If the file is no checkpoint, or its weights do not fit the module.
    """
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        changes, weights = state.get(KEY, {}).get("changes", []), state["state_dict"]
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises many kinds for what is no checkpoint
        raise RecordError(
            f"{str(checkpoint)!r} is not a Lightning checkpoint that loads with weights_only=True: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not changes and any(f".{CHILD}." in f".{key}" for key in weights):
        raise RecordError(
            f"{str(checkpoint)!r} holds int8 ranges and no record of what was quantized: it was saved with "
            "weights_only=True after training, or by a Trainer without EdgeCompressionCallback. Save it with "
            "trainer.save_checkpoint(path), or during training."
        )
    restore(find_network(module, name), changes)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise RecordError(f"the weights of {str(checkpoint)!r} do not fit {type(module).__name__}: {error}") from error
    return module.eval()


def to_checkpoint(changes: Sequence[Change], float_state: dict[str, Any] | None) -> dict[str, Any]:
    """Give what a checkpoint carries under `KEY`."""
    return {"changes": list(changes), "float_state": float_state}
