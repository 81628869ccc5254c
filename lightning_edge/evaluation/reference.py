"""A network's outputs over a data set, kept so that it runs once for every file that is held against it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_edge.comparison import Comparison, class_scores
from lightning_edge.measure import Agreement
from lightning_edge.network import Deployable, Inputs, flatten_outputs

# Outputs of a whole validation set are small for classes and large for images; beyond this they are computed again.
_KEPT_OUTPUT_BYTES = 256 * 2**20
_KEPT_CALLS = 8


@final
class Reference:
    """A network whose outputs are kept from the first pass over the data, so that it runs once for all its files.

    Args:
        network: The network, in eval mode on the CPU.

    Attributes:
        network: The same.
        sample: The first sample it was ever fed, ``None`` before the first pass.
        calls: The first few calls it answered, whole batches.
        reconstructs: Whether an output has the shape of an input, as an autoencoder's: no class scores then.
        classifies: Whether there are class scores among its outputs.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.sample: Inputs | None = None
        self.calls: list[Inputs] = []
        self.reconstructs = False
        self.classifies = False
        self._kept: dict[int, tuple[int, Any]] = {}
        self._kept_bytes = 0

    def comparison(self, network: Deployable) -> Comparison:
        """Begin to compare a file with the network it was made of: in quantization steps, where that is int8."""
        scales = network.output_scales if network.precision == "int8" else ()
        return Comparison(scales, class_scores=not self.reconstructs)

    @property
    def call(self) -> Inputs:
        """The first sample it was fed."""
        assert self.sample is not None
        return self.sample

    def answers(
        self,
        artifact: Callable[..., Sequence[Tensor]] | None = None,
        comparison: Comparison | None = None,
        sees: Callable[[Inputs], Inputs] | None = None,
    ) -> Callable[..., Any]:
        """Begin a pass: answer calls with this network, or with a file's outputs in this network's structure.

        Args:
            artifact: The file that answers.
            comparison: Collects how far its outputs lie from this network's.
            sees: Gives the values that the file makes of a call's, which this network is then called with too.
        """
        index = -1

        def answer(*args: Any, **kwargs: Any) -> Any:
            nonlocal index
            index += 1
            inputs = Inputs(args, kwargs).map(lambda tensor: tensor.detach().cpu())
            if isinstance(self.network, Deployable):
                inputs = self.network.arranged(inputs)
            if sees is not None:
                inputs = sees(inputs)
            expected = self._outputs(index, inputs)
            if artifact is None:
                return pytree.tree_map_only(Tensor, Tensor.clone, expected)
            outputs = artifact(*inputs.args, **inputs.kwargs)
            if comparison is not None:
                comparison.update(flatten_outputs(expected), outputs)
            return _in_structure(outputs, expected)

        return answer

    def rounding(
        self,
        network: Deployable,
        run: Callable[[Callable[..., Any]], object],
        sees: Callable[[Inputs], Inputs] | None = None,
    ) -> Agreement:
        """Find what an int8 network's own rounding moves its outputs by, this being its exact form.

        Args:
            network: The network in float32, as it was trained.
            run: Makes a pass over the data, given what answers calls.
            sees: As for `answers`.
        """
        comparison = Comparison(network.output_scales, class_scores=False)

        def as_trained(*args: Any, **kwargs: Any) -> list[Tensor]:
            with torch.no_grad():
                return flatten_outputs(network(*args, **kwargs))

        run(self.answers(as_trained, comparison, sees))
        return comparison.result()

    def _outputs(self, index: int, inputs: Inputs) -> Any:
        key = checksum(inputs)
        kept = self._kept.get(index)
        if kept is not None and kept[0] == key:
            return kept[1]
        with torch.no_grad():
            outputs = self.network(*inputs.args, **inputs.kwargs)
        outputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), outputs)
        if kept is None and len(self.calls) < _KEPT_CALLS:
            self.calls.append(inputs)
        if self.sample is None:
            self.sample = inputs.sample()
            shapes = {tensor.shape for tensor in inputs.tensors}
            flat = flatten_outputs(outputs)
            self.reconstructs = any(tensor.shape in shapes for tensor in flat)
            self.classifies = not self.reconstructs and class_scores(flat, flat) is not None
        size = sum(tensor.numel() * tensor.element_size() for tensor in flatten_outputs(outputs))
        if kept is None and self._kept_bytes + size <= _KEPT_OUTPUT_BYTES:
            self._kept[index] = key, outputs
            self._kept_bytes += size
        return outputs


class Collector(Protocol):
    """What takes the flattened outputs of two networks, batch by batch."""

    def update(self, reference: Sequence[Tensor], candidate: Sequence[Tensor], /) -> None:
        """Add a batch."""


def compared_with(floats: Callable[..., Any], answer: Callable[..., Any], comparison: Collector) -> Callable[..., Any]:
    """Answer calls, and collect how far each answer lies from the float network's."""

    def both(*args: Any, **kwargs: Any) -> Any:
        outputs = answer(*args, **kwargs)
        comparison.update(flatten_outputs(floats(*args, **kwargs)), flatten_outputs(outputs))
        return outputs

    return both


def checksum(inputs: Inputs) -> int:
    """Sum up values, shapes and types of a call's arguments; equal arguments give equal sums."""
    leaves, structure = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
    total = zlib.crc32(repr(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            total = zlib.crc32(f"{leaf.dtype} {tuple(leaf.shape)}".encode(), total)
            total = zlib.crc32(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, total)
        else:
            total = zlib.crc32(repr(leaf).encode(), total)
    return total


def _in_structure(tensors: Sequence[Tensor], like: Any) -> Any:
    leaves, structure = pytree.tree_flatten(like)
    given = iter(tensors)
    return pytree.tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
