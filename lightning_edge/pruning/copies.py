"""Copies of a network to trace, cut and compare: what belongs to the user's training stays out of them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.surgery import CALL_HOOKS

_HOOKS = frozenset(
    (
        *CALL_HOOKS,
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    )
)
# What Lightning hangs on its modules; a copy looks at the same one.
_SHARED = ("_trainer", "_fabric")
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, FunctionType, BuiltinFunctionType})


def bare_copy(network: nn.Module) -> nn.Module:
    """Copy a network in eval mode: no hooks, no gradients, every parameter trainable, half precision as float32.

    Raises:
        CompressionError: If it cannot be copied.
    """
    memo: dict[int, Any] = {}
    try:
        twin: nn.Module = _twin(network, memo)
    except Exception as error:
        raise CompressionError(
            f"{type(network).__name__} cannot be copied, which planning a cut needs ({type(error).__name__}: {error}). "
            "Keep what copy.deepcopy refuses, such as results of earlier calls, out of the network's attributes."
        ) from error
    for module in network.modules():
        shared = {name: vars(module)[name] for name in _SHARED if vars(module).get(name) is not None}
        if shared:
            # Its forward may look at the Trainer, but nothing that a copy computes is logged.
            memo[id(module)].__dict__.update(shared, log=_ignored, log_dict=_ignored)
    for module in twin.modules():
        state = module.__dict__
        state["training"] = False
        redirected = state.get("forward")
        # A function that somebody put in place of forward still runs the original network.
        if redirected is not None and not (isinstance(redirected, MethodType) and redirected.__self__ is module):
            del state["forward"]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(parameter.is_floating_point())
    return twin


def _ignored(*args: Any, **kwargs: Any) -> None:
    return


def _twin(module: nn.Module, memo: dict[int, Any]) -> Any:
    """What copy.deepcopy does, several times faster: it is most of the time that planning takes."""
    if id(module) in memo:
        return memo[id(module)]
    held = vars(module)
    memo.update({id(held[name]): held[name] for name in _SHARED if held.get(name) is not None})
    if not _copies_plainly(type(module)):
        memo.update({id(held[name]): OrderedDict() for name in _HOOKS if name in held})
        for child in module.children():
            _twin(child, memo)
        return copy.deepcopy(module, memo)
    twin = memo[id(module)] = type(module).__new__(type(module))
    state: dict[str, Any] = twin.__dict__
    state["_modules"] = {name: None if child is None else _twin(child, memo) for name, child in module._modules.items()}
    for kind in ("_parameters", "_buffers"):
        state[kind] = {name: _clone(tensor, memo) for name, tensor in held[kind].items()}
    for name, value in held.items():
        if name in _HOOKS:
            state[name] = OrderedDict()
        elif name == "_non_persistent_buffers_set":
            state[name] = set(value)
        elif name not in state:
            state[name] = value if _is_plain(value) else _copied(value, memo)
    return twin


def _is_plain(value: Any) -> bool:
    """Whether the copy can hold the very same object, because nothing can change it."""
    return type(value) in _PLAIN or (type(value) is tuple and _PLAIN.issuperset(map(type, value)))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; that of a list of plain values, which every convolution holds, without deepcopy's detours."""
    if type(value) is list and id(value) not in memo and _PLAIN.issuperset(map(type, value)):
        memo[id(value)] = list(value)
    return copy.deepcopy(value, memo)


def _clone(tensor: Tensor | None, memo: dict[int, Any]) -> Tensor | None:
    if tensor is None or id(tensor) in memo:
        return None if tensor is None else cast(Tensor, memo[id(tensor)])
    if type(tensor) is nn.Parameter:
        memo[id(tensor)] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
    elif type(tensor) is Tensor:
        memo[id(tensor)] = tensor.detach().clone()
    else:
        return copy.deepcopy(tensor, memo)
    return cast(Tensor, memo[id(tensor)])


def _copies_plainly(kind: type[nn.Module]) -> bool:
    """Whether a copy of such a module is a new object with a copy of its attributes, and no more."""
    own = kind.__setstate__
    known = own.__module__.startswith("torch.nn.modules.") and not issubclass(kind, nn.RNNBase)
    return known and not hasattr(kind, "__deepcopy__") and kind.__getstate__ is nn.Module.__getstate__


def sample_of(inputs: Inputs, network: nn.Module, size: int = 2) -> Inputs:
    """Take the first samples, on the network's device, half precision as float32."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))

    def place(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(device)
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    return inputs.sample(size=size).map(place)


@contextmanager
def aside(network: nn.Module) -> Iterator[None]:
    """Compute with gradients and in full precision, and leave the random state as it was."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    known = torch.amp.is_autocast_available(device.type)
    autocast = torch.autocast(device.type, enabled=False) if known else nullcontext()
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad(), autocast:
        yield
