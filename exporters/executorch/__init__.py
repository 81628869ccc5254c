"""ExecuTorch: a ``.pte`` file for XNNPACK or another backend, run by ExecuTorch's runtime where that has it."""

from __future__ import annotations

import copy
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn

from lightning_edge.contents import Contents
from lightning_edge.errors import EdgeError, RunnerError, require
from lightning_edge.exporters.executorch import backends as executorch_backends
from lightning_edge.exporters.executorch.backends import Backend
from lightning_edge.exporters.executorch.read import program as pte
from lightning_edge.exporters.run.calls import TensorSpec
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.exporters.target import Target, explain
from lightning_edge.exporters.verify import contents as checks
from lightning_edge.network import Deployable

EXTRA = "executorch"
# The library below executorch.runtime, which imports the whole exporter for the class of one warning: 7 of 9 seconds.
RUNTIME = ("executorch.extension.pybindings._portable_lib",)

Scheme = Literal["fp16", "int8_dynamic", "int4_dynamic"]

# Weights of a row that share a scale, in XNNPACK's 4-bit kernels: this many or a multiple.
_GROUP = 32
_DELEGATE_NAMES = {pte.XNNPACK: "XNNPACK", pte.CORE_ML: "Core ML", pte.VULKAN: "Vulkan"}


@final
class ExecuTorch(Target):
    """ExecuTorch: ``.pte`` files."""

    suffix = ".pte"
    extra = EXTRA
    needs = ("executorch",)
    # The library below executorch.runtime, which imports the whole exporter for the class of one warning: 7 of 9
    # seconds.
    runtime_modules = RUNTIME
    schemes = get_args(Scheme)

    def write(
        self,
        network: Deployable,
        path: Path,
        *,
        backend: Backend = "xnnpack",
        scheme: Scheme | None = None,
        group_size: int | None = _GROUP,
    ) -> None:
        """Lower the network to a backend and write it.

        Args:
            network: The network; its sample says the shapes.
            path: Where to write, a path that does not exist yet.
            backend: What runs it: ``"xnnpack"`` on CPUs, ``"portable"`` with ExecuTorch's own kernels alone, for
                runtimes without any delegate (float networks only), ``"coreml"`` on Apple's devices from iOS 17 on,
                ``"vulkan"`` on the GPUs of Android.
            scheme: How a float network's weights are stored, for XNNPACK: ``"fp16"``, which takes and gives float16 as
                well, or linear layers in 8 or 4 bits with their activations quantized on the fly. XNNPACK has no
                kernels for integer weights with float activations.
            group_size: With ``"int4_dynamic"``, how many weights of a row share a scale, a multiple of 32; ``None``
                for one scale a channel. Layers whose inputs it does not divide stay float.

        Raises:
            ExportError: If ExecuTorch refuses the network, or the backend cannot take it.
            ValueError: If the scheme is not one of the backend's, or there are no groups of that size.
        """
        _check_groups(group_size, scheme)
        exir = require("executorch.exir", EXTRA)
        executorch_backends.check(network, backend, scheme)
        try:
            with warnings.catch_warnings():
                # torch.export's own copying is deprecated by itself, once for every node.
                warnings.simplefilter("ignore", FutureWarning)
                if scheme is not None:
                    network = _in_scheme(network, scheme, group_size)
                program = executorch_backends.program_of(network, backend)
                notes = network.interface.notes() or None
                with executorch_backends.lowering(backend) as partitioners:
                    edge = exir.to_edge_transform_and_lower(
                        program, executorch_backends.passes(backend), partitioners, constant_methods=notes
                    )
                    lowered = edge.to_executorch()
        except EdgeError:
            raise
        except Exception as error:
            raise explain(
                "executorch" if backend == "xnnpack" else f"executorch, backend={backend!r}",
                error,
                "Replace that operation by one that ExecuTorch's core operator set has, or leave the target out.",
            ) from error
        with path.open("wb") as file:
            lowered.write_to_file(file)

    def inspect(self, path: Path) -> Contents:
        """Read what the file holds.

        Raises:
            ValueError: If it is not a whole ExecuTorch program, or one for another delegate than those of `Backend`.
        """
        return pte.read(path)

    def not_run_here(self, contents: Contents) -> str | None:
        """Say why the runtime of this machine cannot run a file; ``None`` where it can.

        Args:
            contents: What the file says of itself.
        """
        others = [name for name in contents.delegates if name != pte.XNNPACK]
        if not others:
            return None
        there = require(RUNTIME[0], EXTRA)._get_registered_backend_names()
        missing = [name for name in others if name not in there]
        if not missing:
            return None
        return (
            f"ExecuTorch {version('executorch')} has no {' and no '.join(missing)} on this machine; a device whose "
            "runtime was built with it runs the file"
        )

    def open(self, path: Path, threads: int) -> Runner:
        """Load the file with ExecuTorch's runtime.

        Args:
            path: The file.
            threads: Threads of XNNPACK's pool, which all ExecuTorch artifacts loaded into one process share.

        Raises:
            RunnerError: If the file has no method of the name that `write` gives it.
        """
        return _Runner(path, threads)


