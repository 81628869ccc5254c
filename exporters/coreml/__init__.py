"""The Core ML target: writes ``.mlpackage`` folders, reads what they hold and runs them.

On macOS Core ML itself runs a package. Elsewhere the reference interpreter in `mil` executes its program in torch.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal, final, get_args

import numpy
import torch
from torch.export.graph_signature import ConstantArgument

from lightning_edge.contents import Contents, Placements
from lightning_edge.errors import ExportError, first_line
from lightning_edge.exporters.coreml import package
from lightning_edge.exporters.coreml.package import check_interface, compact, coremltools, quiet
from lightning_edge.exporters.coreml.passes import PASSES, write_out
from lightning_edge.exporters.coreml.placement import by_plan
from lightning_edge.exporters.coreml.read import contents
from lightning_edge.exporters.coreml.runners import CoreMLRunner, ReferenceRunner
from lightning_edge.exporters.coreml.weights import (
    Scheme,
    check,
    in_scheme,
    save_without_zeros,
    tell_uneven,
)
from lightning_edge.exporters.program import program_after
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.exporters.target import Target, explain
from lightning_edge.interface import IMAGE_DIMENSIONS, Interface
from lightning_edge.network import Deployable

EXTRA = "coreml"

ComputePrecision = Literal["float16", "float32"]

# What coremltools reports when the temporary file for the weights cannot be written.
_TEMPORARY = "[MIL FileWriter]"


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
    takes_batches = True
    takes_images = True
    writes_folder = True
    schemes = get_args(Scheme)

    def prepare(self, network: Deployable, *, block_size: int | None = None, **options: Any) -> Deployable:
        """Warn of layers that have no whole number of blocks; the network stays as it is."""
        if block_size is not None:
            tell_uneven(network.graph, block_size)
        return network

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
        check(minimum_ios, scheme, block_size, sparse_weights, network.precision == "int8")
        check_interface(network)
        if scheme == "fp16":
            compute_precision = "float16"
        try:
            with quiet():
                program = _tensors_only(write_out(program_after(network, PASSES)))
                model = tools.convert(
                    program,
                    outputs=_output_types(tools, program),
                    minimum_deployment_target=deployment,
                    compute_precision=getattr(tools.precision, compute_precision.upper()),
                    skip_model_load=True,
                )
                if scheme not in (None, "fp16"):
                    model = in_scheme(model, scheme, block_size)
                if sparse_weights:
                    save_without_zeros(model, path, network)
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
            raise explain("coreml", error, "coremltools") from error
        if not sparse_weights:
            compact(path, network.output_names(), network.interface)

    def import_reader(self) -> None:
        """Import coremltools, without its warnings."""
        package.coremltools()

    def inspect(self, path: Path) -> Contents:
        """Read from a saved package which weights are int8 and which operations compute in float.

        An operation computes on int8 where its inputs come from ``dequantize`` and its weights from a ``constexpr``
        operation over 8-bit integers: that is how an ML Program writes int8 arithmetic.

        Raises:
            RunnerError: If the package cannot be read.
            MissingExtraError: If coremltools is not installed.
        """
        program = package.read(path)
        found, interface = contents(program), Interface.of_notes(program.notes)
        if interface.pixels is not None:
            images = (
                replace(end, dtype="uint8") if len(end.shape) == IMAGE_DIMENSIONS else end for end in found.inputs
            )
            found = replace(found, inputs=tuple(images))
        return replace(found, interface=interface)

    def placements(self, path: Path) -> Placements | None:
        """Ask Core ML's compute plan where it would run the operations of a package; ``None`` away from macOS."""
        return by_plan(path, package.read(path))

    def sessions(self, threads: int, machine: str, features: Collection[str]) -> list[dict[str, Any]]:
        """Say how Core ML opens a package on a device: it chooses its threads itself."""
        return [{"compute_units": "ALL"}]

    def open(self, path: Path, threads: int) -> Runner:
        """Load the package: into Core ML on macOS, into the reference interpreter elsewhere.

        Args:
            path: The ``.mlpackage`` folder.
            threads: CPU threads for the reference interpreter; Core ML chooses its own.

        Raises:
            RunnerError: If the package cannot be read or run.
            MissingExtraError: If coremltools is not installed.
        """
        return CoreMLRunner(path) if sys.platform == "darwin" else ReferenceRunner(path, threads)


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
