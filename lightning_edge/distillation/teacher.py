"""The teacher: taken from an object, a checkpoint or an import path, and frozen."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_edge.errors import CompressionError
from lightning_edge.quantization import float_copy
from lightning_edge.surgery import find_network, misfits

SELF = "self"
_KEYS = {"class_path", "init_args", "checkpoint", "module"}


def check_teacher(teacher: Any) -> None:
    """Refuse what names no teacher, long before one is built.

    Raises:
        ValueError: If ``teacher`` is no module, no mapping with the right keys, and not ``"self"``.
    """
    allowed = (
        "give an nn.Module, {class_path: my.Net, init_args: {...}}, "
        "{checkpoint: path, class_path: my.LightningModule, module: net}, or 'self'"
    )
    if isinstance(teacher, nn.Module) or teacher == SELF:
        return
    if not isinstance(teacher, Mapping):
        raise ValueError(f"teacher={teacher!r} is no teacher; {allowed}")
    unknown = set(teacher) - _KEYS
    if unknown or not isinstance(teacher.get("class_path"), str):
        what = f"has unknown keys {sorted(map(str, unknown))}" if unknown else "has no class_path"
        raise ValueError(f"teacher={dict(teacher)!r} {what}; {allowed}")


def build_teacher(teacher: Any) -> nn.Module:
    """Make the teacher that the settings name: a copy of a module, or a new one.

    Args:
        teacher: A module, of which a float copy is taken; or a mapping with ``class_path``, ``init_args``,
            ``checkpoint`` (read with ``weights_only=True``) and ``module`` (the submodule that is the teacher).

    Raises:
        CompressionError: If the class cannot be imported or built, the checkpoint not read, or its weights do not fit.
    """
    if isinstance(teacher, nn.Module):
        return _callable(float_copy(teacher))
    path = teacher["class_path"]
    cls = _import(path)
    checkpoint = _read(teacher["checkpoint"]) if "checkpoint" in teacher else {}
    arguments = dict(teacher.get("init_args") or {})
    kept = checkpoint.get("hyper_parameters")
    if "init_args" not in teacher and kept:
        # What save_hyperparameters() kept, as far as the class takes it.
        taken = inspect.signature(cls).parameters
        every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        arguments = {name: value for name, value in kept.items() if every or name in taken}
    try:
        with torch.random.fork_rng(devices=[]):  # weights that are drawn leave the training's random state alone
            module = cls(**arguments)
    except Exception as error:  # whatever the user's constructor raises
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise CompressionError(
            f"the teacher {path}({given}) cannot be built: {error}. Give its arguments as the teacher's init_args."
        ) from error
    if not isinstance(module, nn.Module):
        raise CompressionError(f"the teacher {path} is a {type(module).__name__}; class_path must name an nn.Module")
    if checkpoint:
        _load(module, checkpoint, teacher)
    name = teacher.get("module")
    try:
        return module.get_submodule(name) if name else _callable(module)
    except AttributeError as error:
        children = ", ".join(repr(child) for child, _ in module.named_children())
        raise CompressionError(f"the teacher {path} has no submodule {name!r}; its children: {children}") from error


def frozen(teacher: nn.Module, like: nn.Module) -> nn.Module:
    """Freeze a teacher in place, in eval mode, on the device and with the float type of ``like``."""
    teacher.eval().requires_grad_(False)
    parameter = next((p for p in like.parameters() if p.is_floating_point()), None)
    return teacher if parameter is None else teacher.to(parameter.device, parameter.dtype)


def _callable(module: nn.Module) -> nn.Module:
    """The module itself; the network in a LightningModule that has no ``forward`` of its own."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)
    inherited = owner is nn.Module or owner.__module__.split(".")[0] in ("lightning", "pytorch_lightning")
    return find_network(module) if inherited else module


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CompressionError(
            f"the teacher's class_path {path!r} cannot be imported ({error}); give package.module.Class"
        ) from error


def _read(path: str | Path) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise CompressionError(
            f"the teacher's checkpoint {str(path)!r} cannot be read with weights_only=True: "
            f"{str(error).strip().splitlines()[0]}. Give a Lightning checkpoint or a state_dict; one that holds more "
            "than tensors and plain values is not loaded, as it could run any code."
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise CompressionError(
            f"the teacher's checkpoint {str(path)!r} holds a {type(checkpoint).__name__}, no weights"
        )
    return dict(checkpoint)


def _load(module: nn.Module, checkpoint: dict[str, Any], teacher: Mapping[str, Any]) -> None:
    weights = checkpoint.get("state_dict", checkpoint)
    try:
        module.load_state_dict(copy.copy(weights))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CompressionError(
            f"the weights in {str(teacher['checkpoint'])!r} do not fit {teacher['class_path']}: "
            f"{misfits(module, weights, error)}. Give the class and init_args that the checkpoint was written with."
        ) from error
