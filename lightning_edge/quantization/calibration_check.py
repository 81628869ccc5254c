"""Do the calibration batches stand for what the network will be fed?

The ranges of activations that calibration or training left are held against those on other data. What lies outside a
range is clipped; a range that is hardly used leaves few of the 256 steps to what comes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lightning_edge.network import fed
from lightning_edge.quantization.network import quantized_forward
from lightning_edge.quantization.plan import node_names
from lightning_edge.surgery import in_mode
from lightning_edge.user_warnings import EdgeWarning, warn
from lightning_edge.wording import counted

_TOLD = 8


class CalibrationWarning(EdgeWarning):
    """Calibration batches and validation data differ."""


@dataclass(frozen=True)
class CalibrationFinding:
    """One quantized activation whose range does not fit the data.

    Attributes:
        layer: Name of the module whose output (or the network's input, ``"input"``) it is; of the operation where it
            has none.
        clipped: Share of the values outside the range, 0 to 1.
        used: Range of the values over the quantizer's range; above 1 where it is wider.
        calibrated: The quantizer's range, smallest and largest real value.
        observed: Smallest and largest value on the data.
    """

    layer: str
    clipped: float
    used: float
    calibrated: tuple[float, float]
    observed: tuple[float, float]

    def __str__(self) -> str:
        """Say it in one line."""
        calibrated, observed = (f"{low:.4g} to {high:.4g}" for low, high in (self.calibrated, self.observed))
        fault = f"{self.clipped:.1%} of the values are clipped, {self.used:.0%} of the range is used"
        return f"{self.layer}: calibrated for {calibrated}, given {observed}: {fault}"


def check_calibration(
    quantized: nn.Module,
    validation_batches: Iterable[Any],
    *,
    max_clipped: float = 0.02,
    min_used: float = 0.25,
    max_used: float = 2.0,
) -> list[CalibrationFinding]:
    """Hold the ranges of a quantized network against what it is fed in validation.

    Args:
        quantized: What `quantize` returned, or a module during or after quantization-aware training.
        validation_batches: What the network is fed there, each as `Inputs.of` reads it; its float inputs before any
            quantizer.
        max_clipped: Largest share of an activation's values that may lie outside its range; the ranges of
            `quantize` leave out some outliers on purpose.
        min_used: Smallest part of a range that the values may span.
        max_used: Largest multiple of a range that they may span, however few lie outside it.

    Returns:
        One finding for each activation that lies outside these limits, the worst first; none where all fit.

    Raises:
        CompressionError: If nothing in ``quantized`` is quantized.
        ValueError: If there is no batch, or a limit is no share.
    """
    for name, limit in (("max_clipped", max_clipped), ("min_used", min_used)):
        if not 0 <= limit <= 1:
            raise ValueError(f"{name}={limit!r} is not allowed; give a share from 0 to 1")
    if not max_used >= 1:
        raise ValueError(f"max_used={max_used!r} is not allowed; give a multiple of the range, 1 or more")
    network, child = quantized_forward(quantized)
    graph = child.bind()
    seen = {name: _Seen(module, layer) for name, (module, layer) in _activation_quantizers(graph).items()}
    hooks = [record.quantizer.register_forward_pre_hook(record.take) for record in seen.values()]
    batches = 0
    try:
        with torch.no_grad(), in_mode(network, training=False):
            for batch in validation_batches:
                call = fed(network, batch)
                inputs = child.call.match(call.args, dict(call.kwargs))
                graph(*inputs.args, **inputs.kwargs)
                batches += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not batches:
        raise ValueError("validation_batches is empty; give at least one batch of what the network is fed")
    found = [finding for record in seen.values() if record.count for finding in [record.finding()]]
    found = [finding for finding in found if finding.clipped > max_clipped or not min_used <= finding.used <= max_used]
    return sorted(found, key=lambda finding: (-finding.clipped, finding.used))


class _Seen:
    """What one quantizer was given."""

    def __init__(self, quantizer: Any, layer: str) -> None:
        self.quantizer = quantizer
        self.layer = layer
        scale, zero_point = float(quantizer.scale), int(quantizer.zero_point)
        self.low, self.high = ((end - zero_point) * scale for end in (quantizer.quant_min, quantizer.quant_max))
        self.half_step = scale / 2
        self.count = self.outside = 0
        self.smallest, self.largest = float("inf"), -float("inf")

    def take(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Count what the quantizer is about to round."""
        x = args[0].detach()
        self.count += x.numel()
        self.outside += int(((x < self.low - self.half_step) | (x > self.high + self.half_step)).sum())
        if x.numel():
            self.smallest, self.largest = min(self.smallest, float(x.min())), max(self.largest, float(x.max()))

    def finding(self) -> CalibrationFinding:
        """Sum up."""
        # Zero is in every range, so that it is a value of its own in int8.
        spanned = max(self.largest, 0.0) - min(self.smallest, 0.0)
        return CalibrationFinding(
            layer=self.layer,
            clipped=self.outside / self.count,
            used=spanned / (self.high - self.low),
            calibrated=(self.low, self.high),
            observed=(self.smallest, self.largest),
        )


def _activation_quantizers(graph: GraphModule) -> dict[int, tuple[nn.Module, str]]:
    """Find the quantizers of activations whose range was observed, each once, and name what they quantize."""
    from lightning_edge.quantization.train.quantizer import fed_nodes

    found: dict[int, tuple[nn.Module, str]] = {}
    fed = fed_nodes(graph)
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        observer = getattr(module, "activation_post_process", None)
        if module is not None and node in fed and hasattr(module, "observing") and hasattr(observer, "min_val"):
            found.setdefault(id(module), (module, _name(graph, node)))
    return found


def _name(graph: GraphModule, node: Node) -> str:
    source = node.args[0]
    while isinstance(source, Node) and source.op == "call_module":
        source = source.args[0]
    assert isinstance(source, Node)
    if source.op == "placeholder":
        return f"input {source.name}"
    names = node_names(source)
    return names[-1] if names else str(source.name)


def in_words(findings: list[CalibrationFinding]) -> str:
    """Say what was found, and what to do."""
    lines = "\n".join(f"  {finding}" for finding in findings[:_TOLD])
    more = f"\n  and {len(findings) - _TOLD} more" if len(findings) > _TOLD else ""
    return (
        f"The calibration batches do not stand for the validation data in {counted(len(findings), 'activation')}:\n"
        f"{lines}{more}\nCalibrate with batches drawn as the validation data is (same preprocessing, all classes, "
        "some hundred samples), or keep these layers in float with skip=[...]."
    )


def warn_of(findings: list[CalibrationFinding]) -> None:
    """Tell of findings in one warning; of none, nothing."""
    if findings:
        warn(in_words(findings), CalibrationWarning)


def open_empty_ranges(graph: GraphModule) -> None:
    """Give activations that were 0 on everything they were observed on a range of 0 to 1, and warn of them.

    Their own would have steps so small that runtimes refuse the layers around it, whose factors are then too large.

    Args:
        graph: A network's graph with quantizers, whose ranges were observed; changed in place.
    """
    observed: list[tuple[Any, str]] = [
        (module.activation_post_process, layer) for module, layer in _activation_quantizers(graph).values()
    ]
    empty = [(seen, layer) for seen, layer in observed if not (seen.min_val.any() or seen.max_val.any())]
    for seen, _ in empty:
        seen.max_val.fill_(1.0)
    names = list(dict.fromkeys(layer for _, layer in empty))
    if names:
        more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
        warn(
            f"{', '.join(names[:_TOLD])}{more} gave nothing but 0 on all data of calibration or training: the int8 "
            "range there is 0 to 1, which nothing was seen of. Give data that reaches it, look for a dead ReLU, or "
            "keep it in float with skip=[...].",
            CalibrationWarning,
        )
