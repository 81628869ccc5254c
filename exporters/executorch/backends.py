"""Whom ExecuTorch hands a network to: the partitioner of each backend, and what its lowering needs around it."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, final

from lightning_edge.errors import ExportError, require
from lightning_edge.exporters.coreml import package as mlpackage
from lightning_edge.exporters.executorch.passes import VULKAN_PASSES, XNNPACK_PASSES
from lightning_edge.exporters.executorch.passes import constants as pte_constants
from lightning_edge.exporters.executorch.read import coreml as pte_coreml
from lightning_edge.exporters.passes.base import Pass, apply_passes, run_passes
from lightning_edge.exporters.passes.float_barriers import separate_float_paddings
from lightning_edge.interface import Interface
from lightning_edge.network import Deployable

Backend = Literal["xnnpack", "portable", "coreml", "vulkan"]

_PASSES: dict[Backend, tuple[Pass, ...]] = {
    "xnnpack": XNNPACK_PASSES,
    "vulkan": VULKAN_PASSES,
    "portable": (),
    "coreml": (),
}

_EXTRA = "executorch"
_MINIMUM_IOS = 17
# XNNPACK pads integers, and has activations of 8 bits as tables. Its leaky ReLU of integers rounds otherwise, and its
# maximum of integers is slower than that of floats (executorch 1.4).
_ALSO_INT8 = {"constant_pad_nd.default", "gelu.default", "sigmoid.default", "tanh.default"}


def check(network: Deployable, backend: Backend, scheme: str | None) -> None:
    """Refuse what a backend cannot take, before anything is lowered.

    Raises:
        ExportError: If the network is int8 and the backend has no int8 kernels.
        ValueError: If the scheme is not one of the backend's.
    """
    if scheme is not None and backend != "xnnpack":
        raise ValueError(
            f"scheme={scheme!r} with backend={backend!r}: schemes are written for backend='xnnpack' only; leave one out"
        )
    if network.precision == "int8" and backend == "portable":
        raise ExportError(
            "executorch: backend='portable' takes float networks only: ExecuTorch's portable kernels have no int8 "
            "convolution or linear layer, so that an int8 network would be unpacked to float at every call. Export it "
            "with backend='xnnpack', or the float network with this one."
        )


def program_of(network: Deployable, backend: Backend) -> Any:
    """Export a network in the form that a backend hands most of to its delegate."""
    if backend == "xnnpack":
        network.graph = run_passes(network.graph, (separate_float_paddings,))
    program = pte_constants.computed_before(network.program())
    graph = program.module(check_guards=False)
    return network.with_graph(graph).program() if apply_passes(graph, _PASSES[backend]) else program


def passes(backend: Backend) -> list[Any] | None:
    """What to do to a network's operations before a backend is chosen for each, if anything.

    ExecuTorch's products of matrices come with expansions to the shape they have, which XNNPACK does not take: each
    would be a copy outside the delegate, and cut that in two.
    """
    if backend != "xnnpack":
        return None
    found: list[Any] = require("executorch.backends.xnnpack.utils.configs", _EXTRA).get_transform_passes()
    return found


@contextmanager
def lowering(backend: Backend) -> Iterator[list[Any]]:
    """Give the partitioners of a backend, and have its lowering be quiet and its files small while the context lasts.

    Raises:
        ExportError: If this build of ExecuTorch lacks something of the backend.
        MissingExtraError: If a package it needs is not installed.
    """
    with ExitStack() as stack:
        if backend in ("coreml", "vulkan"):
            stack.enter_context(_quiet_logs())
        if backend == "coreml":
            stack.enter_context(mlpackage.quiet())
        partitioners = _partitioners(backend)
        if backend == "coreml":
            stack.enter_context(_compact_packages())
        yield partitioners


def _partitioners(backend: Backend) -> list[Any]:
    if backend == "portable":
        return []
    if backend == "xnnpack":
        partition = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", _EXTRA)
        return [partition.XnnpackPartitioner(configs=_xnnpack_configurations())]
    # Out variants of what stays outside, which a device's runtime has to have been built with.
    require("executorch.kernels.quantized", _EXTRA)
    if backend == "vulkan":
        return [require("executorch.backends.vulkan.partitioner.vulkan_partitioner", _EXTRA).VulkanPartitioner()]
    tools = mlpackage.coremltools()
    pte_coreml.archives()
    compiler = require("executorch.backends.apple.coreml.compiler", _EXTRA)
    partition = require("executorch.backends.apple.coreml.partition", _EXTRA)
    specifications = compiler.CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=getattr(tools.target, f"iOS{_MINIMUM_IOS}"),
        compute_precision=tools.precision.FLOAT32,
    )
    return [partition.CoreMLPartitioner(compile_specs=specifications)]


def _xnnpack_configurations() -> list[Any]:
    """What XNNPACK is handed: all that ExecuTorch hands it, and in int8 what XNNPACK has in int8 besides.

    ExecuTorch would have it dequantized, computed in float and quantized again; the values are the same.
    """
    partition = "executorch.backends.xnnpack.partition.config"
    precisions = require(f"{partition}.xnnpack_config", _EXTRA).ConfigPrecisionType

    def in_int8_too(configuration: Any) -> Any:
        both = [precisions.FP32, precisions.STATIC_QUANT]
        return type(configuration.__name__, (configuration,), {"supported_precision_types": lambda _: both})

    known = require(partition, _EXTRA).ALL_PARTITIONER_CONFIGS
    return [in_int8_too(each) if each.target_name in _ALSO_INT8 else each for each in known]


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep a lowering from logging every operation: the Vulkan backend sets the root logger to INFO when imported."""
    root = logging.getLogger()
    level, disabled = root.level, root.manager.disable
    try:
        logging.disable(logging.WARNING)
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)


@final
class _CompactArchives:
    """What the lowering packs a model's folder with, which makes the folder small and the same each time first."""

    def __init__(self, archives: Any) -> None:
        self._archives = archives

    def flatten_directory_contents(self, path: str) -> Any:
        """Pack a folder without its maps for debuggers and with names that do not change."""
        folder = Path(path)
        (folder / "debug_info.json").unlink(missing_ok=True)
        described = folder / "metadata.json"
        metadata = json.loads(described.read_text())
        package = folder / pte_coreml.PACKAGE
        mlpackage.compact(package, metadata["outputNames"], Interface())
        program = mlpackage.read(package)
        metadata["inputNames"] = [value.name for value in program.inputs]
        metadata["outputNames"] = [getattr(value, "name", "") for value in program.outputs]
        # Devices keep compiled models by this name: it is that of the contents.
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(package.rglob("*")) if file.is_file()))
        metadata["identifier"] = f"executorch_{uuid.UUID(bytes=digest.digest()[:16])}"
        described.write_text(json.dumps(metadata))
        return self._archives.flatten_directory_contents(path)


@contextmanager
def _compact_packages() -> Iterator[None]:
    """Have Core ML packages packed small: the debuggers' maps are 70 % of an int8 network of three layers."""
    compiler: Any = require("executorch.backends.apple.coreml.compiler.coreml_preprocess", _EXTRA)
    before = compiler.executorchcoreml
    compiler.executorchcoreml = _CompactArchives(before)
    try:
        yield
    finally:
        compiler.executorchcoreml = before
