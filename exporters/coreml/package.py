"""A Core ML package on disk: read it as a plain `Program`, and rewrite its graph with short names.

The only room that knows the package's layout and coremltools' classes.
"""

from __future__ import annotations

import json
import logging
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy

from lightning_edge.errors import RunnerError, require
from lightning_edge.exporters.coreml.mil.interpreter import Constant, Operand, Operation, Program, Variable
from lightning_edge.interface import IMAGE_DIMENSIONS, Interface
from lightning_edge.network import Deployable

_GRAPH = Path("Data/com.apple.CoreML/model.mlmodel")
_WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


# Core ML's numbers for gray and for RGB, by channels.
_COLOR_SPACES = {1: 10, 3: 20}
_CHATTY = ("coremltools", "torch.utils._pytree")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what coremltools writes to the terminal: version warnings, missing macOS libraries, progress bars.

    Errors are exceptions and pass through.
    """
    logs = [logging.getLogger(name) for name in _CHATTY]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def coremltools() -> Any:
    """Import coremltools without its warnings.

    Raises:
        MissingExtraError: If it is not installed.
    """
    with quiet():
        return require("coremltools", "coreml")


def _constant(variable: Any, names: Any) -> Constant:
    value = variable.val
    return Constant(value if isinstance(value, str) else numpy.asarray(value), names.builtin_to_string(variable.dtype))


def _variable(variable: Any, names: Any) -> Variable:
    shape = tuple(int(size) if isinstance(size, int | numpy.integer) else -1 for size in variable.shape)
    return Variable(variable.name, names.builtin_to_string(variable.dtype), shape)


def plain(function: Any) -> Program:
    """Give a function of coremltools' own program as plain values."""
    from coremltools.converters.mil.mil import types as names

    seen: dict[Any, Variable] = {}

    def variable(source: Any) -> Variable:
        if source not in seen:
            seen[source] = _variable(source, names)
        return seen[source]

    def value(source: Any) -> Variable | Constant:
        constant = source.op is not None and source.op.op_type == "const"
        return _constant(source, names) if constant else variable(source)

    constants: dict[Any, Variable | Constant] = {}

    def operand(source: Any) -> Operand:
        if isinstance(source, list | tuple):
            return tuple(shared(element) for element in source)
        return shared(source)

    def shared(source: Any) -> Variable | Constant:
        # One object for one constant, so that weights used twice are counted once.
        if source not in constants:
            constants[source] = value(source)
        return constants[source]

    inputs = tuple(variable(source) for source in function.inputs.values())
    operations = []
    for op in function.operations:
        if op.op_type == "const":
            continue
        read = {key: operand(source) for key, source in op.inputs.items() if source is not None}
        made = tuple(variable(output) for output in op.outputs)
        operations.append(Operation(op.op_type, made[0].name if made else op.name, read, made))
    return Program(inputs, tuple(operations), tuple(shared(output) for output in function.outputs))


def read(path: Path) -> Program:
    """Read the main function of an ML Program package.

    Args:
        path: The ``.mlpackage`` folder.

    Raises:
        RunnerError: If the path is no such package, or it is damaged.
        MissingExtraError: If coremltools is not installed.
    """
    if not (path / _GRAPH).is_file():
        raise RunnerError(
            f"{str(path)!r} is not a Core ML package: it has no {_GRAPH}. "
            "Give the .mlpackage folder that export() wrote."
        )
    coremltools()
    _check_manifest(path)
    try:
        with quiet():
            from coremltools.converters.mil.frontend.milproto import load
            from coremltools.proto import Model_pb2

            # Not through MLModel: its package library rewrites the manifest of what it only reads.
            spec = Model_pb2.Model.FromString((path / _GRAPH).read_bytes())
            if spec.WhichOneof("Type") != "mlProgram":
                raise RunnerError(
                    f"{str(path)!r} holds a Core ML {spec.WhichOneof('Type')}, not an ML Program; export it again"
                )
            program = load.load(spec, spec.specificationVersion, file_weights_dir=str((path / _WEIGHTS).parent))
            return replace(plain(program.functions["main"]), notes=dict(spec.description.metadata.userDefined))
    except RunnerError:
        raise
    except Exception as error:  # the loader raises whatever a damaged file leads it to
        raise RunnerError(
            f"{str(path)!r} cannot be read as a Core ML package ({type(error).__name__}: {error}). "
            "It may be damaged or written by a newer coremltools; export it again."
        ) from error


def _check_manifest(path: Path) -> None:
    """Make sure that the manifest leads to the graph: Core ML opens a package by it, though it is not needed here."""
    try:
        manifest = json.loads((path / "Manifest.json").read_text())
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunnerError(
            f"{str(path)!r} has no Manifest.json that leads to its graph ({type(error).__name__}: {error}); export it "
            "again"
        ) from error
    if Path("Data") / root != _GRAPH:
        raise RunnerError(f"{str(path)!r} has a Manifest.json that leads to {root!r} and not to {_GRAPH}")


