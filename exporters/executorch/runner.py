"""Run a ``.pte`` file with ExecuTorch's runtime."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, final

import torch
from torch import Tensor

from lightning_edge.errors import RunnerError, require
from lightning_edge.exporters.executorch.read import program as pte
from lightning_edge.exporters.run.calls import TensorSpec
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.wording import counted

EXTRA = "executorch"
_BINDINGS = "executorch.extension.pybindings"
_DELEGATE_NAMES = {pte.XNNPACK: "XNNPACK", pte.CORE_ML: "Core ML", pte.VULKAN: "Vulkan"}


def library() -> ModuleType:
    """Import the library below executorch.runtime, which takes 9 seconds, 7 of them for the class of one warning.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        renamed = find_spec(f"{_BINDINGS}._C") is not None  # from ExecuTorch 1.5 on
    except ModuleNotFoundError:
        renamed = False
    return require(f"{_BINDINGS}.{'_C' if renamed else '_portable_lib'}", EXTRA)


@final
class _Pool:
    """XNNPACK's thread pool, one for the whole process.

    A loaded method keeps a pointer to its pool, so a reset makes every method loaded before unusable. `generation`
    counts the resets.
    """

    def __init__(self) -> None:
        self.generation = 0

    def set(self, threads: int) -> int:
        """Set the number of threads and return the generation."""
        runtime: Any = library()
        if runtime._threadpool_get_thread_count() != threads:
            runtime._unsafe_reset_threadpool(threads)
            self.generation += 1
        return self.generation


_POOL = _Pool()


@final
class ExecuTorchRunner(Runner):
    """Runs the method ``forward`` of a ``.pte`` file."""

    def __init__(self, path: Path, threads: int) -> None:
        self._data = path.read_bytes()
        self._threads = threads
        self._generation = _POOL.set(threads)
        self._method = self._load(path.name)
        metadata = self._method.method_meta()
        self.inputs = tuple(_spec(metadata.input_tensor_meta(index)) for index in range(metadata.num_inputs()))
        count = counted(threads, "thread")
        delegates = [name for name in _DELEGATE_NAMES if name.encode() in self._data]
        runs_on = ", ".join(_DELEGATE_NAMES[name] for name in delegates) or "portable kernels"
        self.runtime = f"ExecuTorch {version('executorch')}, {runs_on}, {count}"

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one sample; loads the method again if the pool was reset."""
        generation = _POOL.set(self._threads)
        if generation != self._generation:
            self._method, self._generation = self._load("the file"), generation
        return list(self._method(tensors))

    def _names(self) -> list[str]:
        return [self._program.get_method_name(index) for index in range(self._program.num_methods())]

    def _load(self, name: str) -> Any:
        self._program = library()._load_program_from_buffer(self._data)
        names = self._names()
        if pte.METHOD not in names:
            raise RunnerError(f"{name} has no method {pte.METHOD!r}; it has {sorted(names)}")
        return self._program.load_method(pte.METHOD)


def _spec(info: Any) -> TensorSpec:
    return TensorSpec(tuple(info.sizes()), _DTYPES[info.dtype()])


# Numbers of the ScalarType enumeration that ExecuTorch shares with PyTorch.
_DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}
