"""How much each layer costs when it alone is quantized.

The measure is that of Dong et al. 2019 (HAWQ, arXiv:1905.03696) taken literally: instead of the Hessian's estimate of
how the loss would grow, the loss itself, with one layer quantized and all others float.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs, fed, flatten_outputs
from lightning_edge.quantization.choose.bar_chart import bar_chart
from lightning_edge.quantization.network import attach, float_copy
from lightning_edge.quantization.plan import layer_name
from lightning_edge.quantization.post_training import calibrate
from lightning_edge.quantization.train.layers import RoundedBias
from lightning_edge.wording import counted

Difference = Literal["mse", "kl"]
Loss = Difference | Callable[[Any, Any], Any]


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer costs when it alone is quantized.

    Attributes:
        name: Name of the module, or of the parameter where the network itself holds it; a pattern of a plan.
        increase: Loss with the layer's weights and the activations it is fed in int8, minus the float loss.
        increase_a16: The same with its weights in int8 alone, which is what 16-bit activations come to.
        weights: Number of values in its weights; in int8 as many bytes, in float four times as many.
    """

    name: str
    increase: float
    increase_a16: float
    weights: int


@dataclass(frozen=True)
class Sensitivities:
    """Sensitivities of all layers, the most sensitive first.

    Attributes:
        layers: One entry a layer.
        loss: What was measured: ``"mse"``, ``"kl"``, or the name of the loss function.
        baseline: Loss of the float network; 0 for ``"mse"`` and ``"kl"``, which compare with it.
        all_int8: Increase of the int8 network as a whole, with what lies between the layers (additions, averages, the
            output) in int8 as well.
        samples: Samples it was measured on.
    """

    layers: tuple[LayerSensitivity, ...]
    loss: str
    baseline: float
    all_int8: float
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """Give plain values, for JSON."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    def json(self) -> str:
        """Write as JSON; `from_dict` reads it after ``json.loads``."""
        return json.dumps(self.as_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivities:
        """Read what `as_dict` gave."""
        layers = tuple(LayerSensitivity(**layer) for layer in values["layers"])
        return cls(**{**values, "layers": layers})

    def rows(self) -> list[tuple[str, ...]]:
        """Give the table as text, its head first."""
        head = ("layer", f"increase of {self.loss}", "with 16-bit activations", "int8 weights [bytes]")
        body = [
            (layer.name, f"{layer.increase:.4g}", f"{layer.increase_a16:.4g}", f"{layer.weights}")
            for layer in self.layers
        ]
        total = ("the whole network", f"{self.all_int8:.4g}", "", str(sum(layer.weights for layer in self.layers)))
        return [head, *body, total]

    def table(self) -> str:
        """Write the table in aligned columns."""
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = (
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines) + "\n"

    def markdown(self) -> str:
        """Write the table in Markdown."""
        head, *body = self.rows()
        lines = [
            head,
            ("---", *["---:"] * (len(head) - 1)),
            *((f"`{row[0]}`", *row[1:]) for row in body[:-1]),
            body[-1],
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def svg(self) -> str:
        """Draw one bar a layer, as a whole SVG document."""
        return bar_chart(
            {layer.name: layer.increase for layer in self.layers},
            title=f"Sensitivity to int8 over {counted(self.samples, 'sample')}",
            axis=f"increase of {self.loss} with this layer alone in int8",
            rows="layer",
        )

    def __str__(self) -> str:
        """Give the table."""
        return self.table()


def sensitivity(
    model: nn.Module,
    calibration_batches: Iterable[Any],
    evaluation_batches: Iterable[Any],
    *,
    loss: Loss = "mse",
) -> Sensitivities:
    """Measure each layer's part in what quantization costs: the loss with it alone in int8, minus the float loss.

    The network is captured and calibrated once; each layer then costs two runs over the evaluation batches.

    Args:
        model: A float network; it is left as it was.
        calibration_batches: What it is fed, as for `quantize`.
        evaluation_batches: What the loss is measured on: what the network is fed, or, with a loss function, pairs of
            that and a target. Not the training data.
        loss: ``"mse"``, mean squared difference of the outputs from the float network's; ``"kl"``, Kullback-Leibler
            divergence of the softmax over the last dimension of the first output; or a function of the network's output
            and the target that gives a mean over samples.

    Raises:
        CompressionError: If the network cannot be captured or has no layer to quantize.
        ValueError: If there is no batch, or ``loss`` is not one of these.
    """
    measured = Measured(loss)
    network = float_copy(model).eval()
    child = None
    with torch.no_grad():
        for batch in calibration_batches:
            inputs = fed(network, batch)
            if child is None:
                child = attach(network, inputs, averaging=None)
            calibrate(network, inputs)
        if child is None:
            raise ValueError("calibration_batches is empty; give at least one batch of what the network is fed")
        graph = child.bind()
        gates, others = _gated(graph)
        weights = {(gate.layer, gate.quantizer): gate.weights for gate in gates if gate.on_weight}
        layers = {gate.layer: 0 for gate in gates}
        for (layer, _), size in weights.items():  # a recurrent layer has several, and many gates on each
            layers[layer] += size
        if not layers:
            raise CompressionError(f"{type(model).__name__} has no convolution or linear layer with weights to measure")

        def run(inputs: Inputs, open_gates: Iterable[_Gate]) -> Any:
            chosen = set(open_gates)
            for gate in (*gates, *others):
                gate.open = gate in chosen
            return graph(*inputs.args, **inputs.kwargs)

        candidates: dict[str, list[_Gate]] = {"": others}
        for layer in layers:
            candidates[f"{layer}\n8"] = [gate for gate in gates if gate.layer == layer]
            candidates[f"{layer}\n16"] = [gate for gate in gates if gate.layer == layer and gate.on_weight]
        for batch in evaluation_batches:
            call, target = measured.split(network, batch)
            inputs = child.call.match(call.args, dict(call.kwargs))
            expected = run(inputs, ())
            measured.begin(expected, target, inputs.batch_size)
            for name, chosen in candidates.items():
                measured.add(name, run(inputs, chosen))
    increases = measured.increases()
    found = [
        LayerSensitivity(layer, increases[f"{layer}\n8"], increases[f"{layer}\n16"], weights)
        for layer, weights in layers.items()
    ]
    found.sort(key=lambda layer: -layer.increase)
    return Sensitivities(tuple(found), measured.name, measured.baseline, increases[""], measured.samples)


class _Gate(nn.Module):
    """Quantizes what one layer is fed or weighs while it is open; else hands it on."""

    def __init__(self, quantizer: nn.Module, layer: str, on_weight: bool, weights: int) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.layer = layer
        self.on_weight = on_weight
        self.weights = weights
        self.open = False

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x``, of any shape, if open."""
        return self.quantizer(x) if self.open else x


