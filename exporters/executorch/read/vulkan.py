"""Read the Vulkan graphs in a ``.pte`` file; all their operations run on the GPU."""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any

from lightning_edge import macs
from lightning_edge.errors import require
from lightning_edge.exporters.executorch.read.tally import MOVES, Tally, decode

# Not imported as a package: importing ExecuTorch's Vulkan backend sets the root logger to INFO.
_SCHEMA = Path("backends", "vulkan", "serialization", "schema.fbs")
_MAGIC = b"VH00"
_FLOATS = frozenset({"FLOAT16", "FLOAT32", "FLOAT64"})
# Operations that multiply by weights or matrices, with the positions of their two factors.
_PRODUCTS = {
    "aten.convolution": (0, 1),
    "et_vk.conv_with_clamp": (0, 1),
    "et_vk.q8ta_conv2d": (0, 3),
    "et_vk.q8ta_conv2d_dw": (0, 3),
    "et_vk.q8ta_conv2d_pw": (0, 3),
    "et_vk.q8ta_conv2d_transposed": (0, 3),
    "et_vk.q8ta_linear": (0, 3),
    "et_vk.q8ta_linear_gemv": (0, 3),
    "et_vk.linear_q8ta_q8csw": (0, 3),
    "aten._weight_int8pack_mm": (0, 1),
    "aten.linear": (0, 1),
    "aten.mm": (0, 1),
    "aten.bmm": (0, 1),
    "aten.matmul": (0, 1),
    "aten.addmm": (1, 2),
    "et_vk.sdpa": (0, 1),
}
_INT8 = ("et_vk.q8ta_", "et_vk.linear_q8ta_")
# Positions among the arguments of an int8 convolution.
_KERNEL, _GROUPS, _GROUPS_TRANSPOSED = 9, 13, 14
_TRANSPOSED = 6
# Copies a constant to GPU memory; no computation.
_PREPACK = "et_vk.prepack"


def count(payload: bytes, tally: Tally) -> None:
    """Count the operations and weights of one graph.

    Args:
        payload: The data of the delegate: a header, a flatbuffer, and constants.
        tally: The sums to add to.

    Raises:
        ValueError: If the payload is not a Vulkan graph.
    """
    root = Path(str(require("executorch.exir", "executorch").__file__)).parents[1]
    _Graph(decode((root / _SCHEMA).read_bytes(), _flatbuffer(payload))).count(tally)


def _flatbuffer(payload: bytes) -> bytes:
    if payload[4:8] != _MAGIC:
        raise ValueError("its Vulkan graph does not start as one does")
    offset, size = struct.unpack_from("<II", payload, 10)
    return payload[offset : offset + size]


class _Graph:
    """One graph: its values by index, and the operation that produces each."""

    def __init__(self, graph: dict[str, Any]) -> None:
        self._calls = [(_plain(call["name"]), call["args"]) for call in graph["chain"]]
        self._values = [entry["value"] for entry in graph["values"]]
        self._constants = graph["constants"]
        self._makers = {arguments[-1]: (name, arguments) for name, arguments in self._calls}

    def count(self, tally: Tally) -> None:
        for name, arguments in self._calls:
            if name == _PREPACK:
                continue
            tally.ops[name] += 1
            tally.delegated += 1
            tally.places.append((name, "gpu", self._macs(name, arguments)))
            if name in _PRODUCTS:
                if not name.startswith(_INT8):
                    tally.float_compute.append(name)
                self._count_weight(arguments[_PRODUCTS[name][1]], tally)
            elif not MOVES.match(name.replace(".", "::", 1)) and self._is_float(arguments[-1]):
                tally.float_other.append(name)

    def _count_weight(self, index: int, tally: Tally) -> None:
        """Follow a weight back to its constant, through operations that only move or convert it."""
        while (constant := self._values[index].get("constant_id", -1)) < 0:
            name, arguments = self._makers.get(index, ("", [index]))
            if name != _PREPACK and not MOVES.match(name.replace(".", "::", 1)):
                return
            index = arguments[0]
        entry, datatype = self._constants[constant], self._values[index]["datatype"]
        key = entry["named_key"] or f"vulkan:{entry['offset']}"
        (tally.float_weights if datatype in _FLOATS else tally.int8_weights)[key] = entry["length"]
        if datatype == "FLOAT16":
            tally.half_weights[key] = entry["length"]

    def _is_float(self, index: int) -> bool:
        return self._values[index].get("datatype") in _FLOATS

    def _dims(self, index: int) -> list[int]:
        return list(self._values[index].get("dims", ()))

    def _macs(self, name: str, arguments: list[int]) -> int:
        if name not in _PRODUCTS:
            return 0
        left, right = (self._dims(arguments[position]) for position in _PRODUCTS[name])
        output = self._dims(arguments[-1])
        if name == "et_vk.sdpa":
            return macs.attention(left, right, self._dims(arguments[2]))
        if name in ("aten.convolution", "et_vk.conv_with_clamp"):
            if self._values[arguments[_TRANSPOSED]]["bool_val"]:
                return macs.transposed_convolution(left, right, right[0])
            return macs.convolution(output, right, right[0])
        if "conv2d" in name:
            # The weights are padded, so their shape is not that of the filters.
            transposed = name.endswith("_transposed")
            groups = int(self._values[arguments[_GROUPS_TRANSPOSED if transposed else _GROUPS]]["int_val"])
            kernel: int = prod(self._values[arguments[_KERNEL]]["items"])
            many, channels = (left, output[1]) if transposed else (output, left[1])
            return prod(many) * kernel * channels // groups
        return macs.product(output, left[-1])


def _plain(name: str) -> str:
    """Return the name of an operation without its overload."""
    return ".".join(name.split(".")[:2])
