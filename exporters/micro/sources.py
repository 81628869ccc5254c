"""C++ sources for TensorFlow Lite Micro from an int8 ``.tflite`` file: the array, its operators, and its memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_edge.contents import Contents
from lightning_edge.errors import ExportError
from lightning_edge.exporters.micro.arena import ALIGNMENT_BYTES
from lightning_edge.exporters.micro.endpoints import comment, declarations
from lightning_edge.exporters.micro.memory import memory
from lightning_edge.exporters.micro.operators import METHODS
from lightning_edge.exporters.tflite.graph import op_name, parse
from lightning_edge.exporters.tflite.read import contents
from lightning_edge.files import StagedPath, writing
from lightning_edge.regular_files import read_regular

REGISTER_MACRO = "LIGHTNING_EDGE_REGISTER_OPERATORS"
_BYTES_A_LINE = 16
# Its array takes five times as much as text; no microcontroller has a hundredth of it.
_MOST_BYTES = 2**28
_OFFLINE_PLAN = "OfflineMemoryAllocation"


@dataclass(frozen=True)
class Footprint:
    """What an int8 file needs of a microcontroller.

    Attributes:
        operators: The kinds of its operations, as the schema names them.
        size_bytes: The file, which lies in flash.
        weight_bytes: Weights of its convolution, linear and matrix layers in the file.
        activation_bytes: Activations in RAM; this and the next three are those of `Memory`.
        lower_bound_bytes: The most activations that live at one step.
        persistent_bytes: What the interpreter keeps beside them.
        arena_bytes: The arena, an upper bound.
    """

    operators: tuple[str, ...]
    size_bytes: int
    weight_bytes: int
    activation_bytes: int
    lower_bound_bytes: int
    persistent_bytes: int
    arena_bytes: int


@dataclass(frozen=True)
class Sources:
    """The two files written, and what they need.

    Attributes:
        header: Declarations, the size of the arena, inputs and outputs, and the operators to register.
        source: The array.
        footprint: What it needs of a microcontroller.
    """

    header: Path
    source: Path
    footprint: Footprint


def write(path: str | Path, folder: str | Path) -> Sources:
    """Write ``<name>.h`` and ``<name>.cc`` of a file, both or neither.

    The name is `identifier` of the file's. The array file needs nothing but a C++11 compiler. The header declares
    ``<name>_register_operators`` where the macro ``LIGHTNING_EDGE_REGISTER_OPERATORS`` is defined, which needs the
    sources of TensorFlow Lite Micro.

    Args:
        path: The ``.tflite`` file.
        folder: Where to write; made if it is not there. Files of these names are replaced.

    Returns:
        What was written.

    Raises:
        ExportError: If TensorFlow Lite Micro does not run the file, or the folder cannot be written.
        MissingExtraError: If the extra ``tflite`` is not installed.
    """
    path, folder = Path(path), Path(folder)
    data = _read(path)
    held = _contents(path)
    found = _footprint(path, data, held)
    name = identifier(path.stem)
    digest = hashlib.sha256(data).hexdigest()
    origin = f"// Written by lightning-edge from {comment(path.name)}\n// SHA-256 {digest}\n"
    header, source = folder / f"{name}.h", folder / f"{name}.cc"
    _place({source: origin + _array(name, data), header: origin + _header(name, found, held)})
    return Sources(header, source, found)


def footprint(path: str | Path) -> Footprint:
    """Tell what a file needs of a microcontroller.

    Args:
        path: The ``.tflite`` file.

    Raises:
        ExportError: If it is no such file, computes in float, has shapes that are not fixed, or holds an operation
            without a kernel.
        MissingExtraError: If the extra ``tflite`` is not installed.
    """
    path = Path(path)
    return _footprint(path, _read(path), _contents(path))


def identifier(stem: str) -> str:
    """Make a name that C++ takes of any file's: letters, digits and single underscores, no digit first."""
    name = re.sub(r"[^0-9A-Za-z]+", "_", stem).strip("_")
    return name if name and not name[0].isdigit() else f"model_{name}".rstrip("_")


def _contents(path: Path) -> Contents:
    with _refusing(path):
        return contents(path)


def _footprint(path: Path, data: bytes, held: Contents) -> Footprint:
    with _refusing(path):
        model = parse(data)
    _check(path, model, held.float_compute_ops + held.float_ops, tuple(held.ops))
    with _refusing(path):
        needed = memory(model)
    return Footprint(
        operators=tuple(held.ops),
        size_bytes=len(data),
        weight_bytes=held.int8_weight_bytes + held.int4_weight_bytes,
        activation_bytes=needed.activation_bytes,
        lower_bound_bytes=needed.lower_bound_bytes,
        persistent_bytes=needed.persistent_bytes,
        arena_bytes=needed.arena_bytes,
    )


