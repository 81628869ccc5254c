"""ONNX: an ``.onnx`` file written by torch.onnx, run by ONNX Runtime and, on demand, by OpenVINO."""

from __future__ import annotations

import logging
import platform
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn

from lightning_edge.contents import Contents
from lightning_edge.errors import ExportError, MissingExtraError, RunnerError, require
from lightning_edge.exporters.onnx import graph as onnx_graph
from lightning_edge.exporters.onnx import intermediates as onnx_inside
from lightning_edge.exporters.onnx import read as onnx_file
from lightning_edge.exporters.onnx import schemes as onnx_schemes
from lightning_edge.exporters.onnx.passes import rewrite
from lightning_edge.exporters.onnx.passes import runtime_bugs as onnx_equivalents
from lightning_edge.exporters.passes.activations import write_out_log_sigmoid
from lightning_edge.exporters.passes.base import run_passes
from lightning_edge.exporters.passes.transposed_convolutions import convolve_transposed
from lightning_edge.exporters.program import program_after
from lightning_edge.exporters.run.calls import TensorSpec, of_one_sample
from lightning_edge.exporters.run.runner import Intermediate, Runner
from lightning_edge.exporters.target import Target, explain
from lightning_edge.network import Deployable, Inputs

EXTRA = "onnx"

Scheme = Literal["fp16", "int8_weight_only", "int8_dynamic"]

# On the exported program, before it is converted.
PROGRAM_PASSES = (
    write_out_log_sigmoid,  # torch.onnx writes one that is -inf where it is not
)

# The oldest that torch.onnx writes without converting down from another one.
_OPSET = 20


@final
class ONNX(Target):
    """ONNX: ``.onnx`` files."""

    suffix = ".onnx"
    mark = (0, b"\x08")  # the field of the version of the format, which is the first and has to be there
    extra = EXTRA
    reader_modules = ("onnx",)
    needs = ("onnx", "onnxscript", "onnxruntime")
    runtime_modules = ("onnxruntime",)
    # ONNX can say 16 bits from opset 21 on; ONNX Runtime converts to them and back, and computes in float between.
    activation_bits = frozenset({8})
    takes_batches = True
    schemes = get_args(Scheme)
    int8_options = frozenset({"weights"})

    def prepare(self, network: Deployable, *, scheme: Scheme | None = None, **options: Any) -> Deployable:
        """Put a network in float16 if it is to be; write transposed convolutions of an int8 one as convolutions."""
        if scheme == "fp16":
            return _in_half(network)
        if network.precision == "int8":  # ONNX Runtime has no int8 kernel for them
            graph = run_passes(network.graph, (convolve_transposed,))
            return network if graph is network.graph else network.with_graph(graph)
        return network

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
        try:
            model = _convert(network)
            onnx_graph.name_outputs(model, network.output_names(), network.interface.inputs)
            if network.precision == "int8":
                rewrite(model, unsigned_last=weights == "uint8")
            elif scheme is not None and scheme != "fp16":
                onnx_schemes.rewrite(model, scheme)
            onnx_equivalents.padded_maxima(onnx_graph.Graph(model))
            onnx_graph.tidy(model)
            onnx_graph.set_notes(model, network.interface.notes())
            data = model.SerializeToString(deterministic=True)
        except (ExportError, MissingExtraError):
            raise
        except Exception as error:
            advice = "Replace that operation by one that ONNX has, or leave the target out."
            raise explain("onnx", error, advice) from error
        path.write_bytes(data)

    def inspect(self, path: Path) -> Contents:
        """Read what the file holds.

        Raises:
            RunnerError: If its weights lie in another file.
            ValueError: If it is not a whole ONNX file.
        """
        return onnx_file.contents(path)

    def open(self, path: Path, threads: int) -> Runner:
        """Load the file with ONNX Runtime, on the CPU.

        Args:
            path: The file.
            threads: Threads within an operation; operations run one after the other.

        Raises:
            RunnerError: If an input is of no fixed shape but for the batch, or is no tensor of numbers.
        """
        return _OnnxRuntime(path, threads)

    def sessions(self, threads: int, machine: str, features: Collection[str]) -> list[dict[str, Any]]:
        """Say how ONNX Runtime opens a file on a device."""
        return _sessions(threads, machine, features)


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
    try:
        return _OpenVino(Path(path), threads)
    except (ValueError, OSError, RuntimeError) as error:
        raise RunnerError(f"{Path(path).name} does not load in OpenVINO: {str(error).splitlines()[0]}") from error


@final
class _Halved(nn.Module):
    """A network in float16 that takes and gives float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()
        self.training = network.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network in float16."""
        inputs = Inputs(args, kwargs).map(lambda tensor: tensor.half() if tensor.is_floating_point() else tensor)
        outputs = self.network(*inputs.args, **inputs.kwargs)
        return Inputs((outputs,)).map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor).args[0]


def _in_half(network: Deployable) -> Deployable:
    import copy

    graph = _Halved(copy.deepcopy(network.graph))
    return Deployable(graph, network.inputs, network.precision, interface=network.interface)


def _convert(network: Deployable) -> Any:
    require("onnxscript", EXTRA)
    inliner = require("onnx.inliner", EXTRA)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            program_after(network, PROGRAM_PASSES), dynamo=True, opset_version=_OPSET, verbose=False
        )
    assert program is not None
    return inliner.inline_local_functions(program.model_proto)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter from telling which optional packages it does without, and what it deprecates of itself."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(before)


