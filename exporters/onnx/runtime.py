"""Run ONNX files in ONNX Runtime: the runner, settings of a session, and whether int8 sums overflow on a CPU."""

from __future__ import annotations

import platform
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_edge.errors import RunnerError, require
from lightning_edge.exporters.run.calls import TensorSpec, of_one_sample
from lightning_edge.exporters.run.runner import Intermediate, Runner
from lightning_edge.wording import counted

EXTRA = "onnx"

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


@final
class OnnxRuntimeRunner(Runner):
    """Runs one loaded file in ONNX Runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        self._data, self._threads = path.read_bytes(), threads
        self._session = _session(self._data, threads)
        self.inputs = tuple(spec_of(value.name, value.shape, value.type) for value in self._session.get_inputs())
        self._names = [value.name for value in self._session.get_inputs()]
        count = counted(threads, "thread")
        exact = ", session.x64quantprecision=1" if sums_overflow() else ""
        self.runtime = f"ONNX Runtime {version('onnxruntime')}, CPU, {count}{exact}"

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one sample."""
        return self._run(self._session, None, tensors)

    def intermediates(self, tensors: list[Tensor]) -> list[Intermediate]:
        """Run on one sample and give the quantized values inside the file."""
        from lightning_edge.exporters.onnx.intermediates import Inside  # reads the file, which running it does not take

        inside = Inside(self._data)
        return inside.read(self._run(_session(inside.data, self._threads), inside.names, tensors))

    def _run(self, session: Any, names: list[str] | None, tensors: list[Tensor]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(self._names, tensors, strict=True)}
        return [torch.as_tensor(array) for array in session.run(names, feed)]


def _session(data: bytes, threads: int) -> Any:
    onnxruntime = require("onnxruntime", EXTRA)
    *attempts, last = sessions(threads, platform.machine(), _features())
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


def sessions(threads: int, machine: str, features: Collection[str]) -> list[dict[str, Any]]:
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


def spec_of(name: str, shape: list[Any], kind: str) -> TensorSpec:
    """Give shape and type of an input by what a runtime says of it.

    Raises:
        RunnerError: If a size but the first is not fixed, or it takes no tensor of numbers.
    """
    sizes = of_one_sample(shape)
    if not all(isinstance(size, int) for size in sizes):
        raise RunnerError(
            f"input {name!r} has the shape {shape}; only files whose sizes are all fixed numbers, but for the first, "
            "are run"
        )
    if kind not in _DTYPES:
        raise RunnerError(f"input {name!r} is a {kind}; a file is run only if it takes one of {', '.join(_DTYPES)}")
    return TensorSpec(sizes, _DTYPES[kind])
