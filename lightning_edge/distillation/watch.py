"""Sees what a network returns and what its layers compute, during training calls and in no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_edge.distillation.outputs import named_outputs
from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.quantization import is_quantized, quantized_forward
from lightning_edge.quantization.feature_taps import add_taps, remove_taps

Features = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Seen:
    """One call of a network.

    Attributes:
        output: What it returned.
        features: What each watched layer returned, one tensor for each time it was called.
    """

    output: Any
    features: Features


class Recorder:
    """Collects the outputs of layers while it is open."""

    def __init__(self) -> None:
        self._features: Features | None = None

    def open(self) -> None:
        """Collect from here on."""
        self._features = {}

    def close(self) -> Features | None:
        """Give what was collected; ``None`` if it was not open."""
        features, self._features = self._features, None
        return features

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def take(self, name: str, output: Any) -> None:
        """Keep a copy of an output, which an in-place activation behind the layer would write over.

        Raises:
            CompressionError: If it is not one tensor.
        """
        if self._features is None:
            return
        tensors = list(named_outputs(output).values())
        if len(tensors) != 1:
            raise CompressionError(
                f"layer {name!r} returns {len(tensors)} tensors of floating point ({type(output).__name__}), and a "
                "feature is one; name a layer inside or behind it"
            )
        self._features.setdefault(name, []).append(tensors[0].clone())


class Watch:
    """Hooks on a network that are there only while a training step runs, so that copies of it have none.

    Args:
        network: The student, float or quantized.
        layers: Names of the layers whose outputs are wanted.
        ask: Asks the teacher, before the student computes.
        called: Told what was seen of both, after.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        ask: Callable[[Inputs], Seen],
        called: Callable[[Seen, Seen], None],
    ) -> None:
        self.network = network
        self.layers = list(layers)
        self._ask = ask
        self._called = called
        self._answer: Seen | None = None
        self._recorder = Recorder()
        self._suspended = False
        if is_quantized(network):
            remove_taps(quantized_forward(network)[1])
            if layers:
                add_taps(quantized_forward(network)[1], self.layers, self._recorder.take)
        else:
            for name in layers:
                layer_of(network, name)

    def remove(self) -> None:
        """Leave the network as it was."""
        if is_quantized(self.network):
            remove_taps(quantized_forward(self.network)[1])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the network's training calls while the context lasts."""
        with ExitStack() as stack:
            before = self.network.register_forward_pre_hook(self._before, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(self.network.register_forward_hook(self._after).remove)
            if self.layers and not is_quantized(self.network):
                # Compiled code does not call hooks that were not there when it was compiled.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                for name in self.layers:
                    stack.callback(hook_layer(self.network, name, self._recorder).remove)
            stack.callback(self._recorder.close)
            yield

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """See nothing while the context lasts."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, network: nn.Module, args: Any, kwargs: Any) -> None:
        self._recorder.close()
        # Manual optimization of several networks turns the gradients of all but one off.
        learns = any(tensor.requires_grad for tensor in (*network.parameters(), *Inputs(args, kwargs).tensors))
        if network.training and learns and torch.is_grad_enabled() and not self._suspended:
            # First the teacher: while the student's activations lie in memory, it would need as much again.
            with self.suspended():
                self._answer = self._ask(Inputs(args, kwargs))
            self._recorder.open()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, network: nn.Module, args: Any, output: Any) -> None:
        features = self._recorder.close()
        if features is None:
            return
        # Copies, as training_step may write into what it was given.
        seen = Seen(pytree.tree_map_only(Tensor, Tensor.clone, output), features)
        answer, self._answer = self._answer, None
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves((output, features))):
            assert answer is not None
            self._called(seen, answer)


def layer_of(network: nn.Module, name: str) -> nn.Module:
    """Give a submodule by name.

    Raises:
        CompressionError: If there is none.
    """
    layers = dict(network.named_modules(remove_duplicate=False))
    if name not in layers or not name:
        names = ", ".join(repr(other) for other in layers if other and not other.startswith("edge_"))
        raise CompressionError(f"{type(network).__name__} has no layer {name!r}; it has: {names}.")
    layer: nn.Module = layers[name]
    return layer


def hook_layer(network: nn.Module, name: str, recorder: Recorder) -> torch.utils.hooks.RemovableHandle:
    """Let a recorder take the outputs of a layer."""

    def take(layer: nn.Module, args: Any, output: Any) -> None:
        recorder.take(name, output)

    return layer_of(network, name).register_forward_hook(take)
