"""Writes a file and reads back what it holds: in this process, or as the process that a target's files are written in.

The process is started by `jobs` as ``python -m lightning_edge.exporters.writer <socket>``. It loads the network as an
exported program, writes a file, and ends with whoever asks, so that no other process imports a converter.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_edge.contents import Contents
from lightning_edge.exporters.artifact import inspect_file, placed
from lightning_edge.exporters.run import messages
from lightning_edge.exporters.run.worker import leave, serve
from lightning_edge.exporters.target import Target
from lightning_edge.exporters.verify.contents import ExportWarning
from lightning_edge.files import writing
from lightning_edge.interface import Interface
from lightning_edge.network import Deployable
from lightning_edge.quiet import quiet_libraries
from lightning_edge.tracing import TRACING

# How often the process looks whether anybody still waits for its file.
_LOOK_S = 1.0


def written(
    module: Target,
    network: Deployable,
    path: Path,
    staged: Path,
    options: Mapping[str, Any],
    tell: Callable[[str], None] = lambda step: None,
) -> Contents:
    """Write what `Target.prepare` gave, and read what the file holds.

    Args:
        module: The target.
        network: The network.
        path: Where the file shall be in the end, for messages.
        staged: Where to write it.
        options: The target's own options.
        tell: Is called with a word or two before each step.

    Raises:
        ExportError: If the target cannot write the network.
        RunnerError: If the file is not what its suffix says.
    """
    tell("converting")
    with TRACING, writing(path):
        module.write(network, staged, **options)
    tell("reading the file back")
    return placed(module, staged, inspect_file(module, staged, path.name))


@contextmanager
def export_warnings() -> Iterator[list[str]]:
    """Within this context, collect what an export warns of; what converters say to each other is dropped."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExportWarning)
        try:
            yield found
        finally:
            found += [str(entry.message) for entry in caught if issubclass(entry.category, ExportWarning)]


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
    with export_warnings() as told:
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
    return {"contents": asdict(plain), "warnings": told}


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
