"""What a network is fed and what an exporter is given. Knows torch only.

`Inputs` is one call's arguments; `Deployable` is a network that is finished with training: a float
network in eval mode, or a converted int8 graph, together with one sample of what it is fed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_edge.contents import Precision
from lightning_edge.interface import Interface
from lightning_edge.plain_calls import PlainCalls
from lightning_edge.quiet import without_graph_dumps
from lightning_edge.tracing import tracing


@dataclass(frozen=True)
class Inputs:
    """The positional and keyword arguments of one call of a network.

    Every tensor in them that has at least one dimension is batch first.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Inputs:
        """Read a tensor as one argument, a tuple or list as positional and a mapping as keyword arguments."""
        if isinstance(value, Inputs):
            return value
        if isinstance(value, Mapping):
            return cls(kwargs=dict(value))
        if isinstance(value, tuple | list):
            return cls(args=tuple(value))
        return cls(args=(value,))

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """Apply ``function`` to every tensor, however deep it lies in lists, tuples and dicts."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor, positional before keyword, in the order torch.export flattens them."""
        return [leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    @property
    def batch_size(self) -> int:
        """Samples in this call: the first dimension of the first tensor that has one.

        Raises:
            ValueError: If no tensor has a batch dimension.
        """
        for tensor in self.tensors:
            if tensor.dim() > 0:
                return tensor.shape[0]
        raise ValueError(f"no tensor with a batch dimension among the inputs {self!r}; give at least one")

    def repeated(self, times: int) -> Inputs:
        """Repeat a call of one sample; what carries no batch stays as it is."""
        return self.map(
            lambda tensor: tensor.repeat(times, *(1 for _ in tensor.shape[1:])) if _carries_batch(tensor) else tensor
        )

    def sample(self, start: int = 0, size: int = 1) -> Inputs:
        """Cut ``size`` samples from position ``start`` on; tensors that do not carry the batch stay whole."""
        batch = self.batch_size
        return self.map(
            lambda tensor: tensor[start : start + size] if tensor.dim() and tensor.shape[0] == batch else tensor
        )


class Deployable(nn.Module):
    """A network as an exporter takes it: done with training, and with a sample of what it is fed.

    Args:
        graph: The network. For ``int8`` a converted graph whose weights are stored as int8 constants.
        inputs: A call of the network; its first sample is kept, on the CPU.
        precision: ``"fp32"`` or ``"int8"``.
        output_scales: For ``int8``, the quantization step of each output in the order they are
            flattened, ``None`` where an output is not quantized.
        arrange: Brings a call's arguments into the form that ``graph`` was captured with, or refuses them; ``None``
            where the graph takes them as they come.
        interface: How the file is called, of a network in the form of one.

    Attributes:
        calibration: Samples that post-training quantization read, on the CPU; ``None`` where none are kept.

    Raises:
        ValueError: If ``precision`` is not one of the two.
    """

    calibration: Inputs | None = None
    _exported: torch.export.ExportedProgram | None = None

    def __init__(
        self,
        graph: nn.Module,
        inputs: Inputs,
        precision: Precision,
        output_scales: tuple[float | None, ...] = (),
        arrange: Callable[[tuple[Any, ...], dict[str, Any]], Inputs] | None = None,
        interface: Interface | None = None,
    ) -> None:
        super().__init__()
        if precision not in get_args(Precision):
            raise ValueError(f"precision={precision!r} is not one of {get_args(Precision)}")
        self.graph = graph
        self.inputs = inputs.map(lambda tensor: tensor.detach().cpu()).sample()
        self.precision: Precision = precision
        self.output_scales = output_scales
        self._arrange = arrange
        self.interface = interface or Interface()

    @classmethod
    def of_program(
        cls,
        program: torch.export.ExportedProgram,
        precision: Precision,
        output_scales: tuple[float | None, ...],
        interface: Interface,
    ) -> Deployable:
        """Give a network of what its own `program` gave, such as one that was saved; it is not exported again.

        Args:
            program: The program, with the inputs that it was exported with.
            precision: As for the class.
            output_scales: As for the class.
            interface: As for the class.

        Raises:
            ValueError: If the program was saved without its inputs.
        """
        if program.example_inputs is None:
            raise ValueError("the program holds no inputs; export it with some")
        args, kwargs = program.example_inputs
        network = cls(
            program.module(check_guards=False), Inputs(args, kwargs), precision, output_scales, interface=interface
        )
        network._exported = program
        return network

    def arranged(self, inputs: Inputs) -> Inputs:
        """Give a call in the form the network was captured with: the same arguments by position and by keyword."""
        return inputs if self._arrange is None else self._arrange(inputs.args, dict(inputs.kwargs))

    def with_graph(self, graph: nn.Module) -> Deployable:
        """Return the same network with another graph."""
        return Deployable(graph, self.inputs, self.precision, self.output_scales, self._arrange, self.interface)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; shapes and structure are those of the network it was made from."""
        inputs = self.arranged(Inputs(args, kwargs))
        return self.graph(*inputs.args, **inputs.kwargs)

    def program(self) -> torch.export.ExportedProgram:
        """Export for a batch of one, or for as many as the interface says: the form every target takes.

        Raises:
            ValueError: If the interface asks for several samples in a call, and an output is not one for each.
        """
        if self._exported is not None:
            return self._exported
        with tracing(), torch.no_grad(), PlainCalls(), without_graph_dumps():
            if self.interface.max_batch > 1:
                return _without_aliases(_for_any_batch(self.graph, self.inputs, self.interface.max_batch))
            program = torch.export.export(self.graph, self.inputs.args, dict(self.inputs.kwargs), strict=False)
            return _without_aliases(program)

    def output_names(self) -> list[str]:
        """Names of the flattened outputs: those of its interface, else the keys of a dict or ``output_<i>``."""
        if self.interface.outputs:
            return list(self.interface.outputs)
        with torch.no_grad():
            outputs = self(*self.inputs.args, **self.inputs.kwargs)
        paths = [path for path, leaf in pytree.tree_flatten_with_path(outputs)[0] if isinstance(leaf, Tensor)]
        keys = [[str(getattr(entry, "key", getattr(entry, "idx", ""))) for entry in path] for path in paths]
        if len(keys) == 1 and not any(isinstance(entry, pytree.MappingKey) for entry in paths[0]):
            return ["output"]
        return ["_".join(part) if not part[0].isdigit() else "output_" + "_".join(part) for part in keys]


def fed(network: nn.Module, batch: Any) -> Inputs:
    """Read a batch as one call of a network; of ``(inputs, target, ...)``, as dataloaders give it, the inputs.

    The rest is left out only where ``forward`` does not take as many arguments, and takes the first by itself.

    Args:
        network: The network.
        batch: What `Inputs.of` reads.

    Raises:
        ValueError: If ``forward`` takes neither.
    """
    inputs = Inputs.of(batch)
    refused = _refused(network, inputs)
    if refused is None:
        return inputs
    if isinstance(batch, tuple | list) and batch and _refused(network, first := Inputs.of(batch[0])) is None:
        return first
    given = (
        ", ".join([*(type(arg).__name__ for arg in inputs.args), *(f"{name}=" for name in inputs.kwargs)]) or "nothing"
    )
    raise ValueError(
        f"a batch of ({given}) does not fit {type(network).__name__}.forward(): {refused}. Give each batch as the "
        "network is fed: a tensor, a tuple of positional arguments, or a dict of keyword arguments; labels that stand "
        "behind them are left out"
    )


def _refused(network: nn.Module, inputs: Inputs) -> str | None:
    """Why a network does not take as many arguments; ``None`` if it does."""
    if isinstance(network, Deployable):
        given, taken = (len(call.args) + len(call.kwargs) for call in (inputs, network.inputs))
        return f"it takes {taken} and {given} are given" if given > taken else None
    try:
        # Of the class: a quantized network's own is that of its graph, which takes anything.
        signature = inspect.signature(type(network).forward)
    except (TypeError, ValueError):  # of a network that is not written in Python
        return None
    try:
        signature.bind(network, *inputs.args, **inputs.kwargs)
    except TypeError as error:
        return str(error)
    return None


def _without_aliases(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Take out, in place, what gives a value under another name: converters do not know it, or copy the value."""
    aliases = [node for node in program.graph.nodes if node.target is torch.ops.aten.alias.default]
    inner = [node for node in aliases if all(user.op != "output" for user in node.users)]
    for node in inner:
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)
    if inner:  # writing the code of a large graph takes a while
        program.graph_module.recompile()
    return program


