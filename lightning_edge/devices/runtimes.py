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


class _CoreML:
    """An ``.mlpackage`` in Core ML on macOS, on the compute units of the session."""

    def __init__(self, path: str, session: dict[str, Any]) -> None:
        import coremltools

        units = coremltools.ComputeUnit[session["compute_units"]]
        start = time.perf_counter()
        self._model = coremltools.models.MLModel(path, compute_units=units)
        self.load_ms = (time.perf_counter() - start) * 1000
        self.name = f"Core ML, coremltools {coremltools.__version__}, compute units {session['compute_units'].lower()}"
        shares = _planned(self._model.get_compiled_model_path(), units)
        if shares:
            told = ", ".join(f"{share:.0%} on the {unit}" for unit, share in shares.items())
            self.name += f", by its plan {told}"
        self._ins = [name for name, _, _ in session["inputs"]]
        self._outs = session["outputs"]

    def prepared(self, arrays: Arrays) -> Callable[[], list[Any]]:
        import numpy

        feed = {name: _fed(array) for name, array in zip(self._ins, arrays)}  # noqa: B905 (of Python 3.10)

        def call() -> list[Any]:
            given = self._model.predict(feed)
            return [
                numpy.asarray(given[name]).astype(dtype, copy=False).reshape(shape) for name, dtype, shape in self._outs
            ]

        return call


def _fed(array: Any) -> Any:
    """What ``predict`` takes: an array, or a picture where the values are pixels in NCHW."""
    if array.dtype.name != "uint8":
        return array
    from PIL import Image

    picture = array[0].transpose(1, 2, 0)
    return Image.fromarray(picture if picture.shape[2] > 1 else picture[:, :, 0])


def _planned(path: str, units: Any) -> dict[str, float]:
    """The share of the estimated work on each compute unit, by Core ML's plan; none where it has no plan to tell."""
    from coremltools.models.compute_plan import MLComputePlan

    found: dict[str, float] = {}
    try:
        plan = MLComputePlan.load_from_path(path, compute_units=units)
        for operation in plan.model_structure.program.functions["main"].block.operations:
            cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            if cost is not None and usage is not None:
                kind = type(usage.preferred_compute_device).__name__
                unit = _UNITS.get(kind, "others")
                found[unit] = found.get(unit, 0.0) + cost.weight
    except (AttributeError, RuntimeError, OSError):  # an older macOS
        return {}
    total = sum(found.values())
    return {unit: cost / total for unit, cost in sorted(found.items())} if total > 0 else {}


# The classes by which a compute plan names what an operation runs on.
_UNITS = {
    "MLNeuralEngineComputeDevice": "Neural Engine",
    "MLGPUComputeDevice": "GPU",
    "MLCPUComputeDevice": "CPU",
}

# By the name of the target; the module that each needs beside NumPy. `prepared` gives a call that is ready to be timed.
RUNTIMES: dict[str, tuple[str, Any]] = {
    "tflite": ("ai_edge_litert", _LiteRT),
    "onnx": ("onnxruntime", _OnnxRuntime),
    "coreml": ("coremltools", _CoreML),
}
