"""Quantize: int8 quantization-aware training as a phase. Knows when; `quantization.network` knows how."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lightning_edge.network import Inputs
from lightning_edge.quantization.network import attach, quantized_forward
from lightning_edge.quantization.post_training import calibrate
from lightning_edge.schedule import Change, Clock, Moment, Phase, check_moment, check_order


class Quantize(Phase):
    """Train on with int8 weights and activations, from ``start`` on.

    Weights are symmetric with one scale per output channel, activations affine with one scale per tensor: the scheme
    that ExecuTorch (XNNPACK), Core ML and LiteRT all accept (Jacob et al. 2018, arXiv:1712.05877).

    Moments are epochs (whole numbers from 0) or fractions of training (0.0 to 1.0).

    Args:
        start: When fake-quantizers go in.
        freeze_observers: When the ranges stop moving; ``None``: halfway between ``start`` and the end of training, or
            one epoch after ``start`` where the length of training is not known.
        fold_batch_norm: When BatchNorm stops learning statistics and becomes a constant part of the weights;
            ``None``: at ``start``, which costs about as much as float training.
        averaging: Weight of the newest batch in the moving average of activation ranges, above 0 and up to 1.

    Raises:
        ValueError: If a moment is none, comes before ``start``, or ``averaging`` is out of range.
    """

    name = "quantize"

    def __init__(
        self,
        start: int | float = 0.7,
        freeze_observers: int | float | None = None,
        fold_batch_norm: int | float | None = None,
        averaging: float = 0.01,
    ) -> None:
        self.start = check_moment("start", start)
        for name, moment in (("freeze_observers", freeze_observers), ("fold_batch_norm", fold_batch_norm)):
            if moment is not None:
                check_order("start", start, name, check_moment(name, moment))
        self.freeze_observers = freeze_observers
        self.fold_batch_norm = fold_batch_norm
        if not 0 < averaging <= 1:
            raise ValueError(f"averaging={averaging!r} must be above 0 and at most 1")
        self.averaging = averaging

    def first_moment(self) -> Moment:
        """When fake-quantizers go in."""
        return self.start

    def apply(
        self, network: nn.Module, clock: Clock, changes: Sequence[Change], sample: Callable[[], Inputs]
    ) -> Change | None:
        """Quantize at ``start``, then fold BatchNorm and freeze the ranges when their moment comes."""
        done = {change["kind"]: change for change in changes}
        if "attach" not in done:
            return self._attach(network, clock, sample()) if clock.reached(self.start) else None
        begun = done["attach"]
        fold = "fold_batch_norm" not in done and begun["live_batch_norm"]
        if fold and self.fold_batch_norm is not None and clock.reached(self.fold_batch_norm):
            return _repeat(network, {"kind": "fold_batch_norm"})
        if "freeze_observers" not in done and self._freezes(clock, begun):
            return _repeat(network, {"kind": "freeze_observers"})
        return None

    @classmethod
    def restore(cls, network: nn.Module, change: Change) -> None:
        """Repeat a recorded change; the ranges themselves are in the state_dict."""
        _repeat(network, change)

    def describe(self, change: Change) -> str:
        """Say in one line what a change did."""
        if change["kind"] == "attach":
            norm = "BatchNorm still learning" if change["live_batch_norm"] else "BatchNorm folded into the weights"
            return f"int8 fake-quantizers on {change['quantizers']} weights and activations, {norm}"
        return {"freeze_observers": "ranges frozen", "fold_batch_norm": "BatchNorm statistics frozen and folded"}[
            change["kind"]
        ]

    def _attach(self, network: nn.Module, clock: Clock, inputs: Inputs) -> Change:
        live = self.fold_batch_norm is not None and not clock.reached(self.fold_batch_norm)
        child = attach(network, inputs, averaging=self.averaging, live_batch_norm=live)
        calibrate(network, inputs)
        # Shapes and types are all that a restore needs of the inputs; the user's data stays out of checkpoints.
        shapes = child.inputs.map(torch.zeros_like)
        return {
            "kind": "attach",
            "epoch": clock.epoch,
            "progress": clock.progress,
            "averaging": self.averaging,
            "live_batch_norm": live,
            "quantizers": sum(1 for _ in child.fake_quantizers()),
            "args": list(shapes.args),
            "kwargs": dict(shapes.kwargs),
        }

    def _freezes(self, clock: Clock, begun: Change) -> bool:
        if self.freeze_observers is not None:
            return clock.reached(self.freeze_observers)
        if clock.progress is None or begun["progress"] is None:
            return bool(clock.epoch > begun["epoch"])
        return bool(clock.progress >= (begun["progress"] + 1) / 2)


def _repeat(network: nn.Module, change: Change) -> Change:
    if change["kind"] == "attach":
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
        inputs = Inputs(tuple(change["args"]), change["kwargs"]).map(lambda tensor: tensor.to(device))
        attach(network, inputs, averaging=change["averaging"], live_batch_norm=change["live_batch_norm"])
        return change
    _, child = quantized_forward(network)
    if change["kind"] == "fold_batch_norm":
        child.fold_batch_norms()
    else:
        child.freeze_observers()
    return change
