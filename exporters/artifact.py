"""An exported file, loaded: `Artifact`, and how a file becomes one."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_edge.contents import Contents, Precision
from lightning_edge.errors import EdgeError, RunnerError, first_line
from lightning_edge.exporters.input_adapter import (
    as_file_sees,
    as_file_takes,
    as_network_takes,
    network_dtype,
    network_shape,
)
from lightning_edge.exporters.run.calls import Samples, TensorSpec, conform, converted, stack
from lightning_edge.exporters.run.child import Child
from lightning_edge.exporters.run.isolated import DEFAULT_TIME_LIMIT_S, Isolated
from lightning_edge.exporters.run.missing import missing_operation
from lightning_edge.exporters.run.not_run import NotRun
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.exporters.run.running import Kernels, Running
from lightning_edge.exporters.run.time_limit import within
from lightning_edge.exporters.target import TARGETS, Target, target
from lightning_edge.measure import Agreement
from lightning_edge.network import Inputs, sort_keywords
from lightning_edge.regular_files import check_members, check_regular, kind_of
from lightning_edge.verdict import Judgement

Result = TypeVar("Result")

# What flatbuffers and protocol buffers count bytes with ends here.
MOST_BYTES = 2**31 - 1
# A package's weights lie in a file of their own that has no such end; no device has room for more.
MOST_PACKAGE_BYTES = 2**34

EXPORT_AGAIN = "Export it again"


@dataclass(frozen=True, eq=False)
class Artifact:
    """An exported file, loaded: call it as the network it came from, batch of any size.

    Attributes:
        target: Name of the target, a key of `exporters.TARGETS`.
        path: The file, or the folder of a Core ML package.
        size_bytes: Bytes on disk, summed over a package's files.
        compressed_bytes: Bytes of a zip (deflate) of it, what an app download pays.
        contents: What the file says of itself.
        runner: Runs one sample.
        load_ms: Wall time from the path to a runner that is ready, milliseconds; ``None`` where there is none.
        agreement: How far it lay from that network; ``None`` for a file that was not compared.
        judgement: What was made of that; ``None`` for a file that was not compared.
        not_run: Why nothing on this machine can run it, and calling it is an error; ``None`` where it runs.
    """

    target: str
    path: Path
    size_bytes: int
    compressed_bytes: int
    contents: Contents
    runner: Runner = field(repr=False)
    load_ms: float | None
    agreement: Agreement | None = None
    judgement: Judgement | None = None
    not_run: str | None = None

    @property
    def precision(self) -> Precision:
        """Precision of the weights, read from the file."""
        return self.contents.precision

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it is called with, in the network's own layout."""
        interface = self.contents.interface
        return tuple(
            TensorSpec(network_shape(spec.shape, interface), network_dtype(spec.shape, spec.dtype, interface))
            for spec in self.runner.inputs
        )

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Run on a batch, sample by sample or as many at once as the file takes; gives the outputs, batch first.

        Raises:
            RunnerError: If number, shape or type of the inputs is not what the file takes, or it fails to run.
        """
        if any(
            hasattr(leaf, "__array__") and not isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))
        ):
            raise RunnerError(f"{self.path.name} was given a numpy array; give tensors, torch.as_tensor(array)")
        inputs = sort_keywords(Inputs(args, kwargs)).map(lambda tensor: tensor.detach().cpu())
        if not any(tensor.dim() for tensor in inputs.tensors):
            return stack([self.run(inputs.tensors)])
        if inputs.batch_size == 0:
            raise RunnerError(f"{self.path.name} was given a batch of 0 samples; give at least one")
        most = self.contents.interface.max_batch
        if inputs.batch_size <= most:
            return stack([self.run(inputs.tensors)])
        self.ready(inputs.sample(0, most).tensors)  # all others are of the same shapes and types
        values = [as_network_takes(tensor, self.contents.interface) for tensor in inputs.tensors]
        samples = replace(Samples.of(inputs.tensors), tensors=self._as_file_takes(converted(values, self.inputs)))
        return self.guarded(lambda: self.runner.run_all(samples, most))

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one call, after checking them against the file.

        Raises:
            RunnerError: If number, shape or type of the inputs is not what the file takes, or it fails to run.
        """
        ready = self.ready(tensors)
        return self.guarded(lambda: self.runner(ready))

    def ready(self, tensors: list[Tensor]) -> list[Tensor]:
        """Check the flattened inputs of one call, and make of them what the file itself takes.

        Where that is pixels, images may be given as uint8 as well, in the network's own layout.

        Raises:
            RunnerError: If number, shape or type of the inputs is not what the network took, or a file that takes
                pixels is given values that are none.
        """
        interface = self.contents.interface
        values = [as_network_takes(tensor, interface) for tensor in tensors]
        return self._as_file_takes(conform(values, self.inputs, self.path.name, interface.max_batch))

    def _as_file_takes(self, given: list[Tensor]) -> list[Tensor]:
        try:
            return [as_file_takes(tensor, self.contents.interface) for tensor in given]
        except ValueError as error:
            raise RunnerError(f"{self.path.name}: {error}") from error

    def sees(self, inputs: Inputs) -> Inputs:
        """Give a call of the network with the values that the file makes of it: whole pixels, if it takes those.

        Raises:
            RunnerError: If it takes pixels and values are none.
        """
        try:
            return inputs.map(lambda tensor: as_file_sees(tensor, self.contents.interface))
        except ValueError as error:
            raise RunnerError(f"{self.path.name}: {error}") from error

    def timed_call(self, tensors: list[Tensor]) -> Callable[[], int]:
        """Return a function that runs the file once and returns the nanoseconds it took.

        A file in a process of its own is timed there, on a sample that lies there: the time to ask is not part of it,
        and neither is making the file's inputs of the network's (`ready`, `Runner.prepare`).

        Args:
            tensors: The flattened inputs of one sample.

        Raises:
            RunnerError: If they are not what the file takes, or its process is gone.
        """
        ready = self.ready(tensors)
        call = self.guarded(lambda: self.runner.timed_call(ready))
        return lambda: self.guarded(call)

    def guarded(self, call: Callable[[], Result]) -> Result:
        """Make a call of the runner.

        Raises:
            RunnerError: If it fails, whatever the runtime raises.
        """
        try:
            with torch.no_grad():
                return call()
        except EdgeError:
            raise
        except Exception as error:
            raise RunnerError(f"{self.path.name} failed in {self.runner.runtime}: {first_line(error)}") from error


