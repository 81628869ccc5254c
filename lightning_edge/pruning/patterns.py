"""Match the user's patterns of layer names and types with groups of channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_edge.errors import CompressionError
from lightning_edge.pruning.groups import Group


def ignore(network: nn.Module, groups: Sequence[Group], patterns: Sequence[str]) -> None:
    """Mark the groups whose channels a layer makes that a pattern names, by its name, a parent's, or its type.

    Raises:
        CompressionError: If a pattern names nothing.
    """
    if not patterns:
        return
    types = {name: type(module).__name__ for name, module in network.named_modules() if name}
    for pattern in patterns:
        named = {name for name, kind in types.items() if fnmatchcase(name, pattern) or fnmatchcase(kind, pattern)}
        if not named:
            raise CompressionError(
                f"ignore={list(patterns)!r}: {pattern!r} names no layer of {type(network).__name__} and no type of "
                f"one. Its layers: {_some(list(types))}. Types: {_some(sorted(set(types.values())))}."
            )
        for group in groups:
            if not group.reason and any(_within(maker, named) for maker in group.makers):
                group.reason = f"it is ignored by {pattern!r}"


def matching(group: Group, patterns: Mapping[str, float]) -> str | None:
    """Give the first pattern that names a layer which makes the group's channels, or a parent of one."""
    for pattern in patterns:
        if any(fnmatchcase(parent, pattern) for maker in group.makers for parent in _parents(maker)):
            return pattern
    return None


def _parents(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[: end + 1]) for end in range(len(parts)))


def _within(name: str, named: set[str]) -> bool:
    return any(parent in named for parent in _parents(name))


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:12])) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
