"""Which of a network's outputs is meant: by key or index, and refused where that is not clear."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_edge.errors import CompressionError


def named_outputs(outputs: Any) -> dict[str, Tensor]:
    """Every floating-point tensor of an output by key or index, nested ones joined with a dot; ``""`` for a tensor."""
    leaves = pytree.tree_flatten_with_path(outputs)[0]
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path): leaf
        for path, leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def select_output(outputs: Any, name: str | int | None, owner: str, *, lone: bool = False) -> Tensor:
    """Pick the output that a loss compares.

    Args:
        outputs: What the network returned.
        name: Key or index; ``None``: the only one.
        owner: Whose output it is, for the message.
        lone: Take the only output whatever the name says: a teacher of one task beside a student of several.

    Raises:
        CompressionError: If there is no such output, or several and no name.
    """
    named = named_outputs(outputs)
    if len(named) == 1 and (name is None or lone):
        return next(iter(named.values()))
    if name is not None and str(name) in named:
        return named[str(name)]
    names = ", ".join(repr(key) for key in named) if any(named) else "one tensor without a name" if named else "none"
    given = "several outputs and the loss names none" if name is None else f"no output {name!r}"
    given = f"no tensor of floating point ({type(outputs).__name__})" if not named else given
    raise CompressionError(
        f"{owner} returns {given}; there is: {names}. Set output=... of the distillation loss to a key or an index."
    )
