"""The network's graph in one mode, by torch.export. Knows torch only."""

from __future__ import annotations

import builtins
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.plain_calls import PlainCalls
from lightning_edge.quantization.capture.in_place import inline_modes
from lightning_edge.quantization.capture.nodes import LIFTED
from lightning_edge.quantization.capture.regularizers import LayersStay
from lightning_edge.quiet import without_graph_dumps
from lightning_edge.surgery import in_mode, redirected
from lightning_edge.user_warnings import warn

aten = torch.ops.aten

# Bookkeeping that torch.export leaves in a graph and that computes nothing.
_BOOKKEEPING = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range.default}


def two_samples(inputs: Inputs) -> Inputs:
    """Cut or repeat to a batch of two: torch.export takes a dimension of one for a constant."""
    if inputs.batch_size >= 2:
        return inputs.sample(size=2)
    return inputs.map(lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor)


def exported(
    network: nn.Module, inputs: Inputs, *, training: bool, all_layers: bool = False, any_batch: bool = True
) -> GraphModule | CompressionError:
    """Give a network's graph in one mode, or why there is none.

    Args:
        network: Any module that torch.export takes; it is left as it was.
        inputs: One call of it, of two samples.
        training: Which mode.
        all_layers: Whether layers that random numbers decide about may all run, where no graph can follow these.
        any_batch: Whether the graph is for batches of any size, or for those of two samples alone, which takes a third
            of the time: every shape is then numbers.
    """
    try:
        with _mode(network, training):
            return _export(network, inputs, any_batch)
    except CompressionError as error:
        if not all_layers or not isinstance(error.__cause__, GuardOnDataDependentSymNode):
            return error
        try:
            with _mode(network, training), LayersStay() as stay:
                graph = _export(network, inputs, any_batch)
        except CompressionError:
            return error
        if not stay.draws:
            return error
        warn(
            f"{type(network).__name__} decides by random numbers in training which layers run, as LayerDrop does. One "
            "graph cannot: from here on all of them run."
        )
        return graph


@contextmanager
def _mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode of every module and put back, module by module, what the user had; likewise BatchNorm's counters."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()} if training else {}
    # momentum=None averages over all batches, which reads its counter as a Python number: no graph can hold that.
    averaging = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.momentum is None]
    try:
        for module in averaging:
            module.momentum = 0.1
        with in_mode(network, training):
            for iterated in _power_iterations(network):
                iterated.training = False
            yield
    finally:
        for module in averaging:
            module.momentum = None
        for name, buffer in network.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


def _power_iterations(network: nn.Module) -> list[nn.Module]:
    """Find the modules of spectral_norm, which write into their buffers in training, as no quantized graph can.

    In a graph they are as in eval mode: the weight is divided by its largest singular value along the vectors found so
    far. To first order these stay right as the weight moves on, because they are that value's gradient.
    """
    return [m for m in network.modules() if isinstance(m, nn.utils.parametrizations._SpectralNorm)]


