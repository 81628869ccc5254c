"""Which layers are quantized, and how: patterns of module names, as plain values.

A plan maps patterns (fnmatch, case counts, ``*`` matches dots too) to what the layers they name become. A pattern names
a module and everything inside it. Where several patterns name a layer, the last one decides; what none names is int8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

from torch.fx import Node

from lightning_edge.errors import CompressionError

LayerPrecision = Literal["int8", "int8_a16", "float"]
LinearWeights = Literal["per_channel", "per_tensor"]
Plan = Mapping[str, LayerPrecision]
# Words in the place of a plan: all layers in int8, and those that stay float chosen where quantization begins.
PlanWord = Literal["int8", "mixed"]

_SHOWN = 40


def check_plan(precisions: Mapping[str, str] | None, skip: Sequence[str] | None) -> dict[str, LayerPrecision]:
    """Make a plan of given precisions and of patterns to skip, which come last and so have the last word.

    Args:
        precisions: Pattern of module names -> ``"int8"``, ``"int8_a16"`` (int8 weights, 16-bit activations) or
            ``"float"``.
        skip: Patterns of what stays float.

    Raises:
        ValueError: If ``skip`` is no list of patterns, or ``precisions`` no mapping of patterns to these three words.
    """
    if isinstance(skip, str) or not all(isinstance(pattern, str) and pattern for pattern in skip or ()):
        raise ValueError(f"skip={skip!r} is no list of patterns; give names of modules, for example skip=['head.*']")
    if not isinstance(precisions or {}, Mapping):
        raise ValueError(
            f"precisions={precisions!r} is no mapping; give patterns of module names, for example {{'stem': 'float'}}"
        )
    joined: dict[str, LayerPrecision] = {}
    for pattern, precision in [*(precisions or {}).items(), *((pattern, "float") for pattern in skip or ())]:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"precisions: {pattern!r} is no pattern; give names of modules, for example 'features.*'")
        if precision not in get_args(LayerPrecision):
            raise ValueError(f"precisions: {pattern!r}: {precision!r} is not one of {get_args(LayerPrecision)}")
        joined.pop(pattern, None)  # to the end, where it has the last word
        joined[pattern] = cast(LayerPrecision, precision)
    return joined


def check_word(precisions: Mapping[str, str] | str | None) -> Mapping[str, str] | None:
    """Give the plan that precisions state; none where a word stands for it.

    Raises:
        ValueError: If it is a word and not one of the two.
    """
    if not isinstance(precisions, str):
        return precisions
    if precisions not in get_args(PlanWord):
        words = " or ".join(map(repr, get_args(PlanWord)))
        raise ValueError(
            f"precisions={precisions!r} is not known; give {words}, or patterns of module names, for example "
            "{'stem': 'float'}"
        )
    return None


def check_linear_weights(value: str) -> LinearWeights:
    """Make sure that this says how many scales the weight of a linear layer has.

    Raises:
        ValueError: If it is neither word.
    """
    if value not in get_args(LinearWeights):
        raise ValueError(f"linear_weights={value!r} is not one of {get_args(LinearWeights)}")
    return cast(LinearWeights, value)


def check_patterns(plan: Plan, names: Iterable[str], network: str) -> None:
    """Make sure that every pattern names something.

    Args:
        plan: The patterns.
        names: What can be named.
        network: Name of the network's class, for the message.

    Raises:
        CompressionError: Naming the patterns that match nothing, and what there is.
    """
    names = [name for name in names if name]
    idle = [pattern for pattern in plan if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise CompressionError(
            f"{', '.join(map(repr, idle))} in skip or precisions matches no quantized layer of {network}. Its layers: "
            f"{shown or 'none'}. Give these names, patterns of them ('features.*'), or a module that holds them."
        )


def named_by(plan: Plan, layer: str) -> bool:
    """Whether a pattern names a layer, or a module that holds it."""
    parts = layer.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatchcase(name, pattern) for name in names for pattern in plan)


def precision_of(names: Iterable[str], plan: Plan) -> LayerPrecision:
    """Give what a layer becomes: the last word of a pattern that matches one of its names, ``"int8"`` if none does."""
    names = list(names)
    given = [word for pattern, word in plan.items() if any(fnmatchcase(name, pattern) for name in names)]
    return given[-1] if given else "int8"


def node_names(node: Node) -> list[str]:
    """Give the names of the modules that an operation of a captured graph was called in, innermost last.

    An operation that the network itself calls, outside any submodule, is named by the first parameter among its
    operands if it has one.
    """
    stack = node.meta.get("nn_module_stack") or {}
    # A module that is called several times has @1, @2, ... behind its name.
    names = [str(path).split("@")[0] for path, _ in stack.values() if path]
    return names or [str(operand.target) for operand in _parameters(node)][:1]


def layer_name(node: Node) -> str:
    """Give the one name by which a convolution or linear operation is known; empty if it has none."""
    return node_names(node)[-1] if node_names(node) else ""


def _parameters(node: Node) -> Iterator[Node]:
    """The parameters that an operand is computed from, nothing the network is fed among them."""
    for operand in node.all_input_nodes[1:]:
        while operand.op == "call_function" and operand.all_input_nodes:
            operand = operand.all_input_nodes[0]
        if operand.op == "get_attr":
            yield operand
