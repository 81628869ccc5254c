"""Core ML: write an ML Program package, read what is in it, run it.

On macOS Core ML itself runs the package; everywhere else `mil` executes the saved program in torch.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal, final, get_args

import numpy
import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument

from lightning_edge.contents import Contents, Endpoint, Placements
from lightning_edge.errors import ExportError, RunnerError, first_line, require
from lightning_edge.exporters.coreml import passes as coreml_forms
from lightning_edge.exporters.coreml import placement as coreml_placement
from lightning_edge.exporters.coreml import weights as coreml_weights
from lightning_edge.exporters.coreml.mil import intermediates as mil_inside
from lightning_edge.exporters.coreml.mil.interpreter import Constant, Interpreter, Operation, Program, Variable
from lightning_edge.exporters.coreml.mil.operations import MOVES
from lightning_edge.exporters.coreml.mil.values import DTYPES
from lightning_edge.exporters.coreml.package import check_interface, compact, coremltools, quiet, read
from lightning_edge.exporters.coreml.weights import Scheme
from lightning_edge.exporters.run.calls import TensorSpec, of_one_sample
from lightning_edge.exporters.run.runner import Intermediate, Runner
from lightning_edge.exporters.target import Target, explain
from lightning_edge.interface import IMAGE_DIMENSIONS, Interface
from lightning_edge.network import Deployable

EXTRA = "coreml"

ComputePrecision = Literal["float16", "float32"]

# How it says that the file it writes weights to, before it has a package, took no more.
_TEMPORARY = "[MIL FileWriter]"
_PRODUCTS = {"conv": "weight", "conv_transpose": "weight", "linear": "weight", "matmul": "y"}
_COMPUTE = frozenset({*_PRODUCTS, "einsum", "scaled_dot_product_attention"})
# What makes a weight of what is stored of it, and the inputs that are stored.
_WEIGHTS: dict[str, tuple[str, ...]] = {
    "constexpr_affine_dequantize": ("quantized_data",),
    "constexpr_blockwise_shift_scale": ("data",),
    "constexpr_lut_to_dense": ("indices",),
    "constexpr_sparse_to_dense": ("nonzero_data", "mask"),
}
# What makes the two inputs of a sparse weight of integers: one bit for each place, and the integers that are not zero.
_SPARSE_INTEGERS = "constexpr_sparse_blockwise_shift_scale"
# An activation that clips is part of the operation before it: the quantizer behind it clips anyway.
_CLIPS = frozenset({"relu", "relu6", "clip"})
_DTYPE_NAMES = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}


@final
class CoreML(Target):
    """Core ML: ``.mlpackage`` folders."""

    suffix = ".mlpackage"
    extra = EXTRA
    needs = ("coremltools",)
    runtime_modules = ("coremltools",)
    # The reference interpreter is our own code, on torch; importing coremltools once more would take it ten seconds.
    in_process = sys.platform != "darwin"
    int8_options = frozenset({"sparse_weights"})
    takes_images = True
    takes_batches = True
    schemes = get_args(Scheme)

    def write(
        self,
        network: Deployable,
        path: Path,
        *,
        minimum_ios: int = 17,
        compute_precision: ComputePrecision = "float32",
        scheme: Scheme | None = None,
        block_size: int | None = None,
        sparse_weights: bool = False,
    ) -> None:
        """Write the network as an ML Program with named inputs and outputs.

        Args:
            network: The network; int8 ones carry their trained ranges into the file.
            path: Where to write, a folder ending in ``.mlpackage`` that does not exist yet.
            minimum_ios: Oldest iOS that can run it, 17 or later; 18 stores weights in its own block-wise form.
            compute_precision: Type of what is not int8. ``"float32"`` gives what the network gives to a step or so of
                its outputs, at the same size; ``"float16"`` is what the Neural Engine runs, some steps off.
            scheme: How a float network's weights are stored. ``"fp16"`` computes in float16 as well; int4 needs iOS 18.
                A palette is a table of 256, 64 or 16 values for each weight, found by k-means; ``"sparse"`` leaves out
                the zeros that training made (`Sparsify`).
            block_size: With ``"int4_weight_only"``, how many inputs of a layer share a scale, 16 or more; ``None`` for
                one scale a channel, which is also what layers get whose inputs it does not divide.
            sparse_weights: Whether an int8 network's weights are stored without their zeros, from iOS 18 on.

        Raises:
            ExportError: If coremltools cannot convert the network, or ``sparse_weights`` makes it no smaller.
            ValueError: If an option is not one of those allowed.
            MissingExtraError: If coremltools is not installed.
        """
        if compute_precision not in get_args(ComputePrecision):
            raise ValueError(f"compute_precision={compute_precision!r} is not one of {get_args(ComputePrecision)}")
        tools = coremltools()
        deployment = getattr(tools.target, f"iOS{minimum_ios}", None)
        if deployment is None or minimum_ios < 17:
            raise ValueError(
                f"minimum_ios={minimum_ios!r} is not a version this coremltools writes int8 programs for; give 17 or "
                "later"
            )
        coreml_weights.check(minimum_ios, scheme, block_size, sparse_weights, network.precision == "int8")
        if block_size is not None:
            coreml_weights.tell_uneven(network.graph, block_size)
        check_interface(network)
        if scheme == "fp16":
            compute_precision = "float16"
        try:
            with quiet():
                program = _tensors_only(coreml_forms.in_its_forms(coreml_forms.program_of(network)))
                model = tools.convert(
                    program,
                    outputs=_output_types(tools, program),
                    minimum_deployment_target=deployment,
                    compute_precision=getattr(tools.precision, compute_precision.upper()),
                    skip_model_load=True,
                )
                if scheme not in (None, "fp16"):
                    model = coreml_weights.in_scheme(model, scheme, block_size)
                if sparse_weights:
                    coreml_weights.save_without_zeros(model, path, network)
                else:
                    model.save(str(path))
        except (OSError, ExportError):
            raise
        except Exception as error:  # the converter raises whatever an operation leads it to
            if _TEMPORARY in str(error):
                raise ExportError(
                    f"coremltools could not write the weights to its temporary folder {gettempdir()}: "
                    f"{first_line(error)} "
                    "Free some space there, or set TMPDIR to a folder that has it."
                ) from error
            advice = "Replace that operation by one that coremltools has, or leave the target out."
            raise explain("coreml", error, advice) from error
        if not sparse_weights:
            compact(path, network.output_names(), network.interface)

    def inspect(self, path: Path) -> Contents:
        """Read from a saved package which weights are int8 and which operations compute in float.

        An operation computes on int8 where its inputs come from ``dequantize`` and its weights from a ``constexpr``
        operation over 8-bit integers: that is how an ML Program writes int8 arithmetic.

        Raises:
            RunnerError: If the package cannot be read.
            MissingExtraError: If coremltools is not installed.
        """
        program = read(path)
        found, interface = contents(program), Interface.of_notes(program.notes)
        if interface.pixels is not None:
            images = (
                replace(end, dtype="uint8") if len(end.shape) == IMAGE_DIMENSIONS else end for end in found.inputs
            )
            found = replace(found, inputs=tuple(images))
        return replace(found, interface=interface)

    def placements(self, path: Path) -> Placements | None:
        """Ask Core ML's compute plan where it would run the operations of a package; ``None`` away from macOS."""
        return coreml_placement.by_plan(path, read(path))

    def open(self, path: Path, threads: int) -> Runner:
        """Load the package: into Core ML on macOS, into the reference interpreter elsewhere.

        Args:
            path: The ``.mlpackage`` folder.
            threads: CPU threads for the reference interpreter; Core ML chooses its own.

        Raises:
            RunnerError: If the package cannot be read or run.
            MissingExtraError: If coremltools is not installed.
        """
        return _CoreML(path) if sys.platform == "darwin" else _Reference(path, threads)