def _export(network: nn.Module, inputs: Inputs, any_batch: bool) -> GraphModule:
    device_type = next((tensor.device.type for tensor in inputs.tensors), "cpu")
    try:
        # With gradients, so that the graph shows where forward() turns them off.
        mixed = torch.is_autocast_enabled(device_type)
        without_autocast = torch.autocast(device_type, enabled=False)
        with (
            torch.enable_grad(),
            without_autocast,
            _spelled_out(network, inputs),
            PlainCalls(),
            _symbolic_len(),
            without_graph_dumps(),
        ):
            shapes = _dynamic_batch(network, inputs) if any_batch else None
            program = torch.export.export(
                network, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # torch.export raises many kinds, all of them about the user's network here
        reason = str(error).strip().splitlines() or [type(error).__name__]
        first_sentence = re.split(r"(?<!e\.g)\.(?:\s|$)", reason[0])[0]
        raise CompressionError(
            f"{type(network).__name__} cannot be captured as one graph by torch.export: "
            f"{_fixed_batch(str(error)) or first_sentence}. {_advice(error)}"
        ) from error
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    for node in list(graph.graph.nodes):
        counts = node.target is aten.add_.Tensor and "num_batches_tracked" in str(getattr(node.args[0], "target", ""))
        if node.target in _BOOKKEEPING or counts:
            if node.users:
                node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    _check_autocast(graph, type(network).__name__, mixed)
    inline_modes(graph)
    _own_lifted(graph, network)
    graph.recompile()
    return graph


def _check_autocast(graph: GraphModule, network: str, mixed: bool) -> None:
    """Warn where forward() turns autocast off in a training that has it on, which the graph does not follow.

    Raises:
        CompressionError: If forward() turns it on.
    """
    target = torch.ops.higher_order.wrap_with_autocast
    graphs = [module.graph for module in graph.modules() if isinstance(module, GraphModule)]  # regions hold regions
    regions = [node for one in graphs for node in one.find_nodes(op="call_function", target=target)]
    if any(node.args[2] for node in regions):
        raise CompressionError(
            f"{network} turns torch.autocast on in forward(), which one int8 graph cannot follow. Take it out of the "
            "network; the Trainer's precision=... sets it for the whole training."
        )
    if regions and mixed:
        warn(
            f"{network} turns torch.autocast off in parts of forward(). From here on these have the Trainer's "
            "precision too: set precision='32-true' if they overflow."
        )


def _fixed_batch(message: str) -> str:
    """Say that forward() made a number of the batch size, if torch says so."""
    fixed = re.search(r"your code specialized it to be a constant \((\d+)\)", message)
    return f"forward() makes the number {fixed.group(1)} of the batch size" if fixed else ""


def _advice(error: Exception) -> str:
    """Say what a network must be like to be captured, for the kind of error that torch.export raised."""
    line = re.search(r'The following call raised this error:\s*File "([^"]+)", line (\d+)', str(error))
    where = f" The line is {line.group(1)}:{line.group(2)}." if line else ""
    if _fixed_batch(str(error)):
        return (
            "It must run for batches of any size: write x.shape[0] for int(x.shape[0]), len(list(x)) or a number in a "
            f"reshape, and no loop over the samples.{where}"
        )
    if isinstance(error, GuardOnDataDependentSymNode):
        return (
            "forward() must not branch on values of tensors: write torch.where for if, and leave out .item() and "
            f"bool(tensor).{where}"
        )
    return (
        "forward() must run for batches of any size, without Python branches on values of tensors and without logging. "
        "What it takes and returns must be tensors in tuples, lists, dicts, or in a dataclass given to "
        f"torch.export.register_dataclass.{where}"
    )


@contextmanager
def _symbolic_len() -> Iterator[None]:
    """Let ``len(tensor)`` be the tensor's first size: Python's own makes a number of it, which fixes the batch size."""
    original = builtins.len

    def first_size(value: Any) -> Any:
        return value.shape[0] if isinstance(value, Tensor) and value.dim() else original(value)

    builtins.len = first_size
    try:
        yield
    finally:
        builtins.len = original


def _own_lifted(graph: GraphModule, network: nn.Module) -> None:
    """Hold in the graph what forward() makes of Python numbers; torch.export adds it to submodules.

    The graph's submodules are the network's own in the end, which does not have them.
    """
    held = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    held |= {name for name, _ in network.named_buffers(remove_duplicate=False)}
    for node in graph.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr" and target not in held and "lifted_tensor" in target:
            name = LIFTED + target.replace(".", "_")
            graph.register_buffer(name, attrgetter(target)(graph), persistent=False)
            node.target = name


@contextmanager
def _spelled_out(network: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Give a ``forward(*args, **kwargs)`` the signature of this call: torch.export cannot match shapes with stars."""
    kinds = {parameter.kind for parameter in inspect.signature(network.forward).parameters.values()}
    if not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        yield
        return
    forward = network.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    parameter = inspect.Parameter
    named = [parameter(f"argument_{i}", parameter.POSITIONAL_OR_KEYWORD) for i in range(len(inputs.args))]
    named += [parameter(name, parameter.KEYWORD_ONLY) for name in inputs.kwargs]
    call.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    with redirected(network, call):
        yield


def _dynamic_batch(network: nn.Module, inputs: Inputs) -> dict[str, Any]:
    batch_size, batch = inputs.batch_size, torch.export.Dim("batch", min=1)

    def spec(leaf: Any) -> dict[int, Any] | None:
        carries_batch = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch_size
        return {0: batch} if carries_batch else None

    bound = inspect.signature(network.forward).bind(*inputs.args, **inputs.kwargs)
    return {name: pytree.tree_map(spec, value) for name, value in bound.arguments.items()}
