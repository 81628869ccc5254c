"""Runtimes of a device: each opens a file, and gives a call on one sample that is ready to be timed.

Sent to a device and run there, as `runner` is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

Arrays = Sequence["numpy.ndarray[Any, Any]"]


class _LiteRT:
    """A ``.tflite`` file in LiteRT's interpreter."""

    def __init__(self, path: str, session: dict[str, Any]) -> None:
        from ai_edge_litert.interpreter import Interpreter

        start = time.perf_counter()
        self._interpreter = Interpreter(model_path=path, num_threads=session["threads"])
        self._interpreter.allocate_tensors()
        self.load_ms = (time.perf_counter() - start) * 1000
        self.name = "LiteRT " + version("ai-edge-litert")
        self._ins = [entry["index"] for entry in self._interpreter.get_input_details()]
        self._outs = [entry["index"] for entry in self._interpreter.get_output_details()]

    def prepared(self, arrays: Arrays) -> Callable[[], list[Any]]:
        fed = list(zip(self._ins, arrays))  # noqa: B905 (`strict` is of Python 3.10)

        def call() -> list[Any]:
            for index, array in fed:
                self._interpreter.set_tensor(index, array)
            self._interpreter.invoke()
            return [self._interpreter.get_tensor(index) for index in self._outs]

        return call


class _OnnxRuntime:
    """An ``.onnx`` file in ONNX Runtime, on the CPU."""

    def __init__(self, path: str, session: dict[str, Any]) -> None:
        import onnxruntime

        start = time.perf_counter()
        options = onnxruntime.SessionOptions()
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        for name, value in session["options"].items():
            setattr(options, name, value)
        for name, value in session["entries"].items():
            options.add_session_config_entry(name, value)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.load_ms = (time.perf_counter() - start) * 1000
        self.name = "ONNX Runtime " + onnxruntime.__version__
        self._names = [value.name for value in self._session.get_inputs()]

    def prepared(self, arrays: Arrays) -> Callable[[], list[Any]]:
        feed = dict(zip(self._names, arrays))  # noqa: B905 (`strict` is of Python 3.10)
        return lambda: list(self._session.run(None, feed))


# By the name of the target; the module that each needs beside NumPy. `prepared` gives a call that is ready to be timed.
RUNTIMES: dict[str, tuple[str, Any]] = {"tflite": ("ai_edge_litert", _LiteRT), "onnx": ("onnxruntime", _OnnxRuntime)}
