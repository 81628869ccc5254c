"""torch-pruning's dependency graph, told what autograd does not say: which output of a split is read, and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Operations with several outputs, by the names of their autograd functions.
_APART = ("split", "unbind")
# How often a search passes through a view: there and back, from two sides.
_PASSES = 4


class Watch(TorchFunctionMode):
    """Notes shapes of views while a network runs, and gives each output of a split an operation of its own.

    torch-pruning takes the readers of a split for its outputs, in the order it finds them. One output with two readers,
    or one without any, shifts all others.

    Attributes:
        shapes: Of each view, by its autograd function: the shape before and after.
        counts: Of each split, by its autograd function: how many outputs it has.
        parts: Of each split of the last dimension of ``(batch, positions, channels)``: the sizes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[Any, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.counts: dict[Any, int] = {}
        self.parts: dict[Any, list[int]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            if args and isinstance(args[0], Tensor) and "View" in _name(result):
                self.shapes[result.grad_fn] = (tuple(args[0].shape), tuple(result.shape))
        elif type(result) in (tuple, list) and result and _is_split(result):
            parts = _by_sizes(args[0], result) if args else result
            self.counts[parts[0].grad_fn] = len(parts)
            if args and _splits_rows(args[0], parts[0]):
                self.parts[parts[0].grad_fn] = [part.shape[-1] for part in parts]
            return type(result)(part * 1 for part in parts)
        return result


def _is_split(parts: Sequence[Any]) -> bool:
    return all(isinstance(part, Tensor) for part in parts) and any(word in _name(parts[0]).lower() for word in _APART)


def _by_sizes(x: Any, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split by the sizes that came out: of equal parts autograd keeps no sizes."""
    if not isinstance(x, Tensor) or x.dim() != parts[0].dim():
        return parts
    axes = [axis for axis in range(x.dim()) if x.shape[axis] != parts[0].shape[axis]]
    return x.split([part.shape[axes[0]] for part in parts], axes[0]) if axes else parts


def _splits_rows(x: Any, part: Tensor) -> bool:
    return isinstance(x, Tensor) and x.dim() == part.dim() == 3 and x.shape[:2] == part.shape[:2]


def _name(value: Tensor) -> str:
    return "" if value.grad_fn is None else value.grad_fn.name()


def dependency_graph(watch: Watch) -> Any:
    """Make the graph, of a network that will run under ``watch``.

    It is asked for the kind of each layer some ten times; here it is told once.
    """
    from torch_pruning import DependencyGraph

    class Graph(DependencyGraph):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._pruners: dict[Any, Any] = {}
            self._mapped = self._most = 0
            self.endless: set[int] = set()

        def get_pruner_of_module(self, module: Any) -> Any:
            found = self._pruners.get(id(module))
            if found is None:
                # With the layer itself, so that no other one comes to have its id.
                found = self._pruners[id(module)] = (super().get_pruner_of_module(module), module)
            return found[0]

        def _build_dependency(self, module2node: dict[Any, Any]) -> None:
            for node in module2node.values():
                if node.grad_fn in watch.counts:
                    _order_outputs(node, watch.counts[node.grad_fn])
            super()._build_dependency(module2node)

        def build_dependency(self, *args: Any, **kwargs: Any) -> Any:
            result = super().build_dependency(*args, **kwargs)
            for node in self.module2node.values():
                if node.grad_fn in watch.shapes:
                    _map_rows(node, *watch.shapes[node.grad_fn])
                if node.grad_fn in watch.parts:
                    _map_parts(node, watch.parts[node.grad_fn])
            self._most = _PASSES * sum(math.prod(after[1:]) for _, after in watch.shapes.values())
            _watch_views(self)
            return result

        def get_pruning_group(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            """Give a group; one whose search had to be stopped is among ``endless``, by the identity of its root.

            Attention over images with convolutions over its heads is taken for more and more channels at each turn.
            """
            self._mapped = 0
            group = super().get_pruning_group(module, *args, **kwargs)
            if self._mapped > self._most:
                self.endless.add(id(module))
            return group

        def passes(self, channels: int) -> bool:
            """Count channels that a search follows through a view, and say whether it may go on."""
            self._mapped += channels
            return self._mapped <= self._most

    return Graph()


def groups_of(graph: Any, kinds: tuple[type[nn.Module], ...]) -> list[Any]:
    """Give torch-pruning's groups, each from the layer with the most channels.

    From a layer behind a split a group holds only a part of the channels in front of it.
    """
    found: dict[int, Any] = {}
    for group in graph.get_all_groups(ignored_layers=[], root_module_types=kinds):
        root, count = group[0].dep.target.module, len(group[0].idxs)
        for item in group:
            layer = item.dep.target.module
            if isinstance(layer, kinds) and graph.is_out_channel_pruning_fn(item.dep.handler):
                channels = graph.get_out_channels(layer)
                if channels > max(count, len(item.idxs)):
                    root, count = layer, channels
        if root is not group[0].dep.target.module:
            prune = graph.get_pruner_of_module(root).prune_out_channels
            group = graph.get_pruning_group(root, prune, list(range(count)))
        found.setdefault(id(root), group)
    return list(found.values())


def _order_outputs(node: Any, count: int) -> None:
    """Put the outputs of a split in their own order, with a node that nothing reads where one is not read."""
    from torch_pruning import ops
    from torch_pruning.dependency.node import Node

    readers = {
        place: reader
        for reader in node.outputs
        for function, place in reader.grad_fn.next_functions
        if function is node.grad_fn
    }
    if len(readers) < len(node.outputs):
        return  # read by other ways than through `Watch`
    outputs = []
    for place in range(count):
        reader = readers.get(place)
        if reader is None:
            reader = Node(ops._ElementWiseOp(-1, "unread"), None)
            reader.add_input(node)
        outputs.append(reader)
    node.outputs = outputs


def _map_rows(node: Any, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """Say which channels a view puts into one of several rows, as selective kernels do: every n-th.

    torch-pruning takes neighbours, as a flattened image has them.
    """
    from torch_pruning import ops

    if len(before) < 2 or len(after) < 3 or before[1] != after[1] * after[2] or 1 in after[1:3]:
        return
    ways = [(dep, way) for end in (node, *node.outputs) for dep in end.dependencies for way in dep.index_mapping[:1]]
    ways = [(dep, way) for dep, way in ways if dep.source is node or dep.target is node]
    flattened = [(dep, way) for dep, way in ways if getattr(way, "_stride", None) == after[1]]
    for dep, way in flattened:
        dep.index_mapping[0] = _Rows(after[1], after[2], to_row=way.reverse)
    if flattened:
        node.type = ops.OPTYPE.ELEMENTWISE  # or it is mapped again, its own way


def _map_parts(node: Any, sizes: list[int]) -> None:
    """Say which channels go into which part: torch-pruning maps only splits of the second dimension, that of images."""
    from torch_pruning.dependency.index_mapping import _SplitIndexMapping

    if len(node.outputs) != len(sizes):
        return
    offsets = [0, *accumulate(sizes)]
    node.module.split_sizes, node.module.offsets = sizes, offsets
    for part, ends in zip(node.outputs, pairwise(offsets), strict=True):
        for source, target in ((node, part), (part, node)):
            for dep in source.dependencies:
                if dep.target is target:
                    dep.index_mapping[0] = _SplitIndexMapping(offset=ends, reverse=source is part)


def _watch_views(graph: Any) -> None:
    """Have the graph count what its searches follow through views."""
    from torch_pruning import ops

    nodes = list(graph.module2node.values())
    for node in nodes:
        for dep in node.dependencies:
            if ops.OPTYPE.RESHAPE in (dep.source.type, dep.target.type) and dep.index_mapping[0] is not None:
                dep.index_mapping[0] = _Counted(dep.index_mapping[0], graph.passes)
    for node in nodes:
        if node.type is ops.OPTYPE.RESHAPE:
            node.type = ops.OPTYPE.ELEMENTWISE  # or it is mapped again, uncounted


class _Counted:
    """A way between channels, as long as a search may go on."""

    def __init__(self, way: Callable[[list[Any]], list[Any]], passes: Callable[[int], bool]) -> None:
        self.way, self.passes = way, passes
        # Into how many one channel goes; a list that is too long is not even made.
        self.factor = 1 if getattr(way, "reverse", True) else getattr(way, "_stride", 1)

    def __call__(self, indices: list[Any]) -> list[Any]:
        """Map indices that know the root's; to none where the search is to stop."""
        return self.way(indices) if self.passes(len(indices) * self.factor) else []


class _Rows:
    """Between channels and their positions in rows of equal length."""

    def __init__(self, rows: int, length: int, *, to_row: bool) -> None:
        self.rows, self.length, self.to_row = rows, length, to_row

    def __call__(self, indices: list[Any]) -> list[Any]:
        """Map indices that know the root's."""
        from torch_pruning._helpers import _HybridIndex

        if self.to_row:
            found = [_HybridIndex(idx=index.idx % self.length, root_idx=index.root_idx) for index in indices]
            return list(dict.fromkeys(found))
        return [
            _HybridIndex(idx=index.idx + row * self.length, root_idx=index.root_idx)
            for row in range(self.rows)
            for index in indices
        ]