def load(
    path: str | Path,
    *,
    threads: int = 1,
    isolated: bool = True,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    kernels: Kernels = "delegate",
) -> Artifact:
    """Load an exported file; its suffix says the target.

    Args:
        path: The file, or the folder of a Core ML package.
        threads: Threads to run it with.
        isolated: Whether its runtime gets a process of its own, which ends with the artifact: what crashes there is a
            `RunnerError` here. With ``False`` it starts sooner, a call is not sent anywhere, and a crash is one of this
            process. Core ML's reference interpreter has no process of its own either way.
        time_limit_s: Seconds that reading what the file holds, loading it, or running one sample may take, each. A
            process is ended then; without one only reading is limited.
        kernels: ``"reference"`` computes a ``.tflite`` file as a microcontroller does, without LiteRT's delegate: slow.

    Raises:
        RunnerError: If it is missing, no regular file, too large, cut short, or not what its suffix says.
        ValueError: If the suffix belongs to no target, or an argument is not allowed.
    """
    running = Running(threads, isolated, time_limit_s, kernels)
    name, path = _existing(path)
    check_kernels(name, kernels)
    contents = _inspected(target(name), path, time_limit_s)
    return open_file(name, path, contents, running)


def contents_of(path: str | Path, *, time_limit_s: float = DEFAULT_TIME_LIMIT_S) -> Contents:
    """Read what an exported file holds, without running it; its suffix says the target.

    Args:
        path: The file, or the folder of a Core ML package.
        time_limit_s: Seconds that it may take.

    Raises:
        RunnerError: If it is missing, no regular file, too large, cut short, or not what its suffix says.
        ValueError: If the suffix belongs to no target, or the time is not above 0.
    """
    Running(time_limit_s=time_limit_s)
    name, path = _existing(path)
    return _inspected(target(name), path, time_limit_s)


def _existing(path: str | Path) -> tuple[str, Path]:
    """The target that a file is of, by its suffix, and its path."""
    path = Path(path)
    name = next((name for name in TARGETS if path.suffix == target(name).suffix), None)
    if name is None:
        known = ", ".join(f"{target(name).suffix} ({name})" for name in TARGETS)
        raise ValueError(f"{path} has the suffix {path.suffix!r}; load() reads {known}")
    _check_place(path, target(name))
    return name, path


