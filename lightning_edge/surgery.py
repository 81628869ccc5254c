"""Find a network inside a module, redirect its calls, and see what it is fed. Knows torch only.

Nothing here changes parameters or the module tree: a redirected network keeps its layers, its parameters
and its state_dict, and only its ``forward`` is looked up on the instance instead of on the class.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from torch import nn

from lightning_edge.errors import CompressionError, first_line
from lightning_edge.network import Inputs

# What makes a child a network and not a metric or a loss: a layer with weights.
_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.Embedding,
)
# Of weights that do not fit so many are named.
_MOST_NAMES = 3

# What a caller can hang onto a module that is called.
CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class _Captured(BaseException):
    """Carries a call's arguments out of the user's step; not an Exception, so that no handler of theirs swallows it."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.inputs = inputs


def candidates(module: nn.Module) -> dict[str, nn.Module]:
    """Children of ``module`` that hold at least one layer with weights, by name."""
    return {
        name: unwrap_compiled(child)
        for name, child in module.named_children()
        if any(isinstance(layer, _LAYERS) for layer in child.modules())
    }


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or ``module`` itself."""
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


def find_network(module: nn.Module, name: str | None = None) -> nn.Module:
    """Find the network inside ``module``: the named submodule, its only candidate, or ``module`` itself.

    ``module`` itself is the network if its layers are its own children and it has a ``forward``.

    Args:
        module: Usually a LightningModule.
        name: Dotted name of the submodule; ``""`` for ``module`` itself.

    Raises:
        CompressionError: If there is no such submodule, or none or several candidates and no ``forward``.
    """
    found = candidates(module)
    names = ", ".join(repr(candidate) for candidate in found) or "none"
    if name is not None:
        try:
            return unwrap_compiled(module.get_submodule(name))
        except AttributeError as error:
            raise CompressionError(
                f"module={name!r} is not a submodule of {type(module).__name__}. Candidates: {names}."
            ) from error
    own_forward = _has_own_forward(module)
    if len(found) == 1 and not (own_forward and any(True for _ in module.parameters(recurse=False))):
        return next(iter(found.values()))
    if found and own_forward:
        return module
    raise CompressionError(
        f"{type(module).__name__} has {len(found)} submodules that could be the network ({names}) and no forward() of "
        f"its own. Name the one to compress with module=..., or give {type(module).__name__} a forward()."
    )


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a class of the user's, not torch's or Lightning's base class, defines ``forward``."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)
    return owner is not nn.Module and owner.__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


def accepts(network: nn.Module, inputs: Inputs) -> bool:
    """Whether ``network``'s forward can be called with these arguments, by its signature alone."""
    try:
        inspect.signature(network.forward).bind(*inputs.args, **inputs.kwargs)
    except TypeError:
        return False
    return True


_Module = TypeVar("_Module", bound=nn.Module)


def copy_of(module: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """Copy a module of the user's with all that it holds.

    Args:
        module: The module.
        memo: As in ``copy.deepcopy``: what stands for objects that are not to be copied, by their ids.

    Raises:
        CompressionError: If something it holds cannot be copied.
    """
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # whatever the user's own attributes raise
        raise CompressionError(
            f"{type(module).__name__} cannot be copied, and it is changed or tried on a copy only "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}). Keep what "
            "copy.deepcopy refuses, such as results of earlier calls, out of its attributes."
        ) from error


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode of every module while the context lasts, and put back, module by module, what each had.

    A module with a ``train`` of its own is told by that: some keep in evaluation what they compute from their weights,
    as LeViT's biases of attention, and throw it away there.
    """
    modes = {child: child.training for child in module.modules()}
    set_modes(dict.fromkeys(modes, training))
    try:
        yield
    finally:
        set_modes(modes)


def set_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Set the mode of each module, by its own ``train`` where it has one."""
    for module, mode in modes.items():
        if type(module).train is not nn.Module.train:
            module.train(mode)
    for module, mode in modes.items():  # train() reaches submodules, too
        module.training = mode


@contextmanager
def redirected(network: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Answer every call of ``network`` with ``function`` while the context lasts."""
    had = "forward" in network.__dict__
    before = network.__dict__.get("forward")
    network.forward = function
    try:
        yield
    finally:
        if had:
            network.forward = before  # type: ignore[assignment]
        else:
            del network.__dict__["forward"]


def capture_inputs(network: nn.Module, step: Callable[[], Any]) -> Inputs | None:
    """Return what ``step`` feeds ``network`` first, without running the network or the rest of ``step``.

    Returns:
        The arguments of the first call, or ``None`` if ``step`` ended without calling the network.
    """

    def stop(*args: Any, **kwargs: Any) -> NoReturn:
        raise _Captured(Inputs(args, kwargs))

    with redirected(network, stop):
        try:
            step()
        except _Captured as captured:
            return captured.inputs
    return None


def misfits(module: nn.Module, weights: Mapping[str, Any], error: Exception) -> str:
    """Say in one line why weights do not fit a module: the first names of each kind, and how many more there are.

    Args:
        module: The module.
        weights: What it did not load, by name.
        error: What torch raised, one line for each name; said where nothing else is found.
    """
    own = module.state_dict()
    shapes = {name: getattr(value, "shape", None) for name, value in weights.items()}
    found = {
        "missing": [repr(name) for name in own if name not in shapes],
        "not of it": [repr(name) for name in shapes if name not in own],
        "of another shape": [
            f"{name!r} {_size(shapes[name])} for {_size(own[name].shape)}"
            for name in own
            if name in shapes and shapes[name] != own[name].shape
        ],
    }
    told = [f"{len(names)} {kind} ({_first_of(names)})" for kind, names in found.items() if names]
    return ", ".join(told) or first_line(error)


def _size(shape: Any) -> str:
    return "no tensor" if shape is None else "x".join(map(str, shape)) or "a number"


def _first_of(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
