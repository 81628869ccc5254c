"""What was done to a network, in order: repeat it on a fresh one, with or without a Trainer.

A network carries its own record, so that it can be brought from one structure into another. A checkpoint carries it
under `KEY`, as plain values and tensors: ``{"changes": [...], "settings": {...}, "float_state": {...}, ...}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_edge.distillation.phase import Distill
from lightning_edge.errors import CompressionError, RecordError, first_line, printable
from lightning_edge.factorization import Factorize
from lightning_edge.plain_values import as_typed, cut
from lightning_edge.pruning import Prune
from lightning_edge.quantization import detach, is_quantized
from lightning_edge.quantization.network import CHILD
from lightning_edge.quantization.phase import Quantize
from lightning_edge.record_check import check_record
from lightning_edge.regular_files import check_regular
from lightning_edge.schedule import Change, Phase
from lightning_edge.sparsity import Sparsify
from lightning_edge.succession import Succession
from lightning_edge.surgery import find_network, misfits

KEY = "lightning_edge"

# Literal, so that nothing a file names is imported.
PHASES: dict[str, type[Phase]] = {phase.name: phase for phase in (Factorize, Prune, Sparsify, Quantize, Distill)}

# On the network itself, beside its parameters.
_ATTRIBUTE = "_lightning_edge_changes"
_MOST_TOLD = 400


def changes_of(network: nn.Module) -> list[Change]:
    """Everything that was done to ``network``, oldest first."""
    changes = network.__dict__.get(_ATTRIBUTE, [])
    if not is_quantized(network):  # it may have been detached by hand
        changes = [change for change in changes if change["phase"] != Quantize.name]
    return list(changes)


def perform(network: nn.Module, change: Change) -> Succession:
    """Make a change and put it into the network's record; one that says ``replaces`` takes the place of its like.

    Raises:
        RecordError: If the change is of a phase this version does not know.
    """
    succession = _phase_of(change).perform(network, change)
    assert isinstance(succession, Succession)
    changes = changes_of(network)
    if change.get("replaces"):
        kind = (change["phase"], change["kind"])
        changes = [earlier for earlier in changes if (earlier["phase"], earlier["kind"]) != kind]
    network.__dict__[_ATTRIBUTE] = [*changes, change]
    return succession


def restore(network: nn.Module, changes: Sequence[Change]) -> None:
    """Bring ``network`` into the structure that ``changes`` lead to, from whatever structure it has.

    Its weights are to be loaded afterwards.

    Raises:
        RecordError: If a change is of a phase this version does not know.
    """
    for change in changes:
        _phase_of(change)
    present = changes_of(network)
    if _same(present, list(changes)):
        # It has this structure. Made anew, its parameters would leave the optimizers that hold them.
        network.__dict__[_ATTRIBUTE] = list(changes)
        return
    detach(network)
    for change in reversed(present):
        if change["phase"] != Quantize.name:
            _phase_of(change).undo(network, change)
    network.__dict__[_ATTRIBUTE] = []
    for change in changes:
        perform(network, change)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype
        return both and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _phase_of(change: Change) -> type[Phase]:
    if change.get("phase") not in PHASES:
        raise RecordError(
            f"the checkpoint records a change by phase {change.get('phase')!r}; this version knows {sorted(PHASES)}. "
            "Use the lightning-edge version that wrote it."
        )
    return PHASES[change["phase"]]


def check_agreement(saved: Mapping[str, Any], phases: Sequence[Phase]) -> None:
    """Refuse to go on with other phases or settings than those of the checkpoint.

    Args:
        saved: What the checkpoint carries under `KEY`.
        phases: The phases of this run.

    Raises:
        RecordError: If they differ; the message shows both.
    """
    then, now = saved.get("settings", {}), settings_of(phases)
    lines = []
    for name in sorted({*then, *now}):
        if name not in now or name not in then:
            lines.append(f"{name}: checkpoint {_words(then.get(name))}; this run {_words(now.get(name))}")
            continue
        for setting in sorted({*then[name], *now[name]}):
            before, after = then[name].get(setting), now[name].get(setting)
            # 1 is an epoch and 1.0 the end of training.
            if before != after or type(before) is not type(after):
                lines.append(f"{name}.{setting}: checkpoint {before!r}; this run {after!r}")
    if lines:
        raise RecordError(
            "the checkpoint and this run disagree on the compression:\n  "
            + "\n  ".join(lines)
            + "\nResume with the checkpoint's settings, or begin a new training from its weights: "
            "lightning_edge.load_compressed(checkpoint, module)."
        )


def settings_of(phases: Sequence[Phase]) -> dict[str, dict[str, Any]]:
    """Give the settings of every phase, by name."""
    return {phase.name: phase.settings() for phase in phases}


def _words(settings: Mapping[str, Any] | None) -> str:
    return "has no such phase" if settings is None else f"has it with {dict(settings)}"


def load_compressed(checkpoint: str | Path, module: nn.Module, name: str | None = None) -> nn.Module:
    """Load a checkpoint of a compressed training into a fresh module, without a Trainer.

    Args:
        checkpoint: Path of a checkpoint that Lightning wrote.
        module: The LightningModule, newly made.
        name: Its submodule that was compressed, as given to ``EdgeCompressionCallback(module=...)``.

    Returns:
        ``module``, compressed as it was when the checkpoint was written, with its weights, in eval mode.

    Raises:
        RecordError: If the file is no checkpoint, its record is not one of this package or does not fit the module, or
            its weights do not fit or are not finite.
    """
    try:
        check_regular(Path(checkpoint))
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights = {as_typed(name, str, "a name in state_dict"): value for name, value in state["state_dict"].items()}
        saved = state.get(KEY)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises many kinds for what is no checkpoint
        raise RecordError(
            f"{str(checkpoint)!r} is not a Lightning checkpoint that loads with weights_only=True: {first_line(error)}"
        ) from error
    changes = checked(saved, repr(str(checkpoint))).get("changes", [])
    if not changes and any(f".{CHILD}." in f".{key}" for key in weights):
        raise RecordError(
            f"{str(checkpoint)!r} holds int8 ranges and no record of what was quantized: it was saved with "
            "weights_only=True after training, or by a Trainer without EdgeCompressionCallback. Save it with "
            "trainer.save_checkpoint(path), or during training."
        )
    network = find_network(module, name)
    try:
        restore(network, changes)
    except CompressionError as error:
        raise RecordError(f"what {str(checkpoint)!r} records does not fit {type(module).__name__}: {error}") from error
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:  # the latter two where what is loaded is no tensor
        raise RecordError(
            f"the weights of {str(checkpoint)!r} do not fit {type(module).__name__}: "
            f"{misfits(module, weights, error)}. Build it with the settings that it was trained with"
        ) from error
    for name, parameter in network.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise RecordError(
                f"{str(checkpoint)!r} holds values that are not finite in {name!r}: the training diverged. Load an "
                "earlier checkpoint"
            )
    return module.eval()


def checked(saved: Any, checkpoint: str) -> dict[str, Any]:
    """Give what a checkpoint carries under `KEY`, if it is what this package writes.

    Args:
        saved: The value there; ``None`` if there is none.
        checkpoint: What an error calls the checkpoint.

    Raises:
        RecordError: If it is anything else.
    """
    try:
        return check_record(saved)
    except ValueError as error:
        told = printable(cut(str(error), _MOST_TOLD))
        raise RecordError(
            f"the record of compression in {checkpoint} cannot be used: {told}. Load an earlier checkpoint, or use the "
            "lightning-edge version that wrote it"
        ) from error