TARGET = CoreML()


def _output_types(tools: Any, program: torch.export.ExportedProgram) -> list[Any]:
    """Ask for float32 outputs where the network has float ones, whatever it computes in, as its inputs are."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    outputs = [values[name] for name in program.graph_signature.user_outputs]
    return [tools.TensorType(dtype=numpy.float32 if value.is_floating_point() else None) for value in outputs]


def _tensors_only(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Drop numbers, strings and None from the inputs: torch.export has written them into the graph already."""
    signature = program.graph_signature
    fixed = {spec.arg.name for spec in signature.input_specs if isinstance(spec.arg, ConstantArgument)}
    for node in [node for node in program.graph.nodes if node.op == "placeholder" and node.name in fixed]:
        if not node.users:
            program.graph.erase_node(node)
    signature.input_specs[:] = [spec for spec in signature.input_specs if spec.arg.name not in fixed]
    return program


def contents(program: Program) -> Contents:
    """Count the weights and the float operations of a program; see `inspect`."""
    makers = {output: operation for operation in program.operations for output in operation.outputs}
    weights: dict[str, dict[Any, int]] = {kind: {} for kind in ("int8", "int4", "float", "palette", "sparse")}
    float_compute: list[str] = []
    float_others: list[str] = []
    for operation in program.operations:
        for key in ("x", "y", "weight") if operation.kind in _PRODUCTS else ():
            if key in operation.inputs:
                _count_weight(_origin(operation.inputs[key], makers), makers, weights)
        if operation.kind in MOVES or operation.kind.startswith("constexpr_"):
            continue
        if operation.kind in ("quantize", "dequantize", "cast") or _is_clip_of_compute(operation, makers):
            continue
        if not _computes_float(operation, makers):
            continue
        named = operation.kind in operation.name
        label = operation.name if named else f"{operation.kind} ({operation.name})"
        (float_compute if operation.kind in _COMPUTE else float_others).append(label)
    return Contents(
        int8_weight_bytes=sum(weights["int8"].values()),
        float_weight_bytes=sum(weights["float"].values()),
        ops=Counter(operation.kind for operation in program.operations),
        float_compute_ops=tuple(float_compute),
        float_ops=tuple(float_others),
        half_weight_bytes=sum(size for weight, size in weights["float"].items() if weight.dtype == "fp16"),
        int4_weight_bytes=sum(weights["int4"].values()),
        palette_weight_bytes=sum(weights["palette"].values()),
        sparse_weight_bytes=sum(weights["sparse"].values()),
        inputs=_endpoints(program.inputs),
        outputs=_endpoints(program.outputs),
        placements=coreml_placement.by_support(
            program, {operation for operation in program.operations if _computes_float(operation, makers)}
        ),
    )