def _check_place(path: Path, module: Target) -> None:
    """Refuse what only has the name of a file, before anything of it is read: what lies there, its size, its mark."""
    try:
        kind, wanted = kind_of(path), "a folder" if module.writes_folder else "a file"
        if kind != wanted:
            raise RunnerError(f"{path} is {kind}; a {module.suffix} is {wanted}, as export() writes it")
        if module.writes_folder:
            check_members(path, MOST_PACKAGE_BYTES)
            return
        check_regular(path, MOST_BYTES)
        place, mark = module.mark
        with path.open("rb") as stream:
            if stream.read(place + len(mark))[place:] != mark:
                raise RunnerError(f"{path.name} is no {module.suffix} file: it does not begin as one. Export it again")
    except FileNotFoundError as error:
        raise RunnerError(f"{path} does not exist; export() writes it") from error
    except OSError as error:
        raise RunnerError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise RunnerError(f"{error}. Give one that export() wrote") from error


def _inspected(module: Target, path: Path, time_limit_s: float) -> Contents:
    module.import_reader()
    try:
        return within(time_limit_s, lambda: inspect_file(module, path, path.name))
    except TimeoutError as error:
        raise RunnerError(
            f"{path.name} was not read within time_limit_s={time_limit_s:g}: it is very large, or made to be read "
            "without end. If it is your own, give a larger time_limit_s"
        ) from error


def inspect_file(module: Target, path: Path, name: str, advice: str = EXPORT_AGAIN) -> Contents:
    """Read what a target's file holds.

    Args:
        module: The target.
        path: The file.
        name: What an error calls it.
        advice: What to do about one that cannot be read.

    Raises:
        RunnerError: If it is not what its suffix says.
    """
    try:
        return module.inspect(path)
    except EdgeError:
        raise
    except Exception as error:
        raise RunnerError(f"{name} is no {module.suffix} file: {first_line(error)}. {advice}") from error


def placed(module: Target, path: Path, contents: Contents) -> Contents:
    """Put what the runtime itself tells of where operations run in the place of what the file alone tells."""
    placements = module.placements(path)
    return contents if placements is None else replace(contents, placements=placements)


def open_file(
    name: str,
    path: Path,
    contents: Contents,
    running: Running,
    advice: str = EXPORT_AGAIN,
    child: Child | None = None,
) -> Artifact:
    """Load a file whose contents are known; see `load`. One that nothing here can run is given without being loaded.

    Args:
        name: A key of `TARGETS`.
        path: The file.
        contents: What it holds.
        running: How it is run.
        advice: What to do about one that does not load, unless an operation without a kernel is why.
        child: A process to load it in, such as the one that wrote it.

    Raises:
        RunnerError: If it does not load.
    """
    module = target(name)
    if (reason := module.not_run_here(contents)) is not None:
        waiting = NotRun(path.name, contents, reason)
        return Artifact(
            name, path, size_bytes(path), compressed_bytes(path), contents, waiting, load_ms=None, not_run=reason
        )
    runner: Runner
    try:
        reference = running.kernels == "reference"
        if child is not None or (running.isolated and not module.in_process):
            runner = Isolated(TARGETS[name], path, running.threads, running.time_limit_s, child, reference)
            load_ms = runner.load_ms
        else:
            module.import_runtime()
            start = time.perf_counter()
            runner = (module.open_reference if reference else module.open)(path, running.threads)
            load_ms = (time.perf_counter() - start) * 1000
    except EdgeError:
        raise
    except Exception as error:
        said = first_line(error).rstrip(".?")
        if (operation := missing_operation(f"{error}\n{getattr(error, 'printed', '')}")) is not None:
            said += f" (operation {operation})" if operation not in said else ""
            advice = f"The runtime has no kernel for {operation}: replace it in the network, or leave {name} out"
        raise RunnerError(f"{path.name} does not load: {said}. {advice}") from error
    return Artifact(name, path, size_bytes(path), compressed_bytes(path), contents, runner, load_ms)


def check_kernels(name: str, kernels: Kernels, max_fallback: float | None = None) -> None:
    """Refuse reference kernels of a target whose runtime has none, and a limit on what they leave to a delegate.

    Raises:
        ValueError: Naming the targets that have them, or the limit.
    """
    if kernels == "reference" and max_fallback is not None:
        raise ValueError(
            f"max_fallback={max_fallback} limits what a delegate leaves to the CPU, and kernels='reference' has no "
            "delegate, as a microcontroller has none; leave one of them out"
        )
    if kernels == "reference" and not target(name).has_reference_kernels:
        raise ValueError(f"kernels='reference' is for files of tflite, and this is one of {name}; leave it out")


def size_bytes(path: Path) -> int:
    """Count the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in _files(path))


def compressed_bytes(path: Path) -> int:
    """Count the bytes of a zip (deflate) of a file or folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in _files(path):
            archive.write(file, file.relative_to(path.parent))
    return len(buffer.getvalue())


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
