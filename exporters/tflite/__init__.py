"""TensorFlow Lite: a ``.tflite`` file written by LiteRT's converter, run by LiteRT's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, fx, nn

from lightning_edge.contents import Contents, Endpoint, Placements
from lightning_edge.errors import ExportError, require
from lightning_edge.exporters.passes.activations import write_out_log_sigmoid
from lightning_edge.exporters.passes.base import apply_passes, run_passes
from lightning_edge.exporters.passes.float_barriers import separate_float_layers
from lightning_edge.exporters.passes.fold_constants import fold_constants
from lightning_edge.exporters.passes.transposed_convolutions import convolve_transposed
from lightning_edge.exporters.run import ends
from lightning_edge.exporters.run.runner import Intermediate, Runner
from lightning_edge.exporters.target import Target, explain
from lightning_edge.exporters.tflite import graph as tflite_graph
from lightning_edge.exporters.tflite import metadata as tflite_metadata
from lightning_edge.exporters.tflite import placement as tflite_placement
from lightning_edge.exporters.tflite import read as tflite_contents
from lightning_edge.exporters.tflite.passes import float_kernels as tflite_float_kernels
from lightning_edge.exporters.tflite.passes import int8_layers as tflite_layers
from lightning_edge.exporters.tflite.passes import simplify as tflite_simplify
from lightning_edge.exporters.tflite.passes.broadcasts import drop_expansions
from lightning_edge.exporters.tflite.passes.choices import choose_by_where
from lightning_edge.exporters.tflite.passes.crops import crop_transposed, has_no_kernel
from lightning_edge.exporters.tflite.passes.reshapes import reshape_results
from lightning_edge.exporters.tflite.passes.unfold_weights import unfold_weights
from lightning_edge.network import Deployable, Inputs
from lightning_edge.windows import WindowsAsViews

EXTRA = "tflite"

Io = Literal["int8", "float"]
Scheme = Literal["fp16", "int8_weight_only", "int4_weight_only", "int8_dynamic", "int4_dynamic"]

# On the converted graph, before it is exported: the export finds the shapes of what is new.
CAPTURED_PASSES = (
    partial(convolve_transposed, wanted=has_no_kernel),  # LiteRT has int8 kernels for some of them only
)
# On the exported program, in this order.
PASSES = (
    unfold_weights,  # first: later passes move quantized constants about
    write_out_log_sigmoid,  # the converter mixes up the axes of the minimum that it writes
    choose_by_where,  # it also mixes up those of where() with operands of fewer dimensions; gives views of constants
    fold_constants,  # later passes look at shapes that constants give
    crop_transposed,  # LiteRT crops as SAME only
    drop_expansions,  # the converter mixes up the axes of expand and repeat
    reshape_results,  # the converter would do it, with the wrong scale
    separate_float_layers,  # last: a barrier hides what a layer is fed
)

_PROGRESS = "LITERT_TORCH_SHOW_PROGRESS"


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

    def prepare(self, network: Deployable, **options: Any) -> Deployable:
        """Run `CAPTURED_PASSES`."""
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
        converted = _convert(network)
        model = tflite_graph.parse(converted if scheme is None else _in_scheme(converted, scheme))
        _check_order(model, network.inputs)
        if network.precision == "int8":
            tflite_layers.quantize_layers(model, network)
        tflite_simplify.simplify(model)
        if network.precision == "int8" and not integer_only:
            tflite_float_kernels.use_float_kernels(model)
        tflite_graph.widen_biases(model)
        tflite_graph.shorten_names(model)
        if io == "float":
            tflite_graph.float_ends(model)
        tflite_graph.name_ends(model, network.interface.inputs, network.interface.outputs)
        interface = network.interface
        for name, text in replace(interface, labels=()).notes().items():  # those have a place of their own
            tflite_graph.set_note(model, name, text.encode())
        tflite_metadata.describe(model, interface)
        tflite_graph.share_empty_buffers(model)
        path.write_bytes(tflite_metadata.with_labels(tflite_graph.pack(model), interface.labels))

    def inspect(self, path: Path) -> Contents:
        """Read what the file holds.

        Raises:
            ValueError: If it is not a whole TensorFlow Lite file.
        """
        return replace(tflite_contents.contents(path), placements=tflite_placement.by_support(path))

    def placements(self, path: Path) -> Placements | None:
        """Ask LiteRT which operations of a file it hands to its XNNPACK delegate; ``None`` if it does not tell."""
        return tflite_placement.by_runtime(path)

    def open(self, path: Path, threads: int) -> Runner:
        """Load the file with LiteRT's interpreter.

        Args:
            path: The file.
            threads: Threads of the interpreter.
        """
        return _Runner(path, threads)

    def sessions(self, threads: int, machine: str, features: Collection[str]) -> list[dict[str, Any]]:
        """Say how LiteRT opens a file on a device."""
        return [{"threads": threads}]


TARGET = TFLite()


def _convert(network: Deployable) -> bytes:
    litert_torch = require("litert_torch", EXTRA)
    quantize = require("litert_torch.quantize.quant_config", EXTRA)
    quantizer = require("litert_torch.quantize.pt2e_quantizer", EXTRA)
    inputs, config = network.inputs, None
    try:
        graph = _apply_passes(network)
        if network.precision == "int8":
            # The converter needs the config only to know that the graph is quantized.
            scheme = quantizer.get_symmetric_quantization_config(is_per_channel=True)
            config = quantize.QuantConfig(pt2e_quantizer=quantizer.PT2EQuantizer().set_global(scheme))
        with torch.no_grad(), _quiet(), WindowsAsViews():
            converted = litert_torch.convert(graph, inputs.args, dict(inputs.kwargs) or None, quant_config=config)
            return bytes(converted.model_content())
    except ExportError:
        raise
    except Exception as error:
        raise explain(
            "tflite",
            error,
            "Replace that operation by one that LiteRT has, or leave the target out.",
        ) from error


def _apply_passes(network: Deployable) -> nn.Module:
    """Return what the converter is given: the exported program with `PASSES` applied."""
    exported = network.program().module()
    assert isinstance(exported, fx.GraphModule)
    return exported if apply_passes(exported, PASSES) else network.graph


def _in_scheme(model: bytes, scheme: Scheme) -> bytes:
    """Rewrite a float file's weights with ai-edge-quantizer; whole channels share a scale."""
    quantizer = require("ai_edge_quantizer.quantizer", EXTRA)
    types = require("ai_edge_quantizer.qtyping", EXTRA)
    every = types.TFLOperationName.ALL_SUPPORTED
    try:
        work = quantizer.Quantizer(bytearray(model))
        if scheme == "fp16":
            half = types.TensorQuantizationConfig(num_bits=16, dtype=types.TensorDataType.FLOAT)
            config = types.OpQuantizationConfig(weight_tensor_config=half, explicit_dequantize=True)
            work.update_quantization_recipe(".*", every, config, algorithm_key="float_casting")
        else:
            bits = 4 if scheme.startswith("int4") else 8
            add = work.add_dynamic_config if scheme.endswith("dynamic") else work.add_weight_only_config
            add(regex=".*", operation_name=every, num_bits=bits)
            if scheme != "int8_weight_only":
                # LiteRT's delegate has no depthwise kernel that finds ranges as it runs, nor one for 4 bits.
                depthwise = types.TFLOperationName.DEPTHWISE_CONV_2D
                work.add_weight_only_config(regex=".*", operation_name=depthwise, num_bits=8)
        with redirect_stdout(StringIO()):  # it prints sizes and times
            return bytes(work.quantize().quantized_model)
    except Exception as error:
        raise explain("tflite", error, "Export without scheme=..., or choose another scheme.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter from printing its progress, which it reads from the environment only."""
    before = os.environ.get(_PROGRESS)
    os.environ[_PROGRESS] = "n"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PROGRESS]
        else:
            os.environ[_PROGRESS] = before