TARGET = ExecuTorch()


def _check_groups(group_size: int | None, scheme: Scheme | None) -> None:
    if group_size is None:
        return
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < _GROUP or group_size % _GROUP:
        raise ValueError(
            f"executorch: group_size={group_size!r} is not allowed: XNNPACK's 4-bit kernels take groups of a multiple "
            f"of {_GROUP} inputs. Give {_GROUP}, {2 * _GROUP}, ... or None for one scale a channel"
        )
    if group_size != _GROUP and scheme != "int4_dynamic":
        raise ValueError(
            f"executorch: group_size={group_size!r} says something of scheme='int4_dynamic' only, and this is "
            f"scheme={scheme!r}; leave one out"
        )


def _in_scheme(network: Deployable, scheme: Scheme, group_size: int | None) -> Deployable:
    """Give a copy of a float network with other weights."""
    graph = copy.deepcopy(network.graph)
    if scheme == "fp16":
        halved = network.inputs.map(lambda tensor: tensor.half() if tensor.is_floating_point() else tensor)
        return Deployable(graph.half(), halved, network.precision, interface=network.interface)
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    dtype = getattr(torch, scheme.split("_")[0])  # torch.int4 is not in torch's own types
    is_int4 = scheme == "int4_dynamic"
    # XNNPACK takes 4-bit weights of rows of a multiple of 32 inputs, also where a row has one scale.
    inputs = (group_size or _GROUP) if is_int4 else 1
    granularity = PerGroup(group_size) if is_int4 and group_size is not None else PerAxis(0)
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)

    def inputs_of(module: nn.Module) -> int:
        return module.in_features if isinstance(module, nn.Linear) else 0

    checks.warn_uneven_groups("executorch", graph, inputs_of, inputs, "these layers stay float")
    quantize_(graph, config, lambda module, _: isinstance(module, nn.Linear) and module.in_features % inputs == 0)
    return Deployable(graph, network.inputs, network.precision, interface=network.interface)


@final
class _Pool:
    """XNNPACK's thread pool, one for the whole process.

    A loaded method keeps a pointer to the pool it was loaded with, so a reset makes every method loaded
    before it unusable; `generation` counts the resets.
    """

    def __init__(self) -> None:
        self.generation = 0

    def set(self, threads: int) -> int:
        """Give the pool this many threads and return its generation."""
        library = require(RUNTIME[0], EXTRA)
        if library._threadpool_get_thread_count() != threads:
            library._unsafe_reset_threadpool(threads)
            self.generation += 1
        return self.generation


_POOL = _Pool()


@final
class _Runner(Runner):
    """Runs the one method of a program."""

    def __init__(self, path: Path, threads: int) -> None:
        self._data = path.read_bytes()
        self._threads = threads
        self._generation = _POOL.set(threads)
        self._method = self._load(path.name)
        metadata = self._method.method_meta()
        self.inputs = tuple(_spec(metadata.input_tensor_meta(index)) for index in range(metadata.num_inputs()))
        count = "1 thread" if threads == 1 else f"{threads} threads"
        delegates = [name for name in _DELEGATE_NAMES if name.encode() in self._data]
        runs_on = ", ".join(_DELEGATE_NAMES[name] for name in delegates) or "portable kernels"
        self.runtime = f"ExecuTorch {version('executorch')}, {runs_on}, {count}"

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run on the flattened inputs of one sample."""
        generation = _POOL.set(self._threads)
        if generation != self._generation:
            self._method, self._generation = self._load("the file"), generation
        return list(self._method(tensors))

    def _names(self) -> list[str]:
        return [self._program.get_method_name(index) for index in range(self._program.num_methods())]

    def _load(self, name: str) -> Any:
        self._program = require(RUNTIME[0], EXTRA)._load_program_from_buffer(self._data)
        names = self._names()
        if pte.METHOD not in names:
            raise RunnerError(f"{name} has no method {pte.METHOD!r}; it has {sorted(names)}")
        return self._program.load_method(pte.METHOD)


def _spec(info: Any) -> TensorSpec:
    return TensorSpec(tuple(info.sizes()), _DTYPES[info.dtype()])


# ExecuTorch tells a type by its number in the ScalarType enumeration it shares with PyTorch.
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
