"""The targets there are, what they need installed, and which options they take."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from lightning_edge.errors import check_installed
from lightning_edge.exporters.base import Target
from lightning_edge.network import Precision

TARGETS = {
    "executorch": "lightning_edge.exporters.executorch",
    "coreml": "lightning_edge.exporters.coreml",
    "tflite": "lightning_edge.exporters.tflite",
    "onnx": "lightning_edge.exporters.onnx",
}

# Options that say how a float network's weights are stored.
_OF_SCHEMES = frozenset({"scheme", "group_size", "block_size"})


def target(name: str) -> Target:
    """Import a target's module.

    Args:
        name: A key of `TARGETS`.

    Raises:
        ValueError: If there is no such target.
    """
    if name not in TARGETS:
        raise ValueError(f"target={name!r} is not one of {', '.join(map(repr, TARGETS))}")
    return cast(Target, import_module(TARGETS[name]))


def check_target_installed(name: str) -> None:
    """Make sure that what a target needs is installed, without importing it.

    Raises:
        MissingExtraError: Naming the first module that is missing, and how to install it.
        ValueError: If there is no such target.
    """
    module = target(name)
    for needed in getattr(module, "NEEDS", ()):
        check_installed(needed, module.EXTRA)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a target does not have, and values that are not of the option's type.

    Raises:
        ValueError: Naming what was given and what is allowed.
    """
    if not options:
        return
    write = target(name).write
    parameters = inspect.signature(write).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option, value in options.items():
        if option not in allowed:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(allowed) or 'none'}")
        hint = get_type_hints(write)[option]
        choices = [get_args(kind) for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
        if choices and value is not None and value not in choices[0]:
            raise ValueError(f"{name}: {option}={value!r} is not one of {choices[0]}")
        if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name}: {option}={value!r} is not a whole number")
        if hint is bool and not isinstance(value, bool):
            raise ValueError(f"{name}: {option}={value!r} is not one of (True, False)")


def options_of(name: str, precision: Precision, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Give a target's options for a file of this precision.

    Args:
        name: A key of `TARGETS`.
        precision: Precision of the file; a float one has no part in what says something of int8 networks only.
        options: Options by target.
    """
    chosen = dict(options.get(name, {}))
    if precision == "fp32" and chosen:
        chosen = {option: value for option, value in chosen.items() if option not in target(name).INT8_OPTIONS}
    if precision == "int8":
        chosen = {option: value for option, value in chosen.items() if option not in _OF_SCHEMES}
    return chosen
