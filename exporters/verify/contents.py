"""What a written file must hold, from its own contents and those of the network it was written from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Set

from torch import nn

from lightning_edge.contents import Contents, Placements
from lightning_edge.errors import ExportError
from lightning_edge.exporters.artifact import Artifact
from lightning_edge.exporters.passes.base import run_passes
from lightning_edge.exporters.passes.precision import (
    activation_bits,
    float_layers,
    float_products,
    has_recurrent_layers,
    int8_weight_count,
)
from lightning_edge.exporters.passes.trim_kernels import trim_kernels
from lightning_edge.network import Deployable
from lightning_edge.user_warnings import EdgeWarning, warn
from lightning_edge.wording import counted


class ExportWarning(EdgeWarning):
    """A file runs, but not all of it the way an int8 file for this target should."""


_SOURCES = {
    "the file": "the file says",
    "the runtime": "the runtime says",
    "compute plan": "the compute plan says",
    "op support": "the runtime's list of supported operations says",
}


def check_activations(network: Deployable, target: str, widths: Set[int]) -> None:
    """Make sure that a target has kernels for the network's quantized activations, before anything is written.

    Raises:
        ExportError: If some are wider than the target can compute with.
    """
    missing = activation_bits(network.graph) - widths
    if missing:
        raise ExportError(
            f"{target}: layers of the network have {max(missing)}-bit activations ('int8_a16' in its plan), and this "
            f"target's kernels take {', '.join(map(str, sorted(widths)))} bits only. Make these layers 'int8' or "
            "'float', or export to a target that has them: tflite."
        )


def check_contents(network: Deployable, contents: Contents, target: str, *, wants_delegate: bool = True) -> None:
    """Make sure that the file is of the network's precision and is delegated at all.

    Args:
        network: What was exported.
        contents: What the file says of itself.
        target: Name of the target, for the message.
        wants_delegate: Whether a delegate was asked for at all.

    Raises:
        ExportError: If an int8 network became a file without int8 weights, or with more products in float than
            `float_products` of the network, where none are of recurrent layers; or if nothing is handed to the
            target's delegate.
    """
    if wants_delegate and contents.delegated_ops == 0:
        raise ExportError(
            f"{target}: none of the file's operations ({_counted(contents.undelegated_ops or ())}) is handed to the "
            "delegate, so it would run on slow reference kernels. Use layers that the delegate has, or another target."
        )
    if wants_delegate and contents.undelegated_ops:
        names = _counted(contents.undelegated_ops)
        _warn(target, f"these operations run outside the delegate, on slower kernels: {names}")
    if network.precision == "fp32":
        return
    if not contents.int8_weight_bytes:
        raise ExportError(
            f"{target}: the network is int8 but the file holds no int8 weights "
            f"({contents.float_weight_bytes} bytes are float). Operations in it: {_counted(contents.ops)}."
        )
    wanted = float_products(network.graph)
    if len(contents.float_compute_ops) > len(wanted) and not _is_all_but_recurrent(network, contents):
        allowed = f" (of the network itself, {_counted(wanted)} may stay in float)" if wanted else ""
        raise ExportError(
            f"{target}: the network is int8 but the file computes in float: {_counted(contents.float_compute_ops)}"
            f"{allowed}. The target's converter made no int8 of these: keep them in float (skip=[...] of Quantize "
            "or quantize), write them in another way, leave the target out, or export the network as fp32."
        )
    kept = float_layers(network.graph)
    if len(contents.float_compute_ops) < len(kept):
        raise ExportError(
            f"{target}: {counted(len(kept), 'layer')} of the network should be float by its plan "
            f"({', '.join(map(str, kept))}), but the file computes only {_counted(contents.float_compute_ops)} "
            "in float. Quantize these layers, or leave the target out."
        )
    if contents.float_compute_ops or contents.float_ops:
        names = _counted((*contents.float_compute_ops, *contents.float_ops))
        _warn(target, f"an int8 file, but these operations in it compute in float: {names}")


def _is_all_but_recurrent(network: Deployable, contents: Contents) -> bool:
    """Whether a network has recurrent layers, and a file all int8 weights that the passes leave."""
    if not has_recurrent_layers(network.graph):
        return False
    left = run_passes(network.graph, (trim_kernels,))
    return contents.int8_weight_bytes >= int8_weight_count(left, without_zeros=contents.sparse_weight_bytes > 0)


def check_fallback(placements: Placements | None, limit: float | None, target: str) -> None:
    """Make sure that no more of a file's work than allowed falls back to the runtime's own CPU kernels.

    Args:
        placements: Where its operations run; ``None`` where nothing says.
        limit: Largest share of the multiply-accumulates, 0 to 1; ``None`` for any.
        target: Name of the target, for the message.

    Raises:
        ExportError: If more does; with the operations, the costliest first.
    """
    share = None if placements is None else placements.fallback_share
    if placements is None or share is None:
        if limit is not None:
            _warn(
                target,
                f"max_fallback={limit} cannot be checked here: only the device's own runtime tells what it runs where",
            )
        return
    if not placements.fallback:
        return
    ops = ", ".join(f"{entry.count} x {entry.op} ({entry.macs:,} MACs)" for entry in placements.fallback)
    summary = f"{share:.1%} of the multiply-accumulates run outside the delegate, as {_SOURCES[placements.told_by]}"
    if limit is not None and share > limit:
        raise ExportError(
            f"{target}: {summary}, and max_fallback={limit} allows {limit:.1%}: {ops}. Replace these operations by "
            "ones that the delegate has, leave the target out, or allow more."
        )
    if placements.told_by != "the file":  # check_contents has told of these
        _warn(target, f"{summary}: {ops}")


def check_share(max_fallback: float | None) -> None:
    """Refuse a share that is none.

    Raises:
        ValueError: If it is not between 0 and 1.
    """
    if max_fallback is not None and not 0 <= max_fallback <= 1:
        raise ValueError(
            f"max_fallback={max_fallback!r} is not allowed; give a share from 0 to 1, or None for no limit"
        )


def _counted(names: Iterable[str]) -> str:
    counts = names if isinstance(names, dict) else Counter(names)
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in sorted(counts.items())) or "none"


def warn_not_run(artifact: Artifact) -> None:
    """Warn of a file that cannot run here, if it is one: what it computes was not looked at."""
    if artifact.not_run is not None:
        _warn(
            artifact.target,
            f"{artifact.path.name} was written and its contents were checked, but it was NOT run: {artifact.not_run}. "
            "Nothing shows that it computes what the network does",
        )


def warn_uneven_groups(
    target: str, network: nn.Module, inputs_of: Callable[[nn.Module], int], size: int, then: str
) -> None:
    """Warn of the layers whose inputs are no whole number of groups.

    Args:
        target: Name of the target.
        network: A network in the form of a file.
        inputs_of: How many inputs of a layer are divided; 0 where none are.
        size: Inputs in a group.
        then: What becomes of such a layer.
    """
    uneven = [
        f"{name.removeprefix('network.')!r} ({inputs} inputs)"
        for name, module in network.named_modules()
        if (inputs := inputs_of(module)) % size
    ]
    if uneven:
        _warn(target, f"the inputs of {', '.join(uneven)} are no multiple of {size}, and {then}")


def warn_if(target: str, message: str | None) -> None:
    """Warn of something in a file, if there is something."""
    if message:
        _warn(target, message)


def _warn(target: str, message: str) -> None:
    warn(f"{target}: {message}", ExportWarning)