def _carries_batch(tensor: Tensor) -> bool:
    """Whether a tensor of a call with one sample is one for each sample."""
    return tensor.dim() > 0 and tensor.shape[0] == 1


def _for_any_batch(graph: nn.Module, inputs: Inputs, most: int) -> torch.export.ExportedProgram:
    """Export a module that takes any arguments, the first dimension of those that carry the batch being free.

    Raises:
        ValueError: If an output is not one value for each sample.
    """
    batch = torch.export.Dim("batch", min=1, max=most)

    def free(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, Tensor) and _carries_batch(leaf) else None

    args, kwargs = pytree.tree_map(free, (inputs.args, dict(inputs.kwargs)))
    # Two samples: a dimension of one is taken to be always one.
    several = inputs.repeated(2)
    program = torch.export.export(
        _Named(graph, list(kwargs)),
        several.args,
        dict(several.kwargs),
        dynamic_shapes={**({"args": args} if args else {}), **kwargs},
        strict=False,
    )
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    for place, name in enumerate(program.graph_signature.user_outputs):
        value = values.get(name)
        if isinstance(value, Tensor) and (not value.dim() or isinstance(value.shape[0], int)):
            raise ValueError(
                f"Interface(max_batch={most}): output {place} of the network has the shape {list(value.shape)} for any "
                "number of samples, and not one value for each. Give such a network one sample a call, max_batch=1"
            )
    return program


class _Named(nn.Module):
    """A module with its keyword arguments by name: torch.export fails at free dimensions in ``**kwargs``."""

    def __init__(self, graph: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.named = graph  # not "graph", which is a word of an exported module's own
        self.training = graph.training
        kind = inspect.Parameter
        named = [kind(name, kind.KEYWORD_ONLY) for name in names]

        def forward(*args: Any, **kwargs: Any) -> Any:
            return graph(*args, **kwargs)

        forward.__signature__ = inspect.Signature([kind("args", kind.VAR_POSITIONAL), *named])  # type: ignore[attr-defined]
        self.forward = forward


def flatten_outputs(outputs: Any) -> list[Tensor]:
    """Every tensor of a network's output, in the order torch.export flattens them."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def sort_keywords(inputs: Inputs) -> Inputs:
    """Put keyword arguments in the order of their names, the one order every file is written in.

    Files name their inputs by position, some of them only so; callers are free to write keywords in any order.
    """
    return Inputs(inputs.args, dict(sorted(inputs.kwargs.items())))
