"""Names of a file's inputs and outputs where the interface gives none: the same for every target."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_edge.interface import Interface
from lightning_edge.network import Deployable, Inputs

# Words of Core ML's own language, which are no names there.
_BITS = (8, 16, 32, 64)
_SIZED = (f"{kind}{bits}" for kind, sizes in (("int", _BITS), ("uint", _BITS), ("fp", _BITS[1:])) for bits in sizes)
RESERVED = frozenset(
    ("any", "bool", "dict", "false", "func", "list", "program", "state", "string", "tensor", "true", "tuple", "bf16")
) | {*_SIZED}


def with_names(interface: Interface, network: Deployable) -> Interface:
    """Complete an interface with names that every format takes.

    A positional argument is ``input``, or ``input_0`` and on where there are several tensors; a keyword argument has
    its own name. Outputs are those of `Deployable.output_names`: keys of a dict, ``output``, or ``output_0`` and on.

    Args:
        interface: How the file is to be called.
        network: What is written, in the form of every file.
    """
    used: set[str] = {*interface.inputs, *interface.outputs}
    inputs = interface.inputs or tuple(_free(name, "input", used) for name in _input_names(network.inputs))
    outputs = interface.outputs or tuple(_free(name, "output", used) for name in network.output_names())
    return replace(interface, inputs=inputs, outputs=outputs)


def _input_names(inputs: Inputs) -> Iterable[str]:
    positional = [path for path, leaf in pytree.tree_flatten_with_path(inputs.args)[0] if isinstance(leaf, Tensor)]
    yield from ["input"] if len(positional) == 1 else (f"input_{at}" for at in range(len(positional)))
    for path, leaf in pytree.tree_flatten_with_path(dict(inputs.kwargs))[0]:
        if isinstance(leaf, Tensor):
            yield "_".join(str(getattr(entry, "key", getattr(entry, "idx", ""))) for entry in path)


def _free(name: str, side: str, used: set[str]) -> str:
    """Make a name of letters, digits and underscores that is no reserved word and not used yet, and add it to those."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", name)
    if name in RESERVED or name in used or not re.match(r"[A-Za-z_]", name):
        name = f"{side}_{name}"
    stem, count = name, 0
    while name in used:
        count += 1
        name = f"{stem}_{count}"
    used.add(name)
    return name
