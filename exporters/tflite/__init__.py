"""The TensorFlow Lite target: writes ``.tflite`` files by LiteRT's converter and runs them in LiteRT's interpreter."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, final, get_args

from lightning_edge.contents import Contents, Placements
from lightning_edge.exporters.passes.base import run_passes
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.exporters.target import Target
from lightning_edge.exporters.tflite.convert import CAPTURED_PASSES, Io, Scheme, convert
from lightning_edge.exporters.tflite.placement import by_runtime, by_support
from lightning_edge.exporters.tflite.read import contents
from lightning_edge.exporters.tflite.runner import EXTRA, LiteRTRunner
from lightning_edge.network import Deployable


@final
class TFLite(Target):
    """TensorFlow Lite: ``.tflite`` files."""

    suffix = ".tflite"
    mark = (4, b"TFL3")
    reader_modules = ("ai_edge_litert.schema_py_generated",)
    extra = EXTRA
    needs = ("litert_torch", "ai_edge_litert")
    runtime_modules = ("ai_edge_litert.interpreter", "ai_edge_litert.schema_py_generated")
    int8_options = frozenset({"io", "integer_only"})
    activation_bits = frozenset({8, 16})
    schemes = get_args(Scheme)
    has_reference_kernels = True

    def prepare(self, network: Deployable, **options: Any) -> Deployable:
        """Run `CAPTURED_PASSES` on the captured graph."""
        graph = run_passes(network.graph, CAPTURED_PASSES)
        return network if graph is network.graph else network.with_graph(graph)

    def write(
        self,
        network: Deployable,
        path: Path,
        *,
        io: Io | None = None,
        integer_only: bool = False,
        scheme: Scheme | None = None,
    ) -> None:
        """Convert the network and write it.

        Args:
            network: The network; its sample says the shapes.
            path: Where to write, a path that does not exist yet.
            io: Type of the file's own inputs and outputs: ``"int8"`` or ``"float"``. An int8 network's default is
                ``"int8"``; with ``"float"`` the file quantizes and dequantizes at its ends and its kernels stay int8.
            integer_only: Whether an int8 network's products of two activations, softmax and GELU are integer operations
                too, as microcontrollers and NPUs want them. LiteRT's delegate has none of these, and by default they
                are float between int8 values: faster on CPUs, and closer to the network.
            scheme: How a float network's weights are stored, and whether activations are quantized on the fly.

        Raises:
            ExportError: If LiteRT refuses the network.
            ValueError: If an option has a value that is not allowed.
        """
        io = io or ("int8" if network.precision == "int8" else "float")
        if io not in get_args(Io):
            raise ValueError(f"io={io!r} is not one of {get_args(Io)}")
        if io == "int8" and network.precision == "fp32":
            raise ValueError("io='int8' needs an int8 network and this one is fp32; leave io out or quantize first")
        if integer_only and network.precision == "fp32":
            raise ValueError(
                "integer_only=True needs an int8 network and this one is fp32; leave it out or quantize first"
            )
        path.write_bytes(convert(network, scheme, io, integer_only=integer_only))

    def inspect(self, path: Path) -> Contents:
        """Read what the file holds.

        Raises:
            ValueError: If it is not a whole TensorFlow Lite file.
        """
        return replace(contents(path), placements=by_support(path))

    def placements(self, path: Path) -> Placements | None:
        """Ask LiteRT which operations of a file it hands to its XNNPACK delegate; ``None`` if it does not tell."""
        return by_runtime(path)

    def open(self, path: Path, threads: int) -> Runner:
        """Load the file with LiteRT's interpreter.

        Args:
            path: The file.
            threads: Threads of the interpreter.
        """
        return LiteRTRunner(path, threads)

    def open_reference(self, path: Path, threads: int) -> Runner:
        """Load the file with LiteRT's reference kernels, as TensorFlow Lite Micro computes."""
        return LiteRTRunner(path, threads, reference=True)

    def sessions(self, threads: int, machine: str, features: Collection[str]) -> list[dict[str, Any]]:
        """Say how LiteRT opens a file on a device."""
        return [{"threads": threads}]


TARGET = TFLite()
