"""The process that a target's files are written in: loads networks as exported programs, and ends with whoever asks.

Started by `jobs` as ``python -m lightning_edge.exporters.writer_process <socket>``, so that no other process imports a
converter. Nothing imports this module.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_edge.exporters.run import messages
from lightning_edge.exporters.run.worker import leave, serve
from lightning_edge.exporters.writer import export_warnings, written
from lightning_edge.interface import Interface
from lightning_edge.network import Deployable
from lightning_edge.quiet import quiet_libraries

# How often the process looks whether anybody still waits for its file.
_LOOK_S = 1.0


def main() -> None:
    """Write the files that are asked for, and then run the last one, as a worker does, if that is asked."""
    leave(lambda: _serve(socket.socket(fileno=int(sys.argv[1]))))


def _serve(connection: socket.socket) -> None:
    quiet_libraries()
    stays = False
    while not stays:
        try:
            message, _ = messages.receive(connection)
        except (EOFError, ConnectionError):
            return
        with _ending_with(connection):
            reply = _answer(message, lambda step: messages.send(connection, {"step": step}))
        messages.send(connection, reply)
        stays = message["stay"] and "contents" in reply
    serve(connection)


def _answer(message: Mapping[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    torch.set_num_threads(message["threads"])
    tell("loading the network")
    with export_warnings() as messages:
        try:
            network = _loaded(message)
        except Exception as error:
            return {"foreign": f"{type(error).__name__}: {error}"}
        module = import_module(message["module"]).TARGET
        places = Path(message["path"]), Path(message["staged"])
        try:
            contents = written(module, network, *places, message["options"], tell)
        except Exception as error:
            return {"error": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
    # Not a Counter: asdict would count its pairs.
    plain = replace(contents, ops=dict(contents.ops))
    return {"contents": asdict(plain), "warnings": messages}


def _loaded(message: Mapping[str, Any]) -> Deployable:
    # Registers the operations of converted networks, which a program names.
    from torch.ao.quantization.fx import _decomposed  # noqa: F401

    program = torch.export.load(message["program"])
    interface = Interface.of(message["interface"])
    return Deployable.of_program(program, message["precision"], tuple(message["scales"]), interface)


@contextmanager
def _ending_with(connection: socket.socket) -> Iterator[None]:
    """Within this context, this process ends when the one that waits for it has: nobody asks it for anything then."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_LOOK_S):
            if select.select([connection], [], [], 0)[0] and not connection.recv(1, socket.MSG_PEEK):
                os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    main()
