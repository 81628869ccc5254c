"""Layers that do something in training only: stochastic depth, DropBlock, noise, of whatever library.

Such a layer gives its input back in evaluation, has nothing to learn, and draws random numbers in training, so that the
graphs of the two modes differ. For capturing it is made a dropout, which is taken out of graphs and put back behind the
quantizers; what is put back calls the layer itself. LayerDrop, which decides by random numbers which layers run (Fan et
al. 2019, arXiv:1909.11556), cannot be put back: all layers run. Knows torch only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_edge.network import Inputs
from lightning_edge.surgery import in_mode, redirected

# Of the dropout that stands for such a layer; nothing reads it but whether it is above zero.
_PROBABILITY = 0.5


class Regularizer:
    """What `GraphDropout` calls in the place of an operation: the user's layer, in training.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, probability: float, training: bool) -> Tensor:
        """Call the layer, which knows its own probability and mode."""
        result: Tensor = self.layer(x)
        return result


@torch.no_grad()
def find_regularizers(network: nn.Module, inputs: Inputs) -> dict[str, nn.Module]:
    """Find the layers that only training sees, by running a network once.

    Args:
        network: The network, which is left as it is, its random numbers too.
        inputs: One call of it.

    Returns:
        By name, each layer without parameters, buffers and children that is none of torch's own, gave every tensor back
        as it was in evaluation, and makes one of the same shape and type of it in training.
    """
    layers = {name: layer for name, layer in network.named_modules() if _is_plain(layer)}
    if not layers:
        return {}
    seen: dict[nn.Module, Tensor | None] = {}

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        passes = len(args) == 1 and not kwargs and output is args[0] and isinstance(output, Tensor)
        seen[layer] = output if passes and output.is_floating_point() and seen.get(layer, output) is not None else None

    handles = [layer.register_forward_hook(look, with_kwargs=True) for layer in layers.values()]
    devices = {tensor.device for tensor in inputs.tensors if tensor.is_cuda}
    try:
        with in_mode(network, False), torch.random.fork_rng(devices=devices):
            network(*inputs.args, **inputs.kwargs)
    except Exception:  # what the network cannot do here torch.export says better
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return {name: layer for name, layer in layers.items() if _keeps_form(layer, seen.get(layer), devices)}


@contextmanager
def as_dropouts(layers: dict[str, nn.Module]) -> Iterator[None]:
    """Have each layer appear as a dropout in the graphs that are captured meanwhile."""
    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(redirected(layer, _Dropout(layer)))
        yield


class _Dropout:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, _PROBABILITY, self.layer.training)


def _is_plain(layer: nn.Module) -> bool:
    held = (*layer._parameters.values(), *layer._buffers.values(), *layer._modules.values())
    return not held and not type(layer).__module__.startswith("torch.nn.")


def _keeps_form(layer: nn.Module, x: Tensor | None, devices: set[torch.device]) -> bool:
    """Whether a layer makes another tensor of the same form in training."""
    if x is None:
        return False
    try:
        with in_mode(layer, True), torch.random.fork_rng(devices=devices):
            result = layer(x.clone())
    except Exception:
        return False
    return isinstance(result, Tensor) and result.shape == x.shape and result.dtype == x.dtype


class LayersStay(TorchFunctionMode):
    """Has a single random number from 0 to 1 be 1, so that ``torch.rand([]) < probability`` leaves no layer out.

    Attributes:
        draws: How many there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, but for one that draws a single number."""
        if func is torch.rand:
            size = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            if all(length == 1 for length in size):
                self.draws += 1
                # Made of a Python number, whose value is known while a network is captured.
                return torch.tensor(1.0).reshape(tuple(size))
        return func(*args, **(kwargs or {}))
