"""The one way a captured graph is called, and how a user's call is brought into it. Knows torch only."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs


class CallShape:
    """What a graph was captured with: which arguments by position and by keyword, their shapes and constants.

    A graph keeps Python values and all dimensions but the batch as constants, so a call that differs there would be
    answered with the captured values, silently.

    Args:
        network: Class of the network, whose ``forward`` names the arguments.
        inputs: The call it was captured with.
    """

    def __init__(self, network: type[nn.Module], inputs: Inputs) -> None:
        self.network = network
        self.positional = len(inputs.args)
        self.keywords = list(inputs.kwargs)
        leaves, self.spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
        batch_size = inputs.batch_size
        self.leaves = [_describe(leaf, batch_size) for leaf in leaves]
        first = inputs.args[0] if len(leaves) == 1 and inputs.args else None
        # Shape of a single tensor beyond the batch, the call that nearly all networks have.
        self.single = tuple(first.shape[1:]) if isinstance(first, Tensor) and first.dim() else None

    def arrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments by position and by keyword in the captured form.

        Raises:
            CompressionError: As `match` does.
        """
        only: Any = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(only, Tensor) and only.dim() and tuple(only.shape[1:]) == self.single:
            return args, kwargs
        matched: tuple[tuple[Any, ...], dict[str, Any]] = self._matched(args, kwargs)
        return matched

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _matched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = self.match(args, kwargs)
        return inputs.args, dict(inputs.kwargs)

    def match(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Return the same call in the captured form.

        Raises:
            CompressionError: If it has other arguments, shapes beyond the batch size, or Python values.
        """
        if len(args) != self.positional or list(kwargs) != self.keywords:
            args, kwargs = self._rearrange(args, kwargs)
        inputs = Inputs(args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            raise self._refuse("arguments of this structure", str(spec), str(self.spec))
        batch_size = inputs.batch_size
        for leaf, captured in zip(leaves, self.leaves, strict=True):
            given = _describe(leaf, batch_size)
            # A batch-sized constant dimension and the batch dimension look alike when the batch is of that size.
            if given != captured and given[1:] != captured[1:]:
                raise self._refuse("an argument", _words(given), _words(captured))
        return inputs

    def _rearrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        signature = inspect.signature(self.network.forward)
        try:
            bound = signature.bind(None, *args, **kwargs)
        except TypeError as error:
            raise self._refuse("arguments", str(error), "those of forward()") from error
        given = dict(list(bound.arguments.items())[1:])
        bound.apply_defaults()
        values = dict(list(bound.arguments.items())[1:])
        names = [name for name in values if name not in self.keywords][: self.positional]
        # An argument that was left out when the graph was captured is in it with its default.
        other = {
            name: value
            for name, value in given.items()
            if name not in {*names, *self.keywords} and not _same(value, signature.parameters[name].default)
        }
        missing = [name for name in self.keywords if name not in values]
        if other or missing or len(names) < self.positional:
            raise self._refuse("arguments", str(list(given)), str([*names, *self.keywords]))
        return tuple(values[name] for name in names), {name: values[name] for name in self.keywords}

    def _refuse(self, what: str, given: str, captured: str) -> CompressionError:
        return CompressionError(
            f"the quantized {self.network.__name__} was called with {what}: {given}; it was captured with: {captured}. "
            "A quantized graph takes batches of any size, and everything else as in the training step it began with."
        )


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and not isinstance(value, Tensor) and value == default)


def _describe(leaf: Any, batch_size: int) -> tuple[Any, ...]:
    if isinstance(leaf, Tensor):
        first = "batch" if leaf.dim() and leaf.shape[0] == batch_size else tuple(leaf.shape[:1])
        return first, "tensor", tuple(leaf.shape[1:])
    return "constant", type(leaf).__name__, leaf


def _words(leaf: tuple[Any, ...]) -> str:
    if leaf[1] == "tensor":
        return f"a tensor of shape ({leaf[0]}, {', '.join(map(str, leaf[2]))})"
    return f"{leaf[2]!r}"
