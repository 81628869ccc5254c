"""The ONNX target: writes ``.onnx`` files by torch.onnx, runs them in ONNX Runtime and, on demand, in OpenVINO."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, final, get_args

from lightning_edge.contents import Contents
from lightning_edge.errors import ExportError, MissingExtraError, RunnerError, require
from lightning_edge.exporters.onnx.prepare import prepared
from lightning_edge.exporters.onnx.runtime import EXTRA, OnnxRuntimeRunner
from lightning_edge.exporters.onnx.runtime import sessions as sessions_of
from lightning_edge.exporters.onnx.runtime import sums_overflow as sums_overflow
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.exporters.target import Target, explain
from lightning_edge.network import Deployable

Scheme = Literal["fp16", "int8_weight_only", "int8_dynamic"]


@final
class ONNX(Target):
    """ONNX: ``.onnx`` files."""

    suffix = ".onnx"
    mark = (0, b"\x08")  # the field of the version of the format, which is the first and has to be there
    extra = EXTRA
    reader_modules = ("onnx", "onnx_ir")
    needs = ("onnx", "onnxscript", "onnxruntime")
    runtime_modules = ("onnxruntime",)
    # ONNX can say 16 bits from opset 21 on; ONNX Runtime converts to them and back, and computes in float between.
    activation_bits = frozenset({8})
    takes_batches = True
    schemes = get_args(Scheme)
    int8_options = frozenset({"weights"})

    def prepare(self, network: Deployable, *, scheme: Scheme | None = None, **options: Any) -> Deployable:
        """Put a network in float16 if that is its scheme, and run the passes on the captured graph of an int8 one."""
        return prepared(network, scheme)

    def write(
        self,
        network: Deployable,
        path: Path,
        *,
        scheme: Scheme | None = None,
        weights: Literal["int8", "uint8"] = "int8",
    ) -> None:
        """Convert the network and write it, weights and all in one file.

        Args:
            network: The network; its sample says the shapes.
            path: Where to write, a path that does not exist yet.
            scheme: How a float network's weights are stored: ``"fp16"``, which computes in float16 as well and takes
                and gives float32; in 8 bits and dequantized before use; or in 8 bits with activations quantized on the
                fly.
            weights: Type of an int8 network's weights. With ``"uint8"`` sums are exact in every session, also a default
                one on x86 without VNNI; with ``"int8"`` a CPU with VNNI is up to twice as fast.

        Raises:
            ExportError: If torch.onnx refuses the network.
        """
        require("onnxscript", EXTRA)
        from lightning_edge.exporters.onnx.convert import convert

        try:
            data = convert(network, scheme, weights)
        except (ExportError, MissingExtraError):
            raise
        except Exception as error:
            raise explain("onnx", error, "ONNX") from error
        path.write_bytes(data)

    def inspect(self, path: Path) -> Contents:
        """Read what the file holds.

        Raises:
            RunnerError: If its weights lie in another file.
            ValueError: If it is not a whole ONNX file.
        """
        from lightning_edge.exporters.onnx.read import contents

        return contents(path)

    def open(self, path: Path, threads: int) -> Runner:
        """Load the file with ONNX Runtime, on the CPU.

        Args:
            path: The file.
            threads: Threads within an operation; operations run one after the other.

        Raises:
            RunnerError: If an input is of no fixed shape but for the batch, or is no tensor of numbers.
        """
        return OnnxRuntimeRunner(path, threads)

    def sessions(self, threads: int, machine: str, features: Collection[str]) -> list[dict[str, Any]]:
        """Say how ONNX Runtime opens a file on a device."""
        return sessions_of(threads, machine, features)


TARGET = ONNX()


def open_openvino(path: str | Path, threads: int = 1) -> Runner:
    """Load the file with OpenVINO instead, on the CPU; needs the extra ``openvino``.

    A second opinion on what the file says: it rounds as the file does and computes in float in between, without its
    int8 kernels, so that its latency says nothing of them.

    Args:
        path: The file.
        threads: Threads to run it with.

    Raises:
        MissingExtraError: If OpenVINO is not installed.
        RunnerError: If the file is not a whole ONNX file with inputs of fixed shape, or OpenVINO refuses it.
    """
    require("openvino", "openvino")
    require("onnx_ir", EXTRA)
    from lightning_edge.exporters.onnx.openvino import OpenVinoRunner

    try:
        return OpenVinoRunner(Path(path), threads)
    except (ValueError, OSError, RuntimeError) as error:
        raise RunnerError(f"{Path(path).name} does not load in OpenVINO: {str(error).splitlines()[0]}") from error
