"""The record in a checkpoint of unknown origin, checked as strictly as a manifest before a network is changed by it.

Knows which values each kind of change has, and nothing of networks: what does not fit one is refused where it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_edge.plain_values import (
    as_count,
    as_list,
    as_number,
    as_object,
    as_optional,
    as_typed,
    check_keys,
    shortened,
)

_Check = Callable[[Any, str], object]

# What pruning counts in layers; see `pruning.channels`.
_COUNTED = frozenset(
    {
        *("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels"),
        *("num_groups", "normalized_shape[0]", "num_parameters", "embedding_dim"),
    }
)
# What pruning does not count, and a record must not change.
_OF_ALL_MODULES = frozenset(dir(torch.nn.Module()))
_PRECISIONS = ("int8", "int8_a16", "float")
_MOST_DIMENSIONS = 8
_MOST_NESTED = 16
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool)
_PLAIN = (type(None), bool, int, float, str)


def check_record(saved: Any) -> dict[str, Any]:
    """Give what a checkpoint carries of its compression, if it is what this package writes.

    Args:
        saved: The value; ``None`` and an empty one are a checkpoint without compression.

    Raises:
        ValueError: With the place of the first value that is not allowed.
    """
    if saved is None:
        return {}
    record = as_object(saved, "it")
    known = {"changes", "inherited", "settings", "float_state", "distillation"}
    check_keys({**dict.fromkeys(known), **record}, known, "it", "a record of this version")
    changes = as_list(record.get("changes", []), "changes")
    for index, change in enumerate(changes):
        _change(change, f"changes[{index}]")
    inherited = [as_count(index, "inherited") for index in as_list(record.get("inherited", []), "inherited")]
    if len({*inherited}) < len(inherited) or any(index >= len(changes) for index in inherited):
        raise ValueError(f"inherited is {shortened(inherited)}, and there are {len(changes)} changes")
    for phase, settings in as_object(record.get("settings", {}), "settings").items():
        _setting(as_object(settings, f"settings.{phase}"), f"settings.{phase}")
    if record.get("float_state") is not None:
        _floats(record["float_state"], "float_state")
    distillation = as_object(record.get("distillation") or {}, "distillation")
    check_keys({"adapters": {}, **distillation}, ["adapters"], "distillation", "a record of this version")
    for name, adapter in as_object(distillation.get("adapters", {}), "distillation.adapters").items():
        _floats(adapter, f"distillation.adapters.{name}")
    return record


def _change(value: Any, where: str) -> None:
    given = as_object(value, where)
    for name in ("phase", "kind"):
        as_typed(given.get(name), str, f"{where}.{name}")
    fields = _FIELDS.get((given["phase"], given["kind"]))
    if fields is None:
        kinds = [kind for phase, kind in _FIELDS if phase == given["phase"]]
        if not kinds:  # told by `record`, with what to do
            return
        raise ValueError(f"{where}.kind is {shortened(given['kind'])} and not one of {', '.join(kinds)}")
    needed, more = fields
    wanted = ["phase", "kind", *needed, *(name for name in more if name in given)]
    check_keys(given, wanted, where, f"a change of {given['phase']}")
    for name, check in (*needed.items(), *more.items()):
        if name in given:
            check(given[name], f"{where}.{name}")
    if "masks" in given:
        _check_masks(given, where)
    if "args" in given and not any(tensor.dim() for tensor in _tensors((given["args"], given["kwargs"]))):
        raise ValueError(f"{where}.args and {where}.kwargs hold no tensor with a batch, which every network is fed")


def _kept(value: Any, where: str) -> None:
    """Indices of tensors that stay: sorted, each once, of a size that is not exceeded."""
    for name, dimensions in as_object(value, where).items():
        seen = set()
        for entry in as_list(dimensions, f"{where}.{name}"):
            if len(as_list(entry, f"{where}.{name}")) != 3:
                raise ValueError(f"{where}.{name} is {shortened(entry)} and not a dimension, its indices and its size")
            dimension, index, before = entry
            if as_count(dimension, f"{where}.{name}") >= _MOST_DIMENSIONS or dimension in seen:
                raise ValueError(f"{where}.{name}: dimension {dimension} is given twice, or no tensor has it")
            seen.add(dimension)
            as_count(before, f"{where}.{name}")
            _tensor(index, f"{where}.{name}")
            if index.dtype != torch.int64 or index.dim() != 1 or not 0 < index.numel() <= before:
                raise ValueError(f"{where}.{name}: of {before} indices {shortened(index.shape)} {index.dtype} stay")
            if index[0] < 0 or index[-1] >= before or not bool((index[1:] > index[:-1]).all()):
                raise ValueError(f"{where}.{name}: its indices are not sorted, each once and below {before}")


def _attributes(value: Any, where: str) -> None:
    for module, counts in as_object(value, where).items():
        for name, pair in as_object(counts, f"{where}.{module}").items():
            # Beside those of layers, the network's own: whether there is such a number is seen when the cut is made.
            if name not in _COUNTED and (not name.isidentifier() or name in _OF_ALL_MODULES):
                raise ValueError(f"{where}.{module} has {shortened(name)}, which is no count of channels")
            counted = [as_count(count, f"{where}.{module}.{name}") for count in as_list(pair, f"{where}.{module}")]
            if len(counted) != 2 or not 0 < counted[1] <= counted[0]:
                raise ValueError(f"{where}.{module}.{name} is {shortened(pair)} and not a count before and one after")


def _check_masks(given: Mapping[str, Any], where: str) -> None:
    if given["masks"].keys() != given["shapes"].keys():
        raise ValueError(f"{where}: masks and shapes are of different weights")
    for name, bits in given["masks"].items():
        size = math.prod(given["shapes"][name])
        if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.numel() != -(-size // 8):
            raise ValueError(f"{where}.masks.{name} has {bits.numel()} bytes of {bits.dtype} for {size} weights")


def _masks(value: Any, where: str) -> None:
    for name, bits in as_object(value, where).items():
        _tensor(bits, f"{where}.{name}")


def _shapes(value: Any, where: str) -> None:
    for name, shape in as_object(value, where).items():
        for size in as_list(shape, f"{where}.{name}"):
            as_count(size, f"{where}.{name}")


def _floats(value: Any, where: str) -> None:
    """Tensors by name; numbers with a fraction are finite, or a buffer's infinities."""
    for name, tensor in as_object(value, where).items():
        _tensor(tensor, f"{where}.{name}")
        if bool(torch.isnan(tensor).any()):
            raise ValueError(f"{where}.{name} holds values that are no numbers (NaN)")