def _endpoints(values: Iterable[Any]) -> tuple[Endpoint, ...]:
    return tuple(
        Endpoint(value.name, of_one_sample(value.shape), _DTYPE_NAMES.get(value.dtype, value.dtype))
        for value in values
        if isinstance(value, Variable)
    )


def _origin(operand: Any, makers: Mapping[Variable, Operation]) -> Variable | Constant:
    """Follow a value back through operations that only move values about."""
    while isinstance(operand, Variable) and operand in makers and makers[operand].kind in MOVES:
        operand = next(iter(makers[operand].operands()))
    origin: Variable | Constant = operand
    return origin


def _count_weight(
    origin: Variable | Constant, makers: Mapping[Variable, Operation], found: Mapping[str, dict[Any, int]]
) -> None:
    if isinstance(origin, Constant):
        found["float"][origin] = origin.size_bytes
        return
    maker = makers.get(origin)
    if maker is not None and (integers := _sparse_integers(maker, makers)) is not None:
        for key, kind in (("nonzero_data", "int8"), ("data_mask", "sparse")):
            part = integers.inputs[key]
            assert isinstance(part, Constant)
            found[kind][part] = _packed_bytes(part)
        return
    for key in _WEIGHTS.get(maker.kind, ()) if maker is not None else ():
        stored = maker.inputs.get(key) if maker is not None else None
        if isinstance(stored, Constant):
            found[_kind(maker, stored)][stored] = _packed_bytes(stored)


def _sparse_integers(maker: Operation, makers: Mapping[Variable, Operation]) -> Operation | None:
    """What holds the integers of a sparse weight; ``None`` where it is none, or one of floats."""
    values = maker.inputs.get("nonzero_data") if maker.kind == "constexpr_sparse_to_dense" else None
    before = makers.get(values) if isinstance(values, Variable) else None
    return before if before is not None and before.kind == _SPARSE_INTEGERS else None


def _kind(maker: Operation | None, stored: Constant) -> str:
    special = {"constexpr_lut_to_dense": "palette", "constexpr_sparse_to_dense": "sparse"}
    plain = {"int8": "int8", "uint8": "int8", "int4": "int4", "uint4": "int4"}.get(stored.dtype, "float")
    return plain if maker is None else special.get(maker.kind, plain)


