"""Quantize: int8 quantization-aware training as a phase. Knows when; `quantization.network` knows how."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_edge.network import Inputs
from lightning_edge.quantization.choose.mixed import least_lossy
from lightning_edge.quantization.network import attach, detach, is_quantized, quantized_forward
from lightning_edge.quantization.plan import (
    LinearWeights,
    PlanWord,
    check_linear_weights,
    check_patterns,
    check_plan,
    check_word,
)
from lightning_edge.quantization.post_training import calibrate
from lightning_edge.quantization.trial import try_out
from lightning_edge.schedule import Batch, Change, Clock, Moment, Phase, check_moment, check_order
from lightning_edge.succession import Succession


class Quantize(Phase):
    """Train on with int8 weights and activations, from ``start`` on.

    Weights are symmetric with one scale per output channel, of linear layers as ``linear_weights`` says, activations
    affine with one scale per tensor: the scheme that ExecuTorch (XNNPACK), Core ML and LiteRT all accept (Jacob et al.
    2018, arXiv:1712.05877).

    Moments are epochs (whole numbers from 0) or fractions of training (0.0 to 1.0). What comes later is tried on a copy
    with the first batch, so that a network that cannot be quantized ends the training there.

    Args:
        start: When fake-quantizers go in.
        freeze_observers: When the ranges stop moving; ``None``: halfway between ``start`` and the end of training, or
            one epoch after ``start`` where the length of training is not known.
        fold_batch_norm: When BatchNorm stops learning statistics and becomes a constant part of the weights;
            ``None``: at ``start``, which costs about as much as float training.
        averaging: Weight of the newest batch in the moving average of activation ranges, above 0 and up to 1.
        skip: Patterns of module names (fnmatch) that stay float: a layer, or a module with everything inside it.
        precisions: Pattern of module names -> ``"int8"``, ``"int8_a16"`` (int8 weights, 16-bit activations; LiteRT
            only) or ``"float"``; the last pattern that matches decides, what none matches is int8. `mixed_plan`
            makes one. Or a word: ``"int8"`` for all layers, as ``None``; ``"mixed"`` to choose at ``start``, on the
            batch at hand, see `least_lossy`.
        linear_weights: ``"per_channel"``, a scale for each output of a linear layer, or ``"per_tensor"``, one for
            all of them: smaller files, and coarser weights where outputs differ in range. Convolutions keep theirs.

    Raises:
        ValueError: If a moment is none, comes before ``start``, ``averaging`` is out of range, or ``skip``,
            ``precisions`` or ``linear_weights`` is not of that form.
    """

    name = "quantize"

    def __init__(
        self,
        start: int | float = 0.7,
        freeze_observers: int | float | None = None,
        fold_batch_norm: int | float | None = None,
        averaging: float = 0.01,
        skip: list[str] | None = None,
        precisions: dict[str, str] | PlanWord | None = None,
        linear_weights: LinearWeights = "per_channel",
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
        self.skip = skip
        self.precisions = precisions
        self._layers = check_plan(check_word(precisions), skip)
        self.linear_weights = check_linear_weights(linear_weights)
        self._tried: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is found again."""
        return {**vars(self), "_tried": None}

    def settings(self) -> dict[str, Any]:
        """Give the settings as plain values; of ``linear_weights`` only what checkpoints of earlier versions lack."""
        settings = super().settings()
        if self.linear_weights == "per_channel":
            del settings["linear_weights"]
        return settings

    def first_moment(self) -> Moment:
        """When fake-quantizers go in."""
        return self.start

    def last_moment(self) -> Moment:
        """When the ranges stop moving, or BatchNorm is folded, whichever is given and later."""
        given = [moment for moment in (self.freeze_observers, self.fold_batch_norm) if type(moment) is type(self.start)]
        return max([self.start, *(moment for moment in given if moment is not None)])

    def plan(self, network: nn.Module, clock: Clock, changes: Sequence[Change], batch: Batch) -> Change | None:
        """Quantize at ``start``, then fold BatchNorm and freeze the ranges when their moment comes.

        Before ``start`` it is tried once, on a copy with the first batch.

        Raises:
            CompressionError: As `lightning_edge.quantization.trial.try_out` does, or if a pattern names nothing.
        """
        done = {change["kind"]: change for change in changes}
        if "attach" not in done:
            # At the first batch, not when training is nearly over.
            names = (*dict(network.named_modules()), *dict(network.named_parameters()))
            check_patterns(self._layers, names, type(network).__name__)
            if clock.reached(self.start):
                return self._attach(network, clock, batch.inputs())
            self._try_once(network, batch)
            return None
        begun = done["attach"]
        fold = "fold_batch_norm" not in done and begun["live_batch_norm"]
        if fold and self.fold_batch_norm is not None and clock.reached(self.fold_batch_norm):
            return {"kind": "fold_batch_norm"}
        if "freeze_observers" not in done and self._freezes(clock, begun):
            return {"kind": "freeze_observers"}
        return None

    @classmethod
    def perform(cls, network: nn.Module, change: Change) -> Succession:
        """Make a change; no parameter is touched. The ranges themselves are in the state_dict."""
        if change["kind"] == "attach":
            device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
            inputs = Inputs(tuple(change["args"]), change["kwargs"]).map(lambda tensor: tensor.to(device))
            attach(
                network,
                inputs,
                averaging=change["averaging"],
                live_batch_norm=change["live_batch_norm"],
                plan=change.get("layers", {}),
                linear_weights=change.get("linear_weights", "per_channel"),
                # Not in checkpoints of earlier versions, whose ranges are those of the operations as they were.
                written_out=change.get("written_out", False),
                recurrent=change.get("recurrent", False),
            )
            return Succession()
        _, child = quantized_forward(network)
        if change["kind"] == "fold_batch_norm":
            child.fold_batch_norms()
        else:
            child.freeze_observers()
        return Succession()

    @classmethod
    def undo(cls, network: nn.Module, change: Change) -> None:
        """Give the float network back, whichever of the changes is undone."""
        detach(network)

    def ends_float_training(self, network: nn.Module) -> bool:
        """Say whether quantization begins with the next change."""
        return not is_quantized(network)

    def prime(self, network: nn.Module, change: Change, batch: Batch) -> None:
        """Let the batch at hand give the first ranges."""
        if change["kind"] == "attach":
            inputs = batch.inputs()
            quantized_forward(network)[1].inputs = inputs.map(lambda tensor: tensor.detach().cpu()).sample(size=2)
            calibrate(network, inputs)

    def describe(self, change: Change) -> str:
        """Say in one line what a change did."""
        if change["kind"] == "attach":
            norm = "BatchNorm still learning" if change["live_batch_norm"] else "BatchNorm folded into the weights"
            others = "".join(
                f", {precision}: {', '.join(pattern for pattern, word in layers.items() if word == precision)}"
                for layers in [change.get("layers", {})]
                for precision in dict.fromkeys(layers.values())
                if precision != "int8"
            )
            if change.get("linear_weights") == "per_tensor":
                others += ", one scale for each linear layer's weight"
            return f"int8 fake-quantizers on weights and activations, {norm}{others}"
        return {"freeze_observers": "ranges frozen", "fold_batch_norm": "BatchNorm statistics frozen and folded"}[
            change["kind"]
        ]

    def _try_once(self, network: nn.Module, batch: Batch) -> None:
        if self._tried is None or self._tried() is not network:
            try_out(network, batch.inputs(), self._layers, self.linear_weights)
            self._tried = weakref.ref(network)

    def _attach(self, network: nn.Module, clock: Clock, inputs: Inputs) -> Change:
        # What is skipped has the last word, and takes no part in the choice.
        chosen = least_lossy(network, inputs, self._layers) if self.precisions == "mixed" else {}
        # Shapes and types are all that a repetition needs of the inputs; the user's data stays out of checkpoints.
        shapes = inputs.map(lambda tensor: torch.zeros_like(tensor, device="cpu")).sample(size=2)
        return {
            "kind": "attach",
            "epoch": clock.epoch,
            "progress": clock.progress,
            "averaging": self.averaging,
            "written_out": True,
            "recurrent": True,
            "layers": {**chosen, **self._layers},
            "linear_weights": self.linear_weights,
            "live_batch_norm": self.fold_batch_norm is not None and not clock.reached(self.fold_batch_norm),
            "args": list(shapes.args),
            "kwargs": dict(shapes.kwargs),
        }

    def _freezes(self, clock: Clock, begun: Change) -> bool:
        if self.freeze_observers is not None:
            return clock.reached(self.freeze_observers)
        if clock.progress is None or begun["progress"] is None:
            return bool(clock.epoch > begun["epoch"])
        return bool(clock.progress >= (begun["progress"] + 1) / 2)


def as_trained(changes: Iterable[Change]) -> dict[str, Any]:
    """Give the arguments of `quantize` by which it does after training what was done in it: the same layers in int8.

    Args:
        changes: What was done to a network, with the ``phase`` of each change; empty if that was never quantized.
    """
    for change in changes:
        if change["phase"] == Quantize.name and change["kind"] == "attach":
            # Checkpoints of earlier versions lack the one or the other.
            scales = change.get("linear_weights", "per_channel")
            return {"precisions": change.get("layers") or None, "linear_weights": scales}
    return {}
