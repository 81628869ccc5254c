"""How far a file's outputs may lie from the network it was written from, and how far they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_edge.comparison import Comparison
from lightning_edge.errors import AgreementError
from lightning_edge.exporters.artifact import Artifact
from lightning_edge.exporters.run.calls import stack
from lightning_edge.exporters.verify.contents import warn_if
from lightning_edge.exporters.verify.divergence import explanation
from lightning_edge.exporters.verify.exact import exact
from lightning_edge.measure import Agreement, Tolerance
from lightning_edge.network import Deployable, Inputs, flatten_outputs, sort_keywords


def agreement_of(network: Deployable, artifact: Artifact, batches: Iterable[Any] | None = None) -> Agreement:
    """Compare a file's outputs with the network's.

    Args:
        network: What was exported; an int8 one is held to its exact values, see `exact`.
        artifact: The file.
        batches: Inputs of the network, each what `Inputs.of` reads; ``None`` for the network's own sample.
    """
    return _compared(network, artifact, batches, lambda inputs: artifact(*inputs.args, **inputs.kwargs))


def rounding_of(network: Deployable, artifact: Artifact, batches: Iterable[Any] | None = None) -> Agreement:
    """Find what the rounding of an int8 network itself moves its outputs by: float32 against its exact values.

    Args:
        network: What was exported.
        artifact: The file, for the inputs that it sees.
        batches: As for `agreement_of`.
    """
    return _compared(network, artifact, batches, lambda inputs: reference_outputs(network, inputs))


def _compared(
    network: Deployable,
    artifact: Artifact,
    batches: Iterable[Any] | None,
    answer: Callable[[Inputs], Sequence[Tensor]],
) -> Agreement:
    reference = exact(network)
    comparison = Comparison(network.output_scales if network.precision == "int8" else ())
    for batch in [network.inputs] if batches is None else batches:
        inputs = sort_keywords(Inputs.of(batch)).map(
            lambda tensor: tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.detach().cpu()
        )
        inputs = artifact.sees(inputs)
        comparison.update(reference_outputs(reference, inputs), answer(inputs))
    return comparison.result()


def reference_outputs(network: Deployable, inputs: Inputs) -> list[Tensor]:
    """Run the network itself and flatten its outputs, batch first as `Artifact` gives them."""
    with torch.no_grad():
        outputs = flatten_outputs(network(*inputs.args, **inputs.kwargs))
        size = inputs.batch_size
        if all(output.dim() and output.shape[0] == size for output in outputs):
            return outputs
        # An output without batch dimension, such as a mean over it, means something else for one sample.
        samples = [inputs.sample(start) for start in range(size)]
        return stack([flatten_outputs(network(*sample.args, **sample.kwargs)) for sample in samples])


def check_batches(network: Deployable, artifact: Artifact) -> None:
    """Make sure that a file for several samples a call gives for as many as it takes what it gives for one.

    Raises:
        AgreementError: If it does not.
        RunnerError: If it fails to run on one sample, or on as many as it takes.
    """
    most = artifact.contents.interface.max_batch
    if most == 1:
        return
    one = artifact.sees(sort_keywords(network.inputs))
    alone, together = (artifact.run(inputs.tensors) for inputs in (one, one.repeated(most)))
    comparison = Comparison(network.output_scales if network.precision == "int8" else ())
    comparison.update([output.repeat_interleave(most, 0) for output in alone], together)
    if violations := Tolerance().violations(comparison.result(), network.precision, network.output_names()):
        raise AgreementError(
            f"{artifact.target}: {artifact.path.name} gives something else for {most} samples in a call than for one: "
            f"{'; '.join(violations)}. Nothing was written. Leave max_batch out of the Interface."
        )


def violations_of(
    network: Deployable, agreement: Agreement, tolerance: Tolerance, rounding: Callable[[], Agreement]
) -> tuple[list[str], Agreement | None]:
    """Say what lies outside a tolerance, the network's own rounding looked at where something of int8 seems to.

    Returns:
        A line each; and what that rounding moves the outputs by, ``None`` where it was not looked at.
    """
    if not tolerance.violations(agreement, network.precision):
        return [], None
    own = rounding() if network.precision == "int8" and None in (tolerance.max_steps, tolerance.most_steps) else None
    return tolerance.violations(agreement, network.precision, network.output_names(), own), own


def check_agreement(
    network: Deployable,
    artifact: Artifact,
    agreement: Agreement,
    tolerance: Tolerance,
    rounding: Callable[[], Agreement],
) -> None:
    """Make sure that the file computes what the network does.

    Args:
        network: What was exported.
        artifact: The file.
        agreement: How far it lies from the network.
        tolerance: How far it may.
        rounding: Finds what the network's own rounding moves its outputs by, on the same samples.

    Raises:
        AgreementError: If it lies outside the tolerance; the message holds the figures.
    """
    violations, own = violations_of(network, agreement, tolerance, rounding)
    if own is not None and not violations:
        warn_if(
            artifact.target,
            f"{artifact.path.name} lies {agreement.max_steps:.4g} quantization steps off at most, with 99.9 % of the "
            f"values {agreement.most_steps:.4g}. The network's own rounding moves it as far: between float32 and "
            f"float64 by {own.max_steps:.4g} and {own.most_steps:.4g}. That is how hardly trained networks are; "
            "max_steps and most_steps of Tolerance set limits that hold anyway",
        )
    if violations:
        raise AgreementError(
            f"{artifact.target}: {artifact.path.name} computes something else than the network it came from: "
            f"{'; '.join(violations)} (over {agreement.samples} samples). Nothing was written. "
            f"{explanation(network, artifact)}. Keep the layer that differs in float (skip=[...] of Quantize or "
            "quantize) or leave the target out; if you accept the differences, state a wider tolerance=Tolerance(...)."
        )
