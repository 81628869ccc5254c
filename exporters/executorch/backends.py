"""ExecuTorch backends: partitioner, passes and lowering options of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from lightning_edge.errors import ExportError, require
from lightning_edge.exporters.coreml import package as mlpackage
from lightning_edge.exporters.coreml.decompositions import decompositions
from lightning_edge.exporters.executorch import patches
from lightning_edge.exporters.executorch.passes import COMMON_PASSES, PASSES, VULKAN_PASSES
from lightning_edge.exporters.executorch.passes.fold_constants import fold_constants
from lightning_edge.exporters.executorch.read import coreml as pte_coreml
from lightning_edge.exporters.passes.base import apply_passes, run_passes
from lightning_edge.exporters.passes.float_barriers import separate_float_paddings
from lightning_edge.network import Deployable

Backend = Literal["xnnpack", "portable", "coreml", "vulkan"]

_EXTRA = "executorch"
_MINIMUM_IOS = 17
# XNNPACK pads int8 tensors and computes these activations by tables. Not leaky ReLU, which rounds differently in int8,
# and not maximum, which is slower in int8 than in float (executorch 1.4).
_ALSO_INT8 = {"constant_pad_nd.default", "gelu.default", "sigmoid.default", "tanh.default"}


def check(network: Deployable, backend: Backend, scheme: str | None) -> None:
    """Refuse what a backend does not support, before lowering.

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


def prepared(network: Deployable, backend: Backend) -> Deployable:
    """Run the passes of the backend that have to see the captured graph; ``network`` itself if none changes it."""
    graph = run_passes(network.graph, (separate_float_paddings,)) if backend == "xnnpack" else network.graph
    return network if graph is network.graph else network.with_graph(graph)


def program_of(network: Deployable, backend: Backend) -> Any:
    """Export a network and run the passes of the backend on it."""
    program = fold_constants(network.program())
    graph = program.module(check_guards=False)
    if apply_passes(graph, {"xnnpack": PASSES, "vulkan": VULKAN_PASSES}.get(backend, COMMON_PASSES)):
        program = network.with_graph(graph).program()
    # For the same converter as Core ML's own packages.
    return program.run_decompositions(decompositions(program.graph)) if backend == "coreml" else program


def lowering_passes(backend: Backend) -> list[Any] | None:
    """Return ExecuTorch's own passes for a backend, run before partitioning; ``None`` if it has none.

    They drop no-op expansions around matrix products. XNNPACK does not support expansions: each would be a copy outside
    the delegate that splits its graph in two.
    """
    if backend != "xnnpack":
        return None
    found: list[Any] = require("executorch.backends.xnnpack.utils.configs", _EXTRA).get_transform_passes()
    return found


@contextmanager
def lowering(backend: Backend) -> Iterator[list[Any]]:
    """Return the partitioners of a backend; within this context its lowering is quiet.

    Raises:
        ExportError: If this build of ExecuTorch lacks something of the backend.
        MissingExtraError: If a package it needs is not installed.
    """
    with ExitStack() as stack:
        if backend in ("coreml", "vulkan"):
            stack.enter_context(patches.quiet_logs())
        if backend == "coreml":
            stack.enter_context(mlpackage.quiet())
        partitioners = _partitioners(backend)
        if backend == "coreml":
            stack.enter_context(patches.compact_packages())
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
    """Return ExecuTorch's configurations, with int8 added for the operations in `_ALSO_INT8`.

    ExecuTorch would dequantize, compute in float and quantize again. The values are the same.
    """
    partition = "executorch.backends.xnnpack.partition.config"
    precisions = require(f"{partition}.xnnpack_config", _EXTRA).ConfigPrecisionType

    def in_int8_too(configuration: Any) -> Any:
        both = [precisions.FP32, precisions.STATIC_QUANT]
        return type(configuration.__name__, (configuration,), {"supported_precision_types": lambda _: both})

    known = require(partition, _EXTRA).ALL_PARTITIONER_CONFIGS
    return [in_int8_too(each) if each.target_name in _ALSO_INT8 else each for each in known]
