"""Messages between the process that runs a file and the one that asks it: JSON, then tensors as raw bytes.

Nothing is pickled. A message is the length of its JSON text (8 bytes, little-endian), the text, and behind it the bytes
of the tensors that the text tells the types and shapes of, in their plain order.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

_LENGTH = struct.Struct("<Q")


def send(connection: socket.socket, message: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> None:
    """Send a message.

    Raises:
        OSError: If the other end is gone, or does not read within the time limit of ``connection``.
    """
    specs = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
    text = json.dumps({**message, "tensors": specs}).encode()
    connection.sendall(b"".join([_LENGTH.pack(len(text)), text, *map(_bytes, tensors)]))


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[Tensor]]:
    """Wait for a message.

    Raises:
        EOFError: If the other end is gone.
        OSError: If it breaks, or nothing comes within the time limit of ``connection``.
    """
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    message = json.loads(_read(connection, length))
    return message, [_tensor(connection, name, shape) for name, shape in message.pop("tensors")]


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def _tensor(connection: socket.socket, name: str, shape: list[int]) -> Tensor:
    dtype: torch.dtype = getattr(torch, name)
    if not prod(shape):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(_read(connection, prod(shape) * dtype.itemsize), dtype=dtype).reshape(shape)


def _read(connection: socket.socket, length: int) -> bytearray:
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError("the other end is gone")
        view = view[count:]
    return buffer
