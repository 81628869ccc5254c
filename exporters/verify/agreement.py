"""How far a file's outputs may lie from the network it was written from, and how far they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_edge.comparison import Comparison
from lightning_edge.errors import AgreementError
from lightning_edge.exporters.artifact import Artifact
from lightning_edge.exporters.run.calls import stack
from lightning_edge.exporters.verify.divergence import explanation
from lightning_edge.exporters.verify.exact import exact
from lightning_edge.exporters.verify.judge import judge
from lightning_edge.measure import Agreement, Tolerance
from lightning_edge.network import Deployable, Inputs, fed, flatten_outputs, sort_keywords
from lightning_edge.verdict import Judgement, MetricChange


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
        inputs = sort_keywords(fed(network, batch)).map(
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


def judge_file(
    network: Deployable,
    artifact: Artifact,
    agreement: Agreement,
    tolerance: Tolerance,
    rounding: Callable[[], Agreement],
    change: MetricChange | None = None,
) -> Judgement:
    """Judge a file, and say of one that is not close where it begins to differ.

    Args:
        network: What was exported.
        artifact: The file.
        agreement: How far it lies from the network.
        tolerance: How far a close one may.
        rounding: Finds what the network's own rounding moves its outputs by, on the same samples.
        change: The user's metric of both, if there is one.
    """
    names = network.output_names()
    found = judge(agreement, network.precision, tolerance, names=names, rounding=rounding, change=change)
    if found.grade in ("exact", "close"):
        return found
    return replace(found, reasons=(*found.reasons, explanation(network, artifact)))


def advice(network: Deployable) -> str:
    """Say what to do about a file that is not what was wanted; one sentence or two."""
    if network.precision == "int8":
        return (
            "Keep the layer that differs in float (skip=[...] of Quantize or quantize) or leave the target out; what "
            "counts as close is set by tolerance=Tolerance(...)"
        )
    return "Leave the target out, or report it as a fault; what counts as close is set by tolerance=Tolerance(...)"
