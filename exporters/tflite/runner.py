"""Run a ``.tflite`` file in LiteRT's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_edge.contents import Endpoint
from lightning_edge.errors import require
from lightning_edge.exporters.run import ends
from lightning_edge.exporters.run.runner import Intermediate, Runner
from lightning_edge.exporters.tflite.graph import maker_names, parse
from lightning_edge.wording import counted

EXTRA = "tflite"


@final
class LiteRTRunner(Runner):
    """Runs one loaded file; quantizes and dequantizes at its ends by the file's own scales.

    Args:
        path: The file.
        threads: Threads of the interpreter.
        reference: Whether it runs with LiteRT's reference kernels. Those of TensorFlow Lite Micro round as they do;
            XNNPACK and LiteRT's own optimized kernels round otherwise. How fast they are says nothing.
    """

    def __init__(self, path: Path, threads: int, reference: bool = False) -> None:
        self._data = path.read_bytes()
        self._reference = reference
        kinds = require("ai_edge_litert.interpreter", EXTRA).OpResolverType
        self._interpreter = self._opened(kinds.BUILTIN_REF if reference else kinds.AUTO, num_threads=threads)
        self._ins = [(details["index"], _end(details)) for details in self._interpreter.get_input_details()]
        self._outs = [(details["index"], _end(details)) for details in self._interpreter.get_output_details()]
        self.inputs = tuple(ends.spec(end) for _, end in self._ins)
        count = counted(threads, "thread")
        kernels = "reference kernels" if reference else "XNNPACK"
        self.runtime, self.is_reference = f"LiteRT {version('ai-edge-litert')}, {kernels}, {count}", reference

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
        kinds = require("ai_edge_litert.interpreter", EXTRA).OpResolverType
        kernels = kinds.BUILTIN_REF if self._reference else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        kept = self._opened(kernels, experimental_preserve_all_tensors=True)
        self._feed(kept, tensors)
        kept.invoke()
        names = maker_names(parse(self._data))
        return [
            Intermediate(names[index], _scale(details), int(details["quantization"][1]), torch.as_tensor(values))
            for details in kept.get_tensor_details()
            if (index := details["index"]) in names and _scale(details)
            for values in [kept.get_tensor(index).copy()]
        ]

    def _opened(self, kernels: Any, **settings: Any) -> Any:
        """Make an interpreter of the file that is ready to run."""
        interpreter = require("ai_edge_litert.interpreter", EXTRA)
        opened = interpreter.Interpreter(model_content=self._data, experimental_op_resolver_type=kernels, **settings)
        opened.allocate_tensors()
        return opened

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