def _layers(value: Any, where: str) -> None:
    """Layers that become pairs, each once."""
    names = []
    for index, entry in enumerate(as_list(value, where)):
        place = f"{where}[{index}]"
        layer = as_object(entry, place)
        check_keys(layer, ["name", "rank", "energy", "before", "after"], place, "a layer of a factorization")
        names.append(as_typed(layer["name"], str, f"{place}.name"))
        as_number(layer["energy"], f"{place}.energy")
        for count in ("rank", "before", "after"):
            if as_count(layer[count], f"{place}.{count}") < 1:
                raise ValueError(f"{place}.{count} is 0")
    if len({*names}) < len(names):
        raise ValueError(f"{where} names a layer twice: {shortened(names)}")


def _precisions(value: Any, where: str) -> None:
    for pattern, precision in as_object(value, where).items():
        _one_of(*_PRECISIONS)(precision, f"{where}.{pattern}")


def _call(value: Any, where: str, depth: int = 0) -> None:
    """Arguments of a call: tensors and plain values, in lists, tuples and dicts."""
    if depth > _MOST_NESTED:
        raise ValueError(f"{where} is nested too deeply")
    if isinstance(value, Tensor):
        _tensor(value, where)
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            _call(entry, f"{where}.{shortened(name)}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _call(entry, f"{where}[{index}]", depth + 1)
    elif not isinstance(value, _PLAIN):
        raise ValueError(f"{where} is a {type(value).__name__} and neither a tensor nor a plain value")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a call that was checked."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)


def _setting(value: Any, where: str, depth: int = 0) -> None:
    """Plain values, in lists and dicts, that can be compared with those of a run."""
    if depth > _MOST_NESTED:
        raise ValueError(f"{where} is nested too deeply")
    if type(value) is dict:
        for name, entry in as_object(value, where).items():
            _setting(entry, f"{where}.{name}", depth + 1)
    elif type(value) is list:
        for index, entry in enumerate(value):
            _setting(entry, f"{where}[{index}]", depth + 1)
    elif not isinstance(value, _PLAIN):
        raise ValueError(f"{where} is a {type(value).__name__} and no plain value")


def _arguments(value: Any, where: str) -> None:
    _call(as_list(value, where), where)


def _keywords(value: Any, where: str) -> None:
    _call(as_object(value, where), where)


def _tensor(value: Any, where: str) -> None:
    """A plain tensor whose every element is there: a view can say that it has more than its bytes."""
    if type(value) is not Tensor:
        raise ValueError(f"{where} is a {type(value).__name__} and not a tensor")
    plain = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    if not plain or not (value.is_floating_point() or value.is_complex() or value.dtype in _INTEGERS):
        raise ValueError(f"{where} is a tensor of {value.dtype}, {value.layout} on {value.device} and not a plain one")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ValueError(f"{where} has {value.numel()} elements and not the bytes of them")


def _costs(value: Any, where: str) -> None:
    if len([as_count(cost, where) for cost in as_list(value, where)]) != 3:
        raise ValueError(f"{where} is {shortened(value)} and not the cost at first, before and after")


def _share(value: Any, where: str) -> None:
    if not 0 <= as_number(value, where) <= 1:
        raise ValueError(f"{where} is {shortened(value)} and not a share from 0 to 1")


def _maybe_share(value: Any, where: str) -> None:
    if value is not None:
        _share(value, where)


def _text(value: Any, where: str) -> None:
    as_typed(value, str, where)


def _texts(value: Any, where: str) -> None:
    for text in as_list(value, where):
        as_typed(text, str, where)


def _reasons(value: Any, where: str) -> None:
    for name, reason in as_object(value, where).items():
        as_typed(reason, str, f"{where}.{name}")


def _switch(value: Any, where: str) -> None:
    as_typed(value, bool, where)


def _empty(value: Any, where: str) -> None:
    if as_object(value, where):
        raise ValueError(f"{where} is {shortened(value)}, and a trial cuts nothing")


def _one_of(*words: Any) -> _Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, str | bool) or value not in words:
            raise ValueError(f"{where} is {shortened(value)} and not one of {', '.join(map(repr, words))}")

    return check