def _packed_bytes(stored: Constant) -> int:
    """Bytes in the file: in memory each integer of less than eight bits has a byte of its own."""
    bits = stored.dtype.removeprefix("u").removeprefix("int")
    return (stored.size_bytes * int(bits) + 7) // 8 if bits.isdigit() and int(bits) < 8 else stored.size_bytes


def _is_clip_of_compute(operation: Operation, makers: Mapping[Variable, Operation]) -> bool:
    source = operation.inputs.get("x")
    return operation.kind in _CLIPS and isinstance(source, Variable) and source in makers


def _computes_float(operation: Operation, makers: Mapping[Variable, Operation]) -> bool:
    """Whether it makes floats of anything but int8 values and, where it is no product, constants."""
    if all(output.dtype not in ("fp16", "fp32") for output in operation.outputs):
        return False
    weight = operation.inputs.get(_PRODUCTS.get(operation.kind, ""))
    if weight is not None and isinstance(_origin(weight, makers), Constant):
        return True
    origins = [origin for operand in operation.operands() for origin in _origins(operand, makers)]
    kinds = {makers[origin].kind if origin in makers else "" for origin in origins if isinstance(origin, Variable)}
    return not kinds <= {"dequantize", *_WEIGHTS}


def _origins(operand: Variable | Constant, makers: Mapping[Variable, Operation]) -> list[Variable | Constant]:
    """Every value that a value is put together from by moving alone."""
    if not isinstance(operand, Variable) or operand not in makers or makers[operand].kind not in MOVES:
        return [operand]
    return [origin for part in makers[operand].operands() for origin in _origins(part, makers)]


def _specs(program: Program) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(of_one_sample(variable.shape), DTYPES[variable.dtype]) for variable in program.inputs)


@final
class _Reference(Runner):
    """The saved program run by `mil.Interpreter`."""

    is_reference = True

    def __init__(self, path: Path, threads: int) -> None:
        program = self._program = read(path)
        self._interpreter = Interpreter(program)
        self.inputs = _specs(program)
        self._threads = threads
        self.runtime = (
            f"reference interpreter of the MIL program (torch {torch.__version__}, {threads} threads), "
            "not Core ML's kernels"
        )

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one sample."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return self._interpreter(tensors)
        finally:
            torch.set_num_threads(before)

    def intermediates(self, tensors: list[Tensor]) -> list[Intermediate]:
        """Run on one sample and give the quantized values inside the program."""
        return mil_inside.intermediates(self._program, tensors)


def _fed(tensor: Tensor, dtype: str) -> Any:
    """Give one input as Core ML's Python interface takes it; uint8 are the pixels of an image."""
    if tensor.dtype != torch.uint8:
        return tensor.detach().to(torch.int32 if dtype == "int32" else torch.float32).numpy()
    picture = tensor[0].permute(1, 2, 0)
    return require("PIL.Image", EXTRA).fromarray((picture if len(tensor[0]) > 1 else picture[:, :, 0]).numpy())


@final
class _CoreML(Runner):
    """The package run by Core ML on macOS, on all compute units."""

    def __init__(self, path: Path) -> None:
        program = read(path)
        self._inputs = program.inputs
        self.inputs = _specs(program)
        self._outputs = [output for output in program.outputs if isinstance(output, Variable)]
        tools = coremltools()
        try:
            with quiet():
                self._model = tools.models.MLModel(str(path))
        except Exception as error:  # whatever Core ML's compiler reports
            raise RunnerError(f"Core ML cannot load {str(path)!r}: {type(error).__name__}: {error}") from error
        self.runtime = f"Core ML (coremltools {tools.__version__}, all compute units)"

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one sample."""
        if len(tensors) != len(self._inputs):
            names = ", ".join(variable.name for variable in self._inputs)
            raise RunnerError(f"the program takes {len(self._inputs)} inputs ({names}), {len(tensors)} given")
        pairs = zip(self._inputs, tensors, strict=True)
        fed = {variable.name: _fed(tensor, variable.dtype) for variable, tensor in pairs}
        try:
            given = self._model.predict(fed)
        except Exception as error:  # whatever Core ML reports
            raise RunnerError(f"Core ML cannot run the program: {type(error).__name__}: {error}") from error
        return [torch.as_tensor(given[output.name]).reshape(output.shape) for output in self._outputs]
