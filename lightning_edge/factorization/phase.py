"""Factorize: layers of low rank as a phase. Knows when and how much; `factorization.decomposition` knows how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.factorization.decomposition import Layer, merge, numerical_rank, singular_values, split
from lightning_edge.factorization.layers import choose
from lightning_edge.factorization.trial import try_out
from lightning_edge.schedule import Batch, Change, Clock, Moment, Phase, check_moment
from lightning_edge.succession import Succession
from lightning_edge.wording import counted


class Factorize(Phase):
    """Replace linear layers and 1x1 convolutions by pairs of smaller ones, at ``start``.

    A weight of ``out x in`` becomes ``rank x in`` and ``out x rank`` by singular value decomposition (Denton et al.
    2014, arXiv:1404.0736); the layer named ``fc`` becomes ``fc.0`` and ``fc.1``. A layer whose pair would not be
    smaller is left alone. Give either ``energy`` or ``size``.

    Moments are epochs (whole numbers from 0) or fractions of training (0.0 to 1.0).

    Args:
        start: When.
        energy: Share of each weight's squared singular values to keep, above 0 and up to 1; 1.0 keeps all that are not
            rounding, so that the product equals the weight.
        size: Number of weights a pair may hold: a float below 1 as the kept fraction of its layer's, a whole number as
            it is.
        round_to: Ranks are multiples of this, as runtimes reward it: rounded up for ``energy``, down for ``size``.
        include: Patterns (`fnmatch`) of the names of layers to factorize; the output layer is one like any other.
        ignore: Patterns of the names of layers to leave alone.

    Raises:
        ValueError: If a setting is out of range, or not exactly one of ``energy`` and ``size`` is given.
    """

    name = "factorize"
    cuts_parameters = True

    def __init__(
        self,
        start: int | float = 0,
        energy: float | None = None,
        size: int | float | None = None,
        round_to: int = 8,
        include: Sequence[str] = ("*",),
        ignore: Sequence[str] = (),
    ) -> None:
        self.start = check_moment("start", start)
        if (energy is None) == (size is None):
            raise ValueError(
                f"energy={energy!r} and size={size!r}: give exactly one of them, for example energy=0.95 or size=0.5"
            )
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"energy={energy!r} must be above 0 and at most 1")
        if size is not None and (isinstance(size, bool) or not (0 < size < 1 or (isinstance(size, int) and size >= 1))):
            raise ValueError(
                f"size={size!r} is neither a fraction of each layer's weights (above 0.0 and below 1.0) nor a number "
                "of weights (a whole number from 1 on)"
            )
        if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
            raise ValueError(f"round_to={round_to!r} must be a whole number from 1 on; 1 does not round")
        for setting, patterns in (("include", include), ("ignore", ignore)):
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"{setting}={patterns!r} must be a list of patterns, for example ['head.*']")
        if not include:
            raise ValueError("include=[] names no layer; give at least one pattern, '*' for all")
        self.energy = energy
        self.size = size
        self.round_to = round_to
        self.include = include
        self.ignore = ignore

    def first_moment(self) -> Moment:
        """When the layers are replaced."""
        return self.start

    def plan(self, network: nn.Module, clock: Clock, changes: Sequence[Change], batch: Batch) -> Change | None:
        """Choose layers and ranks at ``start``, and try them on a copy.

        Raises:
            CompressionError: If no layer becomes smaller, or the network is another with the pairs in it.
        """
        if changes or not clock.reached(self.start):
            return None
        if "forward" in network.__dict__:
            raise CompressionError(
                f"the calls of {type(network).__name__} are redirected, as quantization does, and its layers are not "
                "called any more. Factorize before that."
            )
        layers, left_alone = choose(network, self.include, self.ignore)
        planned: list[dict[str, Any]] = []
        for name, layer in layers.items():
            values = singular_values(layer.weight)
            rank = self._rank(values, layer)
            before, after = layer.weight.numel(), rank * sum(layer.weight.shape[:2])
            if rank == 0:
                left_alone[name] = self._no_rank(values)
            elif after >= before:
                left_alone[name] = (
                    f"at rank {rank} the pair would hold {after:,} weights, and the layer holds {before:,}"
                )
            else:
                energy = float(values[:rank].square().sum() / values.square().sum())
                planned.append({"name": name, "rank": rank, "energy": energy, "before": before, "after": after})
        if not planned:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left_alone.items()) or "none is chosen"
            raise CompressionError(
                f"no layer of {type(network).__name__} becomes smaller with {self._amount()} and "
                f"round_to={self.round_to}: {reasons}. Keep less, or set round_to=1 for narrow layers."
            )
        error = try_out(network, {entry["name"]: entry["rank"] for entry in planned}, batch.inputs())
        return {
            "kind": "factorize",
            "epoch": clock.epoch,
            "progress": clock.progress,
            "layers": planned,
            "left_alone": left_alone,
            "output_error": error,
        }

    @classmethod
    def perform(cls, network: nn.Module, change: Change) -> Succession:
        """Replace the layers, by the singular values of the weights that the network has now."""
        return Succession(replaced=dict(split(network, entry["name"], entry["rank"]) for entry in change["layers"]))

    @classmethod
    def undo(cls, network: nn.Module, change: Change) -> None:
        """Give the single layers back, with the products of the pairs as weights."""
        for entry in reversed(change["layers"]):
            merge(network, entry["name"])

    def describe(self, change: Change) -> str:
        """Say in one line what a change did."""
        layers = change["layers"]
        before, after = (sum(entry[key] for entry in layers) for key in ("before", "after"))
        ranks = ", ".join(f"{entry['name']} to rank {entry['rank']}" for entry in layers)
        text = (
            f"{counted(len(layers), 'layer')} in pairs ({ranks}): {before:,} -> {after:,} weights, at least "
            f"{min(entry['energy'] for entry in layers):.1%} of a layer's energy kept, outputs changed by "
            f"{change['output_error']:.1%}"
        )
        if change["left_alone"]:
            text += "; left alone: " + "; ".join(f"{name}: {why}" for name, why in change["left_alone"].items())
        return text

    def figures(self, network: nn.Module, change: Change) -> dict[str, float]:
        """Give the parameters that are left."""
        return {**super().figures(network, change), "params": sum(part.numel() for part in network.parameters())}

    def _rank(self, values: Tensor, layer: Layer) -> int:
        needed = numerical_rank(values, layer.weight)
        if self.energy is not None:
            if self.energy < 1 and needed:
                kept = values.square().cumsum(0)
                needed = min(needed, int((kept < self.energy * kept[-1]).sum()) + 1)
            return min(self._rounded_up(needed), len(values))
        assert self.size is not None
        budget = self.size if isinstance(self.size, int) else int(self.size * layer.weight.numel())
        allowed = budget // sum(layer.weight.shape[:2]) // self.round_to * self.round_to
        return min(allowed, self._rounded_up(needed), len(values))

    def _rounded_up(self, rank: int) -> int:
        return -(-rank // self.round_to) * self.round_to

    def _no_rank(self, values: Tensor) -> str:
        if values[0] == 0:
            return "its weight is zero"
        return f"{self._amount()} allows no rank that is a multiple of {self.round_to}"

    def _amount(self) -> str:
        return f"energy={self.energy!r}" if self.energy is not None else f"size={self.size!r}"
