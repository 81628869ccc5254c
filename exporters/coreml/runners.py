"""The two runners of a Core ML package: Core ML itself on macOS, the reference interpreter elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_edge.cores import cores
from lightning_edge.errors import RunnerError, require
from lightning_edge.exporters.coreml.mil.intermediates import intermediates as intermediates_of
from lightning_edge.exporters.coreml.mil.interpreter import Interpreter, Program, Variable
from lightning_edge.exporters.coreml.mil.values import DTYPES
from lightning_edge.exporters.coreml.package import coremltools, quiet, read
from lightning_edge.exporters.run.calls import Samples, TensorSpec, of_one_sample, stack
from lightning_edge.exporters.run.runner import Intermediate, Runner
from lightning_edge.wording import counted


def _specs(program: Program) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(of_one_sample(variable.shape), DTYPES[variable.dtype]) for variable in program.inputs)


@final
class ReferenceRunner(Runner):
    """Runs the saved program in `mil.Interpreter`, on torch.

    Args:
        path: The ``.mlpackage`` folder.
        threads: Threads of torch during a call.
    """

    is_reference = True

    def __init__(self, path: Path, threads: int) -> None:
        program = self._program = read(path)
        self._interpreter = Interpreter(program)
        self.inputs = _specs(program)
        self._threads = threads
        self.runtime = (
            f"reference interpreter of the MIL program (torch {torch.__version__}, {counted(threads, 'thread')}), "
            "not Core ML's kernels"
        )

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one sample."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return self._interpreter(tensors)
        finally:
            torch.set_num_threads(before)

    def run_all(self, samples: Samples, most: int) -> list[Tensor]:
        """Run on several samples, as many at the same time as there are cores: nobody asks how long it takes.

        Each is computed as by itself, to the last bit.
        """
        first = self(samples.part(0, most).tensors)  # alone: it checks the program's operations
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(cores(), "lightning-edge interpreting") as pool:
                starts = range(most, samples.count, most)
                return stack([first, *pool.map(lambda start: self(samples.part(start, most).tensors), starts)])
        finally:
            torch.set_num_threads(before)  # those of threads that torch starts later, which all of them have set

    def intermediates(self, tensors: list[Tensor]) -> list[Intermediate]:
        """Run on one sample and give the quantized values inside the program."""
        return intermediates_of(self._program, tensors)


def _fed(tensor: Tensor, dtype: str) -> Any:
    """Convert one input to what ``predict`` accepts: an array, or a picture if the tensor is uint8."""
    if tensor.dtype != torch.uint8:
        return tensor.detach().to(torch.int32 if dtype == "int32" else torch.float32).numpy()
    picture = tensor[0].permute(1, 2, 0)
    return require("PIL.Image", "coreml").fromarray((picture if len(tensor[0]) > 1 else picture[:, :, 0]).numpy())


@final
class CoreMLRunner(Runner):
    """Runs the package in Core ML itself, on macOS and on all compute units.

    Args:
        path: The ``.mlpackage`` folder.

    Raises:
        RunnerError: If Core ML cannot load it.
    """

    def __init__(self, path: Path) -> None:
        program = read(path)
        self._inputs = program.inputs
        self.inputs = _specs(program)
        self._outputs = [output for output in program.outputs if isinstance(output, Variable)]
        tools = coremltools()
        try:
            with quiet():
                self._model = tools.models.MLModel(str(path))
        except Exception as error:  # whatever Core ML's compiler reports
            raise RunnerError(f"Core ML cannot load {str(path)!r}: {type(error).__name__}: {error}") from error
        self.runtime = f"Core ML (coremltools {tools.__version__}, all compute units)"

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one sample."""
        if len(tensors) != len(self._inputs):
            names = ", ".join(variable.name for variable in self._inputs)
            raise RunnerError(f"the program takes {len(self._inputs)} inputs ({names}), {len(tensors)} given")
        pairs = zip(self._inputs, tensors, strict=True)
        fed = {variable.name: _fed(tensor, variable.dtype) for variable, tensor in pairs}
        try:
            given = self._model.predict(fed)
        except Exception as error:  # whatever Core ML reports
            raise RunnerError(f"Core ML cannot run the program: {type(error).__name__}: {error}") from error
        return [torch.as_tensor(given[output.name]).reshape(output.shape) for output in self._outputs]