def compact(path: Path, output_names: Sequence[str], interface: Interface | None = None) -> None:
    """Rewrite a saved package in place: name inputs and outputs, shorten the other names, share equal constants.

    The debug map that coremltools leaves beside the data and the date and random identifiers in it go too, so
    equal networks give equal files. Operations, values and weights stay as they are, but for an ``identity`` where
    the network gives an input, a constant or one value twice: Core ML wants every output to be a value of its own.

    Args:
        path: The ``.mlpackage`` folder.
        output_names: Names for the outputs in order; see `feature_names`.
        interface: Names of inputs, if it has any, and what is noted in the package.
    """
    interface = interface or Interface()
    with quiet():
        from coremltools.proto import Model_pb2

    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    spec = Model_pb2.Model.FromString((path / _GRAPH).read_bytes())
    spec.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    _separate_outputs(spec, function, block)
    given = [entry.name for entry in function.inputs]
    names = dict(zip(given, interface.inputs or given, strict=True))
    for entry in (*function.inputs, *spec.description.input):
        entry.name = names[entry.name]
    fresh = feature_names(output_names, list(names.values()))
    names |= dict(zip(block.outputs, fresh, strict=True))
    if not any(operation.blocks for operation in block.operations):
        _shorten(block, names)
        block.outputs[:] = fresh
        for feature, name in zip(spec.description.output, fresh, strict=True):
            feature.name = name
    if interface.pixels is not None:
        _as_images(spec)
    for name, text in interface.notes().items():
        spec.description.metadata.userDefined[name] = text
    (path / _GRAPH).write_bytes(spec.SerializeToString(deterministic=True))
    _write_manifest(path)


def _as_images(spec: Any) -> None:
    """Declare 4-D inputs as images, which the program itself goes on taking as numbers from 0 to 255."""
    for feature in spec.description.input:
        shape = list(feature.type.multiArrayType.shape)
        if len(shape) == IMAGE_DIMENSIONS:
            _, channels, height, width = shape
            image = feature.type.imageType
            image.height, image.width, image.colorSpace = height, width, _COLOR_SPACES[channels]


def check_interface(network: Deployable) -> None:
    """Refuse names that Core ML does not allow, and images of pixels that it has none of.

    Raises:
        ValueError: Naming the first.
    """
    interface = network.interface
    channels = {tensor.shape[1] for tensor in network.inputs.tensors if tensor.dim() == IMAGE_DIMENSIONS}
    if interface.pixels is not None and not channels <= _COLOR_SPACES.keys():
        raise ValueError(
            f"Interface(pixels=...): Core ML has images of {' or '.join(map(str, _COLOR_SPACES))} channels, and the "
            f"network takes {max(channels)}. Leave pixels out for this target"
        )
    if interface.pixels is not None and interface.max_batch > 1:
        raise ValueError(
            f"Interface(pixels=..., max_batch={interface.max_batch}): Core ML takes one image a call. Leave "
            "one of both out"
        )
    names = [*interface.inputs, *interface.outputs]
    for name, allowed in zip(names, feature_names(names, []), strict=True):
        if name != allowed:
            raise ValueError(f"Interface: Core ML has {name!r} for a word of its own and no name; give another one")


def feature_names(wanted: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Make names that Core ML allows: letters, digits and underscores, no reserved word, each once.

    Args:
        wanted: Names as the network gives them.
        taken: Names that are in use.
    """
    with quiet():
        from coremltools.converters.mil.mil.passes.defs.preprocess import NameSanitizer

    sanitizer = NameSanitizer(prefix="output_")
    for name in taken:
        sanitizer.sanitize_name(name)
    return [sanitizer.sanitize_name(f"output_{name}" if name in taken else name) for name in wanted]


def _separate_outputs(spec: Any, function: Any, block: Any) -> None:
    types = {given.name: given.type for given in function.inputs}
    for operation in block.operations:
        types |= {output.name: output.type for output in operation.outputs}
    used = {given.name for given in function.inputs}
    used |= {operation.outputs[0].name for operation in block.operations if operation.type == "const"}
    for position, source in enumerate(block.outputs):
        if source in used:
            copy = block.operations.add(type="identity")
            copy.inputs["x"].arguments.add(name=source)
            name = f"{source}_output_{position}"
            copy.outputs.add(name=name).type.CopyFrom(types[source])
            block.outputs[position] = name
            spec.description.output[position].name = name
        used.add(block.outputs[position])


def _shorten(block: Any, names: dict[str, str]) -> None:
    """Rename values, ``names`` giving those that are decided; every operation keeps its type as its name."""
    fixed, taken = set(names), set(names.values())
    count: Counter[str] = Counter()
    constants: dict[bytes, str] = {}
    kept = []
    for operation in block.operations:
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    binding.name = names[binding.name]
        value = b""
        if operation.type == "const" and operation.outputs[0].name not in fixed:
            value = operation.attributes["val"].SerializeToString(deterministic=True)
            if value in constants:
                names[operation.outputs[0].name] = constants[value]
                continue
        for output in operation.outputs:
            if output.name not in names:
                names[output.name] = _fresh(operation.type, count, taken)
            output.name = names[output.name]
        if value:
            constants[value] = operation.outputs[0].name
        if "name" in operation.attributes and operation.outputs:
            operation.attributes["name"].immediateValue.tensor.strings.values[0] = operation.outputs[0].name
        kept.append(type(operation).FromString(operation.SerializeToString()))
    del block.operations[:]
    block.operations.extend(kept)


def _fresh(kind: str, count: Counter[str], taken: set[str]) -> str:
    short = {"const": "c", "constexpr_affine_dequantize": "weight", "constexpr_blockwise_shift_scale": "weight"}
    stem = short.get(kind, kind)
    while True:
        name = f"{stem}_{count[stem]}"
        count[stem] += 1
        if name not in taken:
            return name


def _write_manifest(path: Path) -> None:
    manifest = json.loads((path / "Manifest.json").read_text())
    entries = {}
    root = manifest["rootModelIdentifier"]
    for identifier, entry in manifest["itemInfoEntries"].items():
        stable = str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"]))
        entries[stable] = entry
        root = stable if identifier == root else root
    ordered = {**manifest, "itemInfoEntries": dict(sorted(entries.items())), "rootModelIdentifier": root}
    (path / "Manifest.json").write_text(json.dumps(ordered, indent=4) + "\n")