def _check_order(model: Any, inputs: Inputs) -> None:
    """Make sure that the file takes its inputs in the order of the network's flattened arguments."""
    names = {int(entry.tensorIndex): entry.name.decode() for entry in model.signatureDefs[0].inputs}
    given = [names.get(int(index), "?") for index in model.subgraphs[0].inputs]
    roots = [f"args_{index}" for index in range(len(inputs.args))] + list(inputs.kwargs)
    positions = [next((at for at, root in enumerate(roots) if _belongs(name, root)), -1) for name in given]
    if len(given) != len(inputs.tensors) or positions != sorted(positions):
        raise ExportError(
            f"tflite: LiteRT gave the file the inputs {given}, but the network takes {len(inputs.tensors)} tensors in "
            f"the order {roots}. Give every input as a tensor that the network uses."
        )


def _belongs(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}_")


@final
class _Runner(Runner):
    """Runs one loaded file; quantizes and dequantizes at its ends by the file's own scales."""

    def __init__(self, path: Path, threads: int) -> None:
        interpreter = require("ai_edge_litert.interpreter", EXTRA)
        self._data = path.read_bytes()
        self._interpreter = interpreter.Interpreter(model_content=self._data, num_threads=threads)
        self._interpreter.allocate_tensors()
        self._ins = [(details["index"], _end(details)) for details in self._interpreter.get_input_details()]
        self._outs = [(details["index"], _end(details)) for details in self._interpreter.get_output_details()]
        self.inputs = tuple(ends.spec(end) for _, end in self._ins)
        count = "1 thread" if threads == 1 else f"{threads} threads"
        self.runtime = f"LiteRT {version('ai-edge-litert')}, XNNPACK, {count}"

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one call."""
        self._feed(self._interpreter, tensors)
        self._interpreter.invoke()
        return [
            ends.dequantized(torch.as_tensor(self._interpreter.get_tensor(index)), end) for index, end in self._outs
        ]

    def prepare(self, tensors: list[Tensor]) -> Callable[[], object]:
        """Quantize one sample, and give the call that an app makes: values in the file's own types in and out."""
        arrays = [(index, _array(tensor, end)) for tensor, (index, end) in zip(tensors, self._ins, strict=True)]

        def call() -> list[Any]:
            for index, array in arrays:
                self._interpreter.set_tensor(index, array)
            self._interpreter.invoke()
            return [self._interpreter.get_tensor(index) for index, _ in self._outs]

        return call

    def intermediates(self, tensors: list[Tensor]) -> list[Intermediate]:
        """Run on one sample and give the quantized values inside the file.

        The delegate does not keep them: they come from LiteRT's own kernels, which round a little otherwise.
        """
        interpreter = require("ai_edge_litert.interpreter", EXTRA)
        kept = interpreter.Interpreter(
            model_content=self._data,
            experimental_op_resolver_type=interpreter.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        )
        kept.allocate_tensors()
        self._feed(kept, tensors)
        kept.invoke()
        names = tflite_graph.maker_names(tflite_graph.parse(self._data))
        return [
            Intermediate(names[index], _scale(details), int(details["quantization"][1]), torch.as_tensor(values))
            for details in kept.get_tensor_details()
            if (index := details["index"]) in names and _scale(details)
            for values in [kept.get_tensor(index).copy()]
        ]

    def _feed(self, interpreter: Any, tensors: list[Tensor]) -> None:
        for tensor, (index, end) in zip(tensors, self._ins, strict=True):
            interpreter.set_tensor(index, _array(tensor, end))


def _end(details: Any) -> Endpoint:
    """An input or output, as the interpreter tells of it."""
    shape = tuple(int(size) for size in details["shape"])
    dtype = details["dtype"].__name__.rstrip("_")
    return Endpoint(None, shape, dtype, _scale(details) or None, int(details["quantization"][1]))


def _scale(details: Any) -> float:
    return float(details["quantization"][0])


def _array(tensor: Tensor, end: Endpoint) -> Any:
    return ends.quantized(tensor, end).contiguous().numpy()