@final
class _OnnxRuntime(Runner):
    """Runs one loaded file in ONNX Runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        self._data, self._threads = path.read_bytes(), threads
        self._session = _session(self._data, threads)
        self.inputs = tuple(_spec(value.name, value.shape, value.type) for value in self._session.get_inputs())
        self._names = [value.name for value in self._session.get_inputs()]
        count = "1 thread" if threads == 1 else f"{threads} threads"
        exact = ", session.x64quantprecision=1" if sums_overflow() else ""
        self.runtime = f"ONNX Runtime {version('onnxruntime')}, CPU, {count}{exact}"

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one sample."""
        return self._run(self._session, None, tensors)

    def intermediates(self, tensors: list[Tensor]) -> list[Intermediate]:
        """Run on one sample and give the quantized values inside the file."""
        inside = onnx_inside.Inside(self._data)
        return inside.read(self._run(_session(inside.data, self._threads), inside.names, tensors))

    def _run(self, session: Any, names: list[str] | None, tensors: list[Tensor]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(self._names, tensors, strict=True)}
        return [torch.as_tensor(array) for array in session.run(names, feed)]


def _session(data: bytes, threads: int) -> Any:
    onnxruntime = require("onnxruntime", EXTRA)
    *attempts, last = _sessions(threads, platform.machine(), _features())
    for settings in (*attempts, last):
        options = onnxruntime.SessionOptions()
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        for name, value in settings["options"].items():
            setattr(options, name, value)
        for name, value in settings["entries"].items():
            options.add_session_config_entry(name, value)
        try:
            return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # It copies int8 weights under another name for exact kernels, and fails in files where two layers share
            # one; those that `write` makes have none.
            if settings is last or "replace the existing tensor" not in str(error):
                raise
    raise AssertionError("unreachable")


def _sessions(threads: int, machine: str, features: Collection[str]) -> list[dict[str, Any]]:
    """Settings of a session in plain values, to be tried in turn: operations run one after the other."""
    options = {
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
        "use_deterministic_compute": True,
        "log_severity_level": 4,  # it raises its errors as well, and its warnings are for who writes kernels
    }
    exact = ("1", "0") if sums_overflow(machine, features) else ("0",)
    return [{"options": options, "entries": {"session.x64quantprecision": value}} for value in exact]


def sums_overflow(machine: str | None = None, features: Collection[str] | None = None) -> bool:
    """Whether ONNX Runtime's own choice of int8 kernels adds pairs of products in 16 bits, which overflow.

    It does on x86 without VNNI. Its exact kernels are slower, so that they are not asked for elsewhere.

    Args:
        machine: The architecture; that of this machine if not given.
        features: Those of ``avx512_vnni`` and ``avx_vnni`` that the CPU has; those of this machine's if not given.
    """
    machine = platform.machine() if machine is None else machine
    features = _features() if features is None else features
    return machine.lower() in ("x86_64", "amd64") and not features


def _features() -> list[str]:
    """What this machine's CPU has of the features that decide it."""
    has = torch.cpu.get_capabilities()
    return [name for name in ("avx512_vnni", "avx_vnni") if has.get(name)]


@final
class _OpenVino(Runner):
    """Runs one loaded file in OpenVINO."""

    def __init__(self, path: Path, threads: int) -> None:
        openvino = require("openvino", "openvino")
        data = path.read_bytes()
        graph = onnx_file.parse(data).graph
        stored = {value.name for value in graph.initializer}
        given = [value for value in graph.input if value.name not in stored]
        self.inputs = tuple(_spec_of(value) for value in given)
        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        # On x86 without VNNI its int8 kernels overflow, and it has no exact ones as ONNX Runtime does.
        settings["LP_TRANSFORMS_MODE"] = False
        self._model = core.compile_model(core.read_model(model=data, weights=b""), "CPU", settings)
        self._request = self._model.create_infer_request()
        self._outputs = len(graph.output)
        count = "1 thread" if threads == 1 else f"{threads} threads"
        self.runtime = f"OpenVINO {version('openvino')}, CPU, int8 computed in float, {count}"

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one sample."""
        results = self._request.infer(dict(enumerate(tensor.numpy() for tensor in tensors)))
        return [torch.as_tensor(results[position]).clone() for position in range(self._outputs)]


def _spec_of(value: Any) -> TensorSpec:
    kind = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in kind.shape.dim]
    return _spec(value.name, shape, f"tensor({_ELEMENTS.get(kind.elem_type, kind.elem_type)})")


def _spec(name: str, shape: list[Any], kind: str) -> TensorSpec:
    sizes = of_one_sample(shape)
    if not all(isinstance(size, int) for size in sizes):
        raise RunnerError(
            f"input {name!r} has the shape {shape}; only files whose sizes are all fixed numbers, but for the first, "
            "are run"
        )
    if kind not in _DTYPES:
        raise RunnerError(f"input {name!r} is a {kind}; a file is run only if it takes one of {', '.join(_DTYPES)}")
    return TensorSpec(sizes, _DTYPES[kind])


# By the names that ONNX Runtime gives them.
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(int16)": torch.int16,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}
# The numbers that a file has for them.
_ELEMENTS = {
    1: "float",
    2: "uint8",
    3: "int8",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "double",
}