def _gated(graph: GraphModule) -> tuple[list[_Gate], list[_Gate]]:
    """Put gates before each layer, to quantize it by itself, and others around all that the whole network quantizes."""
    from lightning_edge.quantization.train.quantizer import is_layer

    def quantizer(node: Any) -> nn.Module | None:
        module = graph.get_submodule(str(node.target)) if isinstance(node, Node) and node.op == "call_module" else None
        return module if hasattr(module, "observing") else None

    gates: list[_Gate] = []
    for node in list(graph.graph.nodes):
        if not is_layer(node):
            continue
        fed, weight = quantizer(node.args[0]), quantizer(node.args[1])
        if weight is None or not layer_name(node):
            continue
        size = int(node.args[1].args[0].meta["val"].numel())
        for position, module in enumerate((fed, weight)):
            if not isinstance(module, nn.Module):
                continue
            gate = _Gate(module, layer_name(node), position == 1, size)
            name = f"gate_{len(gates)}"
            graph.add_module(name, gate)
            with graph.graph.inserting_before(node):
                node.update_arg(position, graph.graph.call_module(name, (node.args[position],)))
            gates.append(gate)
    others = []
    for name, module in list(graph._modules.items()):  # named_children() gives a quantizer with two names once
        if module is not None and (hasattr(module, "observing") or isinstance(module, RoundedBias)):
            others.append(_Gate(module, "", False, 0))
            graph._modules[name] = others[-1]
    graph.graph.lint()
    graph.recompile()
    return gates, others


class Measured:
    """Sums of the loss, by what is quantized."""

    def __init__(self, loss: Loss) -> None:
        if not callable(loss) and loss not in get_args(Difference):
            raise ValueError(f"loss={loss!r} is not one of {get_args(Difference)}, nor a function of output and target")
        self._loss = loss
        self.name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
        self.samples = 0
        self._float = 0.0
        self._sums: dict[str, float] = {}
        self._expected: Any = None
        self._target: Any = None
        self._size = 0

    def split(self, network: nn.Module, batch: Any) -> tuple[Inputs, Any]:
        """Read a batch: what the network is fed, and the target where there is a loss function."""
        if isinstance(self._loss, str):
            return fed(network, batch), None
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                "with a loss function, each of evaluation_batches is a pair (what the network is fed, target)"
            )
        return Inputs.of(batch[0]), batch[1]

    def begin(self, expected: Any, target: Any, size: int) -> None:
        """Take the float network's output for a batch."""
        self._expected, self._target, self._size = expected, target, size
        self.samples += size
        self._float += size * self._value(expected)

    def add(self, name: str, output: Any) -> None:
        """Take the output for the same batch with something quantized."""
        self._sums[name] = self._sums.get(name, 0.0) + self._size * self._value(output)

    @property
    def baseline(self) -> float:
        """The float network's loss."""
        return self._float / self.samples

    def increases(self) -> dict[str, float]:
        """Give the loss minus the float network's, by name."""
        if not self.samples:
            raise ValueError("evaluation_batches is empty; give at least one batch to measure on")
        return {name: total / self.samples - self.baseline for name, total in self._sums.items()}

    def _value(self, output: Any) -> float:
        if callable(self._loss):
            return float(self._loss(output, self._target))
        return difference(self._loss, output, self._expected)


def difference(kind: str, output: Any, expected: Any) -> float:
    """Compare two outputs of a network.

    Args:
        kind: ``"mse"`` or ``"kl"``, as for `sensitivity`.
        output: Tensors, in whatever they are returned in.
        expected: The same of the float network.
    """
    pairs = list(zip(_floats(output), _floats(expected), strict=True))
    if kind == "kl":
        ours, theirs = (scores.log_softmax(-1) for scores in pairs[0])
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    count = sum(ours.numel() for ours, _ in pairs)
    return sum(float((ours - theirs).square().sum()) for ours, theirs in pairs) / max(1, count)


def _floats(output: Any) -> Iterator[Tensor]:
    return (tensor.detach().double() for tensor in flatten_outputs(output) if tensor.is_floating_point())
