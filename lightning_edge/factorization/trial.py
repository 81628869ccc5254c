"""Whether a network runs and computes the same with factors in it: tried on copies. Knows torch only.

Whether code somewhere reads ``layer.weight`` cannot be told from the module tree, so both forms are run: one with the
layers in pairs, one with the whole layers and the products of those pairs as weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.factorization.decomposition import Layer, product, split
from lightning_edge.network import Inputs, flatten_outputs
from lightning_edge.surgery import copy_of


class _Disagreement(Exception):
    """Why a network with factors is not the network with their products."""


def try_out(network: nn.Module, ranks: Mapping[str, int], inputs: Inputs) -> float:
    """Run copies of a network with and without factors, in evaluation and as it is in training.

    Random state, buffers and the inputs stay as they are; hooks are not called.

    Args:
        network: The network, unchanged.
        ranks: For each layer to be factorized, its rank.
        inputs: A call of the network.

    Returns:
        By how much the outputs in evaluation change: the norm of the difference, relative to the norm of the outputs.

    Raises:
        CompressionError: If the network cannot be copied or run, or is another with factors in it; with the layers that
            are the reason.
    """
    original = _copied(network)
    try:
        before = _run(original.eval(), inputs)
    except Exception as error:  # whatever the user's own code raises
        raise CompressionError(
            f"a copy of {type(network).__name__} does not run on the batch at hand: {error}"
        ) from error
    try:
        after = _compare(network, ranks, inputs)
    except _Disagreement as disagreement:
        causes = [name for name in ranks if _fails(network, {name: ranks[name]}, inputs)] or list(ranks)
        raise CompressionError(
            f"{type(network).__name__} is another network with factors in place of {', '.join(causes)}: "
            f"{disagreement}. Something uses such a layer other than by calling it. Leave it alone with "
            f"ignore={causes!r}."
        ) from disagreement.__cause__
    return _distance(before, after)


def _fails(network: nn.Module, ranks: Mapping[str, int], inputs: Inputs) -> bool:
    try:
        _compare(network, ranks, inputs)
    except _Disagreement:
        return True
    return False


def _compare(network: nn.Module, ranks: Mapping[str, int], inputs: Inputs) -> list[Tensor]:
    """Give the outputs in evaluation of the network with factors, if they are those of the one with products."""
    factorized, whole = _copied(network), _copied(network)
    for name, rank in ranks.items():
        gone, (first, second) = split(factorized, name, rank)
        # Whatever still reaches the old layer, past the module tree, cannot go unseen.
        gone.data.fill_(torch.nan)
        layer = whole.get_submodule(name)
        assert isinstance(layer, Layer)
        layer.weight.data = product(first.detach(), second.detach())
    outputs: list[Tensor] = []
    for mode in ("training", "evaluation"):
        if mode == "evaluation":
            factorized.eval()
            whole.eval()
        expected = _run(whole, inputs)
        try:
            outputs = _run(factorized, inputs)
        except Exception as error:  # whatever the user's own code raises
            raise _Disagreement(f"in {mode} it does not run ({type(error).__name__}: {error})") from error
        distance = _distance(expected, outputs)
        if not distance <= _tolerance(expected):
            raise _Disagreement(f"in {mode} its outputs are not those of the products (relative error {distance:.2g})")
    return outputs


def _run(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run a copy from a fixed random state."""
    devices = sorted({parameter.device.index or 0 for parameter in network.parameters() if parameter.is_cuda})
    python_state = random.getstate()
    own = inputs.map(lambda tensor: tensor.detach().clone())
    try:
        with torch.random.fork_rng(devices), torch.set_grad_enabled(network.training):
            torch.manual_seed(0)
            random.seed(0)
            outputs = flatten_outputs(network(*own.args, **own.kwargs))
    finally:
        random.setstate(python_state)
    return [output.detach() for output in outputs if output.is_floating_point()]


def _copied(network: nn.Module) -> nn.Module:
    copied = copy_of(network)
    for module in copied.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
        module._backward_pre_hooks.clear()
    return copied


def _distance(expected: list[Tensor], given: list[Tensor]) -> float:
    if [output.shape for output in expected] != [output.shape for output in given]:
        return float("inf")
    difference = size = 0.0
    for theirs, ours in zip(expected, given, strict=True):
        finite = theirs.isfinite()  # a mask's minus infinity is the same in both
        difference += float((theirs[finite].cpu().double() - ours[finite].cpu().double()).square().sum())
        size += float(theirs[finite].cpu().double().square().sum())
    return math.sqrt(difference / size if size else difference)


def _tolerance(outputs: list[Tensor]) -> float:
    """Rounding, also that of TF32 and half precision; what is wrong is wrong by more."""
    half = any(torch.finfo(output.dtype).eps > 1e-4 for output in outputs)
    return 0.1 if half else 0.01