def _check(path: Path, model: Any, floats: tuple[str, ...], operators: tuple[str, ...]) -> None:
    if any(_text(entry.name) == _OFFLINE_PLAN for entry in model.metadata or ()):
        raise ExportError(f"{path}: its memory is planned already, as in Vela's files; give the one it was made from")
    if floats:
        raise ExportError(
            f"{path}: it computes in float ({', '.join(sorted(set(floats)))}); allowed: int8 and int16 files. "
            "Export an int8 network: quantize it, or train it with Quantize; with integer_only=True if it has "
            "attention, softmax or GELU"
        )
    graph = model.subgraphs[0]
    if any(
        op_name(model, op) == "TRANSPOSE_CONV" and op.builtinOptions.fusedActivationFunction for op in graph.operators
    ):
        raise ExportError(
            f"{path}: a transposed convolution ends with an activation, which TensorFlow Lite Micro's kernel leaves "
            "out. Do not join what it gives to values of another range, as a concatenation does"
        )
    unknown = [name for name in operators if name not in METHODS]
    if unknown:
        raise ExportError(
            f"{path}: TensorFlow Lite Micro has no kernel for {', '.join(unknown)}. Build the network without, of: "
            f"{', '.join(METHODS)}"
        )


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, _MOST_BYTES)
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}; give a .tflite file") from error
    except ValueError as error:
        raise ExportError(f"{error}; give a .tflite file") from error


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ExportError(f"{path}: {error}. Give an int8 .tflite file of fixed shapes") from error


def _array(name: str, data: bytes) -> str:
    lines = [
        "    " + " ".join(f"0x{byte:02x}," for byte in data[start : start + _BYTES_A_LINE])
        for start in range(0, len(data), _BYTES_A_LINE)
    ]
    return "\n".join(
        [
            f'#include "{name}.h"',
            "",
            f"alignas({ALIGNMENT_BYTES}) const unsigned char {name}_data[] = {{",
            *lines,
            "};",
            f"const std::size_t {name}_data_length = sizeof({name}_data);",
            "",
        ]
    )


def _header(name: str, found: Footprint, held: Contents) -> str:
    guard = f"LIGHTNING_EDGE_{name.upper()}_H_"
    return f"""#ifndef {guard}
#define {guard}

#include <cstddef>

extern const unsigned char {name}_data[];
extern const std::size_t {name}_data_length;

// An upper bound for the reference kernels and CMSIS-NN's: activations, {found.activation_bytes} bytes as planned; what
// kernels ask for; and {found.persistent_bytes} that the interpreter keeps. MicroInterpreter::arena_used_bytes() tells
// what it takes.
constexpr std::size_t {name}_arena_bytes = {found.arena_bytes};

{declarations(name, held)}

#ifdef {REGISTER_MACRO}
{register_operators(name, found.operators)}
#endif  // {REGISTER_MACRO}

#endif  // {guard}
"""


def register_operators(prefix: str, operators: tuple[str, ...]) -> str:
    """Write the function that registers just these operations with a resolver that has just their number of places.

    Args:
        prefix: What its names begin with.
        operators: Operations as the schema names them.

    Raises:
        KeyError: If there is no kernel for one.
    """
    calls = "\n".join(
        f"  if (resolver.{METHODS[operator]}() != kTfLiteOk) return kTfLiteError;" for operator in operators
    )
    return f"""#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"

using {prefix}_resolver = tflite::MicroMutableOpResolver<{len(operators)}>;

inline TfLiteStatus {prefix}_register_operators({prefix}_resolver& resolver) {{
{calls}
  return kTfLiteOk;
}}"""


def _place(texts: dict[Path, str]) -> None:
    """Put all files in place, or leave the folder as it was."""
    for path in texts:
        if path.is_dir():
            raise ExportError(f"cannot write {path}: it is a folder; choose another folder")
    staged: list[StagedPath] = []
    before: dict[Path, bytes | None] = {}
    try:
        for path, text in texts.items():
            staged.append(StagedPath(path))
            with writing(path):
                staged[-1].staged.write_text(text, encoding="ascii")
        for place in staged:
            old = place.path.read_bytes() if place.path.is_file() else None
            place.accept()
            before[place.path] = old
    except BaseException:
        for path, old in before.items():
            path.unlink() if old is None else path.write_bytes(old)
        raise
    finally:
        for place in reversed(staged):
            place.discard()


def _text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)
