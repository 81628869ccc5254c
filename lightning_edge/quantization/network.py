"""The quantized graph inside the user's module: attach it, detach it, find it.

The module keeps its tree, parameters and state_dict keys; its calls go to the graph, whose attributes are the module's
own submodules, and one child named `CHILD` holds what the graph adds: fake-quantizers, dropouts, live BatchNorms.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import GraphModule, Node

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.quantization.capture.calls import CallShape
from lightning_edge.quantization.capture.graph import FoldedBatchNorm, TakenOut, capture
from lightning_edge.quantization.plan import LinearWeights, Plan
from lightning_edge.quantization.train.layers import GraphDropout, LiveBatchNorm, RoundedBias, StopGradient
from lightning_edge.quiet import quiet_libraries
from lightning_edge.surgery import copy_of
from lightning_edge.tracing import tracing
from lightning_edge.user_warnings import warn

CHILD = "edge_quantizers"


class QuantizedForward(nn.Module):
    """What the graph adds to the user's module, and the call that runs the graph.

    Args:
        network: The module whose submodules the graph's attributes are.
        graph: The prepared graph.
        inputs: A call of the network, on the CPU.
        batch_norms: Those that became part of weights in the graph.

    Attributes:
        calibration: Samples that post-training quantization read, on the CPU; ``None`` where none are kept.
    """

    calibration: Inputs | None

    def __init__(
        self, network: nn.Module, graph: GraphModule, inputs: Inputs, batch_norms: tuple[FoldedBatchNorm, ...] = ()
    ) -> None:
        super().__init__()
        added = {
            node.target: graph.get_submodule(node.target) for node in graph.graph.nodes if node.op == "call_module"
        }
        self.added = nn.ModuleDict(added)
        roots = {node.target.split(".")[0] for node in graph.graph.nodes if node.op == "get_attr"}
        # Tensors that torch.export lifted out of forward() belong to the graph alone.
        self.constants = sorted(name for name in roots if not hasattr(network, name))
        for name in self.constants:
            self.register_buffer(name, getattr(graph, name), persistent=False)
        self.shared = sorted(roots - set(self.constants))
        self.inputs = inputs
        self.calibration = None
        self.call = CallShape(type(network), inputs)
        self.batch_norms = batch_norms
        # A tensor: a number that changes in every call would be compiled anew in every call.
        self._count = torch.zeros((), dtype=torch.int64)
        self._written_for = ""
        self._joint: list[nn.Module] = []
        # Not registered as children: the network is this module's parent, and the graph's modules are the network's.
        object.__setattr__(self, "_network", network)
        object.__setattr__(self, "_graph", graph)
        object.__setattr__(self, "_runner", None)
        owned = (GraphDropout, LiveBatchNorm)
        self._followers = [(m, network.get_submodule(m.owner)) for m in self.added.children() if isinstance(m, owned)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph with the network's present parameters and buffers.

        Raises:
            CompressionError: If the call differs from the captured one in more than its batch size.
        """
        self._count.add_(1)
        args, kwargs = self.call.arrange(args, kwargs)
        graph: Any = self._graph
        if self._runner is None or self._written_for != graph._code:
            self._write_runner()
        self._follow_modes()
        if self._joint:
            self._begin_run()
        runner: Any = self._runner
        try:
            return runner(*args, **kwargs)
        except CompressionError as error:
            self._name_layer(error, args, kwargs)
            raise

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _name_layer(self, error: CompressionError, args: Any, kwargs: Any) -> None:
        """Raise an error about values that are not finite again, with the layer that gives them."""
        from lightning_edge.quantization.train.not_finite import explain_not_finite
        from lightning_edge.quantization.train.ranges import NotFiniteError

        if isinstance(error, NotFiniteError):
            raise NotFiniteError(explain_not_finite(self.bind(), args, kwargs)) from error

    @property
    def calls(self) -> int:
        """How often the graph was run."""
        return int(self._count)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _write_runner(self) -> None:
        """Write the graph that is run from the prepared one: at first, and whenever that changed."""
        from lightning_edge.quantization.train.fused import fuse

        graph: GraphModule = self._graph  # type: ignore[assignment]
        runner = fuse(self._network, self, self.bind(), self.batch_norms)  # type: ignore[arg-type]
        object.__setattr__(self, "_runner", runner)
        self._written_for = graph._code
        self._joint = [module for module in self.fake_quantizers() if getattr(module, "joint", False)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin_run(self) -> None:
        for module in self._joint:
            module.begin_run()  # type: ignore[operator]

    def _follow_modes(self) -> None:
        """Give dropouts and BatchNorms the mode of the user's own: what the user froze stays frozen."""
        for module, owner in self._followers:
            if module.training != owner.training:
                module.training = owner.training

    def bind(self) -> GraphModule:
        """Point the graph's attributes at the network's; a deep copy or a move to a device lets go of them."""
        graph: GraphModule = self._graph  # type: ignore[assignment]
        for names, owner in ((self.shared, self._network), (self.constants, self)):
            for name in names:
                for table in ("_modules", "_parameters", "_buffers"):
                    entries = getattr(owner, table)
                    if name in entries:
                        getattr(graph, table)[name] = entries[name]
        for name, module in self.added.items():
            graph._modules[name] = module
        return graph

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedForward:
        """Copy attribute by attribute, as any object without ``__reduce_ex__`` is copied."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        state = {**self.__dict__, "_runner": None}  # written anew for the copy's own network
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in state.items()})
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled.

        Raises:
            CompressionError: Always: a graph is captured from code, which no pickle holds.
        """
        raise CompressionError(
            f"the quantized {self.call.network.__name__} cannot be pickled, nor saved as a whole with torch.save. Save "
            "a checkpoint (trainer.save_checkpoint) and load it with lightning_edge.load_compressed, or save the float "
            "network: lightning_edge.quantization.float_copy(module)."
        )

    def fake_quantizers(self) -> Iterator[nn.Module]:
        """Every fake-quantizer, once."""
        return (module for module in self.added.children() if hasattr(module, "observing"))

    def live_batch_norms(self) -> list[LiveBatchNorm]:
        """The BatchNorms whose statistics still learn."""
        return [m for m in self.added.children() if isinstance(m, LiveBatchNorm) and not m.folded]

    def freeze_observers(self) -> None:
        """Let no range move from here on."""
        for module in self.fake_quantizers():
            module.disable_observer()  # type: ignore[operator]

    @property
    def frozen(self) -> bool:
        """Whether no range moves any more."""
        return not any(module.observing for module in self.fake_quantizers())

    def fold_batch_norms(self) -> None:
        """Let every BatchNorm use its running statistics from here on."""
        for module in self.live_batch_norms():
            module.folded = True
        self._write_runner()


def attach(
    network: nn.Module,
    inputs: Inputs,
    *,
    averaging: float | None = 0.01,
    live_batch_norm: bool = False,
    plan: Plan | None = None,
    written_out: bool = True,
    recurrent: bool = True,
    linear_weights: LinearWeights = "per_channel",
) -> QuantizedForward:
    """Quantize ``network`` in place: from here on its calls go through fake-quantizers.

    Args:
        network: A float network. Parameters, buffers and tree stay as they are.
        inputs: One call of it, on the network's device.
        averaging: Weight of the newest batch in the moving average of activation ranges; ``None`` for post-training
            quantization, which searches the range of least error over all batches.
        live_batch_norm: Let BatchNorm's statistics learn on, until `QuantizedForward.fold_batch_norms`.
        plan: Which layers become something else than int8; see `lightning_edge.quantization.plan`.
        written_out: Whether activations are written in operations that every target has in int8, where the plan has
            no 16-bit activations; False for a checkpoint from before that was done, whose quantizers are those of the
            whole operations.
        recurrent: Whether GRUs and LSTMs are written out step by step, under the same condition; False for a
            checkpoint from before that was done.
        linear_weights: Whether the weight of a linear layer has a scale for each output or one for all.

    Returns:
        The child that was added; its ranges are empty until the network runs in training mode.

    Raises:
        CompressionError: If the network is quantized already, cannot be captured, or has nothing to quantize.
    """
    quiet_libraries()  # before torchao is imported

    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    from lightning_edge.quantization.train.quantizer import EdgeQuantizer

    if is_quantized(network):
        raise CompressionError(f"{type(network).__name__} is quantized already; detach() gives the float network back.")
    _tell_of_hooks(network)
    # LiteRT's converter has no 16-bit constants in sums and products.
    narrow = "int8_a16" not in (plan or {}).values()
    quantizer = EdgeQuantizer(averaging, plan, linear_weights)
    with tracing():
        steps = plan or {} if recurrent and narrow else None
        trained = averaging is not None
        captured = capture(
            network, inputs, written_out=written_out and narrow, trained=trained, steps_written_out=steps
        )
        with quiet_torchao(), torch.random.fork_rng(devices=[]):  # torchao draws random numbers
            graph = prepare_qat_pt2e(captured.graph, quantizer)
    if not quantizer.quantized:
        raise CompressionError(
            f"{type(network).__name__} has no operation that can run in int8; its graph: "
            f"{sorted({str(node.target) for node in graph.graph.nodes if node.op == 'call_function'})}."
        )
    _round_biases(graph)
    _put_back(graph, captured.taken_out)
    if live_batch_norm:
        _put_back_batch_norms(network, graph, captured.batch_norms)
    graph.graph.lint()
    graph.recompile()
    example = inputs.map(lambda tensor: tensor.detach().cpu()).sample(size=2)
    child = QuantizedForward(network, graph, example, captured.batch_norms)
    device = next((tensor.device for tensor in inputs.tensors), torch.device("cpu"))
    network.add_module(CHILD, child.to(device))
    child.train(network.training)
    child._write_runner()
    network.forward = child.forward
    return child


def detach(network: nn.Module) -> None:
    """Give the float network back, in place; its parameters are as they are now."""
    if is_quantized(network):
        del network._modules[CHILD]
        del network.__dict__["forward"]


def is_quantized(network: nn.Module) -> bool:
    """Whether the calls of this module go through a quantized graph."""
    return CHILD in network._modules


def quantized_forward(module: nn.Module) -> tuple[nn.Module, QuantizedForward]:
    """Find the quantized network in ``module`` (itself or a submodule), and what was attached to it.

    Raises:
        CompressionError: If there is none.
    """
    for network in module.modules():
        child = network._modules.get(CHILD)
        if isinstance(child, QuantizedForward):
            return network, child
    raise CompressionError(
        f"{type(module).__name__} holds no quantized network. Train it with "
        "EdgeCompressionCallback([Quantize(...)]) or calibrate it with lightning_edge.quantize(model, batches)."
    )


def float_copy(module: nn.Module) -> nn.Module:
    """Copy ``module`` with its present weights and without quantizers.

    Raises:
        CompressionError: If something it holds cannot be copied.
    """
    with quiet_torchao():
        copied = copy_of(module)
    for network in copied.modules():
        detach(network)
    return copied


def _tell_of_hooks(network: nn.Module) -> None:
    """Warn of forward hooks inside the network: a graph has no submodule calls that they could follow."""
    hooked = [
        name
        for name, module in network.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # Those that compute weights (weight_norm, spectral_norm) are captured with the network.
        if module is not network and not type(hook).__module__.startswith("torch.nn.utils")
    ]
    if hooked:
        names = ", ".join(sorted(set(hooked)))
        warn(
            f"Forward hooks inside {type(network).__name__} ({names}) do not run from here on: a quantized network is "
            "called as one graph. Return what they collect from forward() instead."
        )


def _round_biases(graph: GraphModule) -> None:
    from lightning_edge.quantization.train.quantizer import WEIGHTED

    layers = [node for node in graph.graph.nodes if node.target in WEIGHTED and len(node.args) > 2]
    rounded: dict[tuple[Any, ...], Node] = {}  # steps of a recurrent layer share their bias and its quantizers
    for index, layer in enumerate(layer for layer in layers if layer.args[2] is not None):
        sources = layer.args[:2]
        if all(node.op == "call_module" for node in sources):
            parts = [graph.get_submodule(str(node.target)) for node in sources]
            key = (layer.args[2], *parts)
            if key not in rounded:
                name = f"rounded_bias_{index}"
                graph.add_module(name, RoundedBias(*parts))
                with graph.graph.inserting_before(layer):
                    rounded[key] = graph.graph.call_module(name, (layer.args[2],))
            layer.update_arg(2, rounded[key])


def _put_back(graph: GraphModule, taken_out: tuple[TakenOut, ...]) -> None:
    nodes = {node.name: node for node in graph.graph.nodes}
    for index, taken in enumerate(taken_out):
        readers = [nodes[name] for name in taken.readers if name in nodes]
        if taken.probability == 0 or not readers:
            continue
        # What the readers have now: the source, or the quantizer that was put behind it. Where some read the one and
        # some the other, each is dropped by itself.
        source = nodes[taken.source]
        lasts = {arg for reader in readers for arg in reader.all_input_nodes if _origin(graph, arg) is source}
        for number, last in enumerate(sorted(lasts, key=lambda node: node.name)):
            module: nn.Module = StopGradient()
            if taken.probability is not None:
                module = GraphDropout(taken.operator, taken.probability, taken.owner)
            name = f"taken_out_{index}_{number}"
            graph.add_module(name, module)
            with graph.graph.inserting_after(last):
                put_back = graph.graph.call_module(name, (last,))
            for reader in readers:
                reader.replace_input_with(last, put_back)


def _origin(graph: GraphModule, node: Node) -> Node:
    """The node whose value this one passes on, through quantizers and what was put back."""
    while node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if not (hasattr(module, "observing") or isinstance(module, GraphDropout | StopGradient)):
            break
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    return node


def _put_back_batch_norms(network: nn.Module, graph: GraphModule, batch_norms: tuple[FoldedBatchNorm, ...]) -> None:
    nodes = {node.name: node for node in graph.graph.nodes}
    for index, folded in enumerate(batch_norms):
        original = network.get_submodule(folded.name)
        if original.training and original.momentum is None:
            raise CompressionError(
                f"{folded.name} has momentum=None, an average over all batches, which cannot be continued in a graph. "
                "Give it a momentum, or fold BatchNorm at the start of quantization (fold_batch_norm=None)."
            )
        layer = nodes[folded.layer]
        name = f"batch_norm_{index}"
        graph.add_module(name, LiveBatchNorm(folded.momentum, folded.eps, folded.name))
        names = (folded.layer_bias, folded.gamma, folded.beta, folded.mean, folded.variance)
        parts = (nodes[folded.scale], layer.args[2], *(nodes.get(part or "") for part in names))
        layer.args = (*layer.args[:2], None, *layer.args[3:])
        with graph.graph.inserting_after(layer):
            normalized = graph.graph.call_module(name, (layer, *parts))
        layer.replace_all_uses_with(normalized, delete_user_cb=lambda user, keep=normalized: user is not keep)


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Hide what torchao and copies of graphs warn of their own calls of torch; what concerns the user we tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
