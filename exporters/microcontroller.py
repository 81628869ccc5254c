"""What a microcontroller is given of an int8 ``.tflite``: C++ source, the operations to register, the arena's size."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lightning_edge.errors import ExportError
from lightning_edge.exporters import c_array, micro_memory, micro_ops, vela
from lightning_edge.exporters.micro_memory import Memory
from lightning_edge.exporters.staging import StagedPath, writing


@dataclass(frozen=True)
class Microcontroller:
    """What was written, and what it needs.

    Attributes:
        header: The ``.h``: sizes, ``register_operators``.
        source: The ``.cc``: the file as an array.
        compiled: The ``.tflite`` that Vela compiled for an Ethos-U, ``None`` without one.
        file_bytes: Size of the file, which is that of the array, in flash.
        constant_bytes: Weights, biases and other constants in it.
        operators: Methods of MicroMutableOpResolver to call.
        memory: RAM.
        estimate: What Vela estimates for an Ethos-U, ``None`` without one.
    """

    header: Path
    source: Path
    compiled: Path | None
    file_bytes: int
    constant_bytes: int
    operators: tuple[str, ...]
    memory: Memory
    estimate: vela.Estimate | None

    @property
    def resolver(self) -> str:
        """The C++ lines that register the operations, to paste where the interpreter is set up."""
        return c_array.resolver(self.operators)


def export_microcontroller(
    path: str | Path, folder: str | Path, *, ethosu: str | None = None, max_cpu_ops: int | None = None
) -> Microcontroller:
    """Write an int8 ``.tflite`` as C++ source for TensorFlow Lite Micro, and say what memory it needs.

    Args:
        path: The ``.tflite`` file.
        folder: Where the files go, named after ``path`` as a C identifier; missing folders are made.
        ethosu: An accelerator such as ``"ethos-u55-128"``: the file is also compiled for it by Arm's Vela (extra
            ``ethosu``), written as a ``.tflite`` of its own, and estimated.
        max_cpu_ops: Operations that may then be left to the CPU; any number if not given.

    Raises:
        ExportError: If the file computes in float, has an operation without a kernel, is refused by Vela, or cannot
            be written; nothing is written then, and what was there stays.
        MissingExtraError: If Vela is asked for and not installed.
        RunnerError: If the file is missing or none.
        ValueError: If an argument is not allowed.
    """
    path, folder = Path(path), Path(folder)
    if ethosu is not None:
        vela.check(ethosu)
    elif max_cpu_ops is not None:
        raise ValueError(f"max_cpu_ops={max_cpu_ops} says what Vela may leave to the CPU; give ethosu too")
    model = micro_ops.read(path)
    operators = micro_ops.methods(model, path.name)
    memory = micro_memory.memory(model, path.name)
    estimate = None if ethosu is None else vela.estimate(path, ethosu, max_cpu_ops=max_cpu_ops)
    data, name = path.read_bytes(), c_array.identifier(path.stem)
    header, source = folder / f"{name}.h", folder / f"{name}.cc"
    files = {
        header: c_array.header(name, len(data), memory.arena_bytes, operators).encode(),
        source: c_array.source(name, data).encode(),
    }
    compiled = None
    if estimate is not None:
        compiled = folder / f"{path.stem}-{estimate.config}.tflite"
        files[compiled] = estimate.compiled
    _write(files)
    used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    constants = (model.buffers[index].data for index in used)
    return Microcontroller(
        header=header,
        source=source,
        compiled=compiled,
        file_bytes=len(data),
        constant_bytes=sum(len(values) for values in constants if values is not None),
        operators=operators,
        memory=memory,
        estimate=estimate,
    )


def _write(files: Mapping[Path, bytes]) -> None:
    """Put all of them in place, or none: where one cannot be, those before it become what they were."""
    before: dict[Path, bytes | None] = {}
    for path in files:
        if path.is_dir():
            raise ExportError(f"cannot write {path}: a folder is there. Remove it or choose another folder.")
    with ExitStack() as stack:
        places = []
        for path, data in files.items():
            place = StagedPath(path)
            stack.callback(place.discard)
            with writing(path):
                before[path] = path.read_bytes() if path.exists() else None
                place.staged.write_bytes(data)
            places.append(place)
        done: list[Path] = []
        try:
            for place in places:
                place.accept()
                done.append(place.path)
        except ExportError:
            for path in done:
                _restore(path, before[path])
            raise


def _restore(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
