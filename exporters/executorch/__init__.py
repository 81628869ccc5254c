"""The ExecuTorch target: writes, reads and runs ``.pte`` files for XNNPACK and other backends."""

from __future__ import annotations

import copy
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from torch import nn

from lightning_edge.contents import Contents
from lightning_edge.errors import EdgeError, require
from lightning_edge.exporters.executorch import backends as executorch_backends
from lightning_edge.exporters.executorch.backends import Backend
from lightning_edge.exporters.executorch.read import program as pte
from lightning_edge.exporters.executorch.runner import EXTRA, ExecuTorchRunner, library
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.exporters.target import Target, explain
from lightning_edge.exporters.verify import contents as checks
from lightning_edge.network import Deployable

Scheme = Literal["fp16", "int8_dynamic", "int4_dynamic"]

# Group size of XNNPACK's 4-bit kernels: this many weights of a row, or a multiple, share a scale.
_GROUP = 32


@final
class ExecuTorch(Target):
    """ExecuTorch: ``.pte`` files."""

    suffix = ".pte"
    mark = (4, b"ET")
    reader_modules = (
        "executorch.exir._serialize._program",
        "executorch.backends.xnnpack.serialization.xnnpack_graph_serialize",
    )
    extra = EXTRA
    needs = ("executorch",)
    schemes = get_args(Scheme)

    def prepare(
        self,
        network: Deployable,
        *,
        backend: Backend = "xnnpack",
        scheme: Scheme | None = None,
        group_size: int | None = _GROUP,
        **options: Any,
    ) -> Deployable:
        """Refuse what the backend does not support; put weights in their scheme, and paddings where XNNPACK has them.

        Raises:
            ExportError: If the backend does not support the network.
            ValueError: If the scheme is not one of the backend's, or there are no groups of that size.
        """
        _check_groups(group_size, scheme)
        executorch_backends.check(network, backend, scheme)
        if scheme is not None:
            network = _in_scheme(network, scheme, group_size)
        return executorch_backends.prepared(network, backend)

    def write(
        self,
        network: Deployable,
        path: Path,
        *,
        backend: Backend = "xnnpack",
        scheme: Scheme | None = None,
        group_size: int | None = _GROUP,
    ) -> None:
        """Lower the network to a backend and write the file.

        Args:
            network: The network; its sample gives the shapes.
            path: Where to write, a path that does not exist yet.
            backend: ``"xnnpack"`` for CPUs, ``"portable"`` for runtimes without any delegate (ExecuTorch's own
                kernels, float networks only), ``"coreml"`` for Apple devices from iOS 17 on, ``"vulkan"`` for GPUs of
                Android.
            scheme: How the weights of a float network are stored, for XNNPACK: ``"fp16"`` (inputs and outputs become
                float16 too), or linear layers in 8 or 4 bits whose activations are quantized at run time. XNNPACK has
                no kernels for integer weights with float activations.
            group_size: With ``"int4_dynamic"``, how many weights of a row share a scale, a multiple of 32; ``None``
                for one scale a channel. Layers whose inputs it does not divide stay float.

        Raises:
            ExportError: If ExecuTorch cannot lower the network, or the backend does not support it.
            ValueError: If the scheme is not one of the backend's, or there are no groups of that size.
        """
        exir = require("executorch.exir", EXTRA)
        try:
            with warnings.catch_warnings():
                # torch.export warns of its own deprecated copying, once for every node.
                warnings.simplefilter("ignore", FutureWarning)
                program = executorch_backends.program_of(network, backend)
                notes = network.interface.notes() or None
                with executorch_backends.lowering(backend) as partitioners:
                    edge = exir.to_edge_transform_and_lower(
                        program, executorch_backends.lowering_passes(backend), partitioners, constant_methods=notes
                    )
                    lowered = edge.to_executorch()
        except EdgeError:
            raise
        except Exception as error:
            name = "executorch" if backend == "xnnpack" else f"executorch, backend={backend!r}"
            raise explain(name, error, "ExecuTorch's core operator set") from error
        with path.open("wb") as file:
            lowered.write_to_file(file)

    def inspect(self, path: Path) -> Contents:
        """Read the contents of a file.

        Raises:
            ValueError: If it is not a whole ExecuTorch program, or one for another delegate than those of `Backend`.
        """
        return pte.read(path)

    def import_runtime(self) -> None:
        """Import what running a file takes.

        Raises:
            MissingExtraError: If it is not installed.
        """
        library()

    def not_run_here(self, contents: Contents) -> str | None:
        """Return why the runtime of this machine cannot run a file; ``None`` if it can.

        Args:
            contents: The contents of the file.
        """
        others = [name for name in contents.delegates if name != pte.XNNPACK]
        if not others:
            return None
        there = library()._get_registered_backend_names()
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
        return ExecuTorchRunner(path, threads)


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
    """Return a copy of a float network with its weights stored in a scheme."""
    graph = copy.deepcopy(network.graph)
    if scheme == "fp16":
        halved = network.inputs.map(lambda tensor: tensor.half() if tensor.is_floating_point() else tensor)
        return Deployable(graph.half(), halved, network.precision, interface=network.interface)
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    dtype = getattr(torch, scheme.split("_")[0])  # torch.int4 is not in torch's own types
    is_int4 = scheme == "int4_dynamic"
    # XNNPACK needs rows of a multiple of 32 inputs for 4-bit weights, also with one scale a row.
    inputs = (group_size or _GROUP) if is_int4 else 1
    granularity = PerGroup(group_size) if is_int4 and group_size is not None else PerAxis(0)
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)

    def inputs_of(module: nn.Module) -> int:
        return module.in_features if isinstance(module, nn.Linear) else 0

    checks.warn_uneven_groups("executorch", graph, inputs_of, inputs, "these layers stay float")
    quantize_(graph, config, lambda module, _: isinstance(module, nn.Linear) and module.in_features % inputs == 0)
    return Deployable(graph, network.inputs, network.precision, interface=network.interface)