def _maybe_number(value: Any, where: str) -> None:
    if value is not None:
        as_number(value, where)


def _epoch(value: Any, where: str) -> None:
    as_optional(value, int, where)
    if value is not None:
        as_count(value, where)


_WHEN: dict[str, _Check] = {"epoch": _epoch, "progress": _maybe_share}
_TRIED: dict[str, _Check] = {"stood": _texts, "faulty": _reasons}
# Of each phase and kind: what a change has, and what only some versions write.
_FIELDS: dict[tuple[str, str], tuple[Mapping[str, _Check], Mapping[str, _Check]]] = {
    ("prune", "trial"): (
        {"kept": _empty, "attributes": _empty, "left_alone": _text, **_TRIED, "along": _share, "epoch": _epoch},
        {},
    ),
    ("prune", "cut"): (
        {
            **{"kept": _kept, "attributes": _attributes, "macs": _costs, "params": _costs, "size_bytes": _costs},
            **{"cut": as_count, "along": _share, "epoch": _epoch},
        },
        _TRIED,
    ),
    ("factorize", "factorize"): (
        {**_WHEN, "layers": _layers, "left_alone": _reasons, "output_error": as_number},
        {},
    ),
    ("sparsify", "remember"): ({**_WHEN, "weights": _floats}, {}),
    ("sparsify", "mask"): (
        {
            **{"replaces": _one_of(True), **_WHEN, "share": _share, "final": _switch, "masks": _masks},
            **{"shapes": _shapes, "zeros": as_count, "weights": as_count, "left_alone": _reasons},
        },
        {},
    ),
    ("sparsify", "rewind"): ({"epoch": _epoch, "weights": _floats, "masks": _masks, "shapes": _shapes}, {}),
    ("quantize", "attach"): (
        {
            **{**_WHEN, "averaging": _maybe_number, "live_batch_norm": _switch},
            **{"args": _arguments, "kwargs": _keywords},
        },
        {
            **{"layers": _precisions, "linear_weights": _one_of("per_channel", "per_tensor")},
            **{"written_out": _switch, "recurrent": _switch, "quantizers": as_count},
        },
    ),
    ("quantize", "fold_batch_norm"): ({}, {}),
    ("quantize", "freeze_observers"): ({}, {}),
    ("distill", "begin"): (_WHEN, {}),
    ("distill", "end"): (_WHEN, {}),
}
