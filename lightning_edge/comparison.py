"""How far a candidate's outputs lie from a reference's, collected batch by batch. Knows torch only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_edge.errors import AgreementError
from lightning_edge.measure import Agreement, OutputAgreement

# An output that an int8 network leaves unquantized has no step; int8 would spread 255 steps over -max..max.
_STEPS_PER_LARGEST = 127.5


# This share of an output's values may lie beyond `Tolerance.most_steps`, and of few as many more as chance brings.
_BEYOND = 1e-3
_DEVIATIONS = 3.0
# Differences are counted by size, so many sizes to each doubling.
_SIZES_PER_OCTAVE = 16
_LARGEST_OCTAVE = 100
# Differences are summed up by position for outputs of up to so many values a sample.
_POSITIONS = 2**20


class Comparison:
    """Collects how far a candidate's outputs lie from a reference's, batch by batch.

    Class scores are the first floating-point output of shape ``(batch, classes)`` with at least two classes. Where the
    reference's largest score is shared by several classes, any of them counts as the same class.

    Args:
        output_scales: Quantization step of each output; ``None`` where an int8 network leaves it unquantized, for
            which a step is the largest absolute reference value over 127.5. Empty for float networks: no steps.
        class_scores: Whether to look for class scores at all.
    """

    def __init__(self, output_scales: Sequence[float | None] = (), class_scores: bool = True) -> None:
        self._scales = list(output_scales)
        self._class_scores = class_scores
        self._outputs: list[_OutputDifference] = []
        self._samples = 0
        self._scored = 0
        self._same_class = 0

    def update(self, reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> None:
        """Add a batch of flattened outputs, each batch first.

        Raises:
            AgreementError: If the number of outputs or a shape differs.
        """
        shapes = [tuple(tensor.shape) for tensor in reference]
        given = [tuple(tensor.shape) for tensor in candidate]
        if shapes != given:
            why = (
                "The target's converter made something else of an operation. Write that in another way, or leave the "
                "target out"
                if [shape[:1] for shape in shapes] == [shape[:1] for shape in given]
                else "A file runs one sample at a time and its outputs are joined: what the network gives once for a "
                "whole batch, such as a mean over it, cannot be among its outputs"
            )
            raise AgreementError(f"the outputs have shapes {given}, those of the network it came from {shapes}. {why}")
        if self._scales and len(self._scales) != len(shapes):
            raise AgreementError(f"{len(self._scales)} output scales for {len(shapes)} outputs; give one for each")
        if not self._outputs:
            self._outputs = [_OutputDifference() for _ in shapes]
        pairs = [
            (before.detach().cpu().double(), after.detach().cpu().double())
            for before, after in zip(reference, candidate, strict=True)
        ]
        for output, (before, after) in zip(self._outputs, pairs, strict=True):
            output.update(before, after)
        self._samples += next((shape[0] for shape in shapes if shape), 1)
        if self._class_scores and (scores := class_scores(reference, candidate)) is not None:
            self._update_classes(*(tensor.detach().cpu().double() for tensor in scores))

    def _update_classes(self, before: Tensor, after: Tensor) -> None:
        chosen = before.gather(1, after.argmax(dim=1, keepdim=True)).squeeze(1)
        same = (chosen == before.amax(dim=1)) & after.isfinite().all(dim=1)
        self._same_class += int(same.sum())
        self._scored += len(before)

    def result(self) -> Agreement:
        """Sum up all batches so far.

        Raises:
            ValueError: If there was none.
        """
        if not self._samples:
            raise ValueError("nothing was compared; call update() with at least one batch")
        return Agreement(
            samples=self._samples,
            top1=self._same_class / self._scored if self._scored else None,
            outputs=tuple(
                output.result(self._scales[position : position + 1]) for position, output in enumerate(self._outputs)
            ),
        )


def class_scores(reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Find the class scores among flattened outputs of two networks, (batch, classes) each; ``None`` without any."""
    for before, after in zip(reference, candidate, strict=True):
        if before.is_floating_point() and before.dim() == 2 and before.shape[1] > 1:
            return before, after
    return None


class _OutputDifference:
    """Running sums of one output, and how many differences of which size there were."""

    def __init__(self) -> None:
        self.max_abs = 0.0
        self.sum_abs = 0.0
        self.count = 0
        self.largest = 0.0
        self.not_finite = False
        self.signal = _Variance()
        self.squares = 0.0
        # Sum of the differences at each position of a sample, and the samples; None where samples differ in shape.
        self.positions: Tensor | None = torch.zeros(())
        self.samples = 0
        # Number and largest of the differences of about one size, by the size's logarithm; not those of zero.
        self.sizes: dict[int, tuple[int, float]] = {}

    def update(self, before: Tensor, after: Tensor) -> None:
        if not before.numel():
            return
        # Equal infinities agree; anything else that is not a finite difference is infinitely far apart.
        difference = torch.where(before == after, 0.0, (after - before).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.sum_abs += float(difference.sum())
        self.squares += float(difference.square().sum())
        self.count += difference.numel()
        self.not_finite |= bool(difference.isinf().any())
        self._count_sizes(difference[difference > 0])
        self._add_positions(difference)
        finite = before[before.isfinite()]
        if finite.numel():
            self.largest = max(self.largest, float(finite.abs().max()))
            self.signal.update(finite)

    def _add_positions(self, difference: Tensor) -> None:
        samples = difference if difference.dim() else difference[None]
        total = samples.sum(0)
        known = self.positions is not None and (not self.samples or self.positions.shape == total.shape)
        self.positions = self.positions + total if known and total.numel() <= _POSITIONS else None  # type: ignore[operator]
        self.samples += len(samples)

    def _count_sizes(self, differences: Tensor) -> None:
        limit = _LARGEST_OCTAVE * _SIZES_PER_OCTAVE
        sizes = (differences.log2() * _SIZES_PER_OCTAVE).floor().clamp(-limit, limit).long()
        found, where, counts = sizes.unique(return_inverse=True, return_counts=True)
        largest = torch.zeros(len(found), dtype=differences.dtype).scatter_reduce(0, where, differences, "amax")
        for size, count, value in zip(found.tolist(), counts.tolist(), largest.tolist(), strict=True):
            before, most = self.sizes.get(size, (0, 0.0))
            self.sizes[size] = before + count, max(most, value)

    def most(self) -> float:
        """The difference that all values but those allowed to be beyond it stay within."""
        expected = _BEYOND * self.count
        left = math.floor(expected + _DEVIATIONS * math.sqrt(expected))
        for size in sorted(self.sizes, reverse=True):
            count, largest = self.sizes[size]
            if count > left:
                return largest
            left -= count
        return 0.0

    def result(self, scale: Sequence[float | None]) -> OutputAgreement:
        """Sum up, in steps of ``scale`` where there is one: empty for a float network, ``None`` without a step."""
        found = OutputAgreement(
            self.max_abs,
            _ratio(self.max_abs, self.largest),
            snr_db=self._signal_to_noise_db(),
            not_finite=self.not_finite,
        )
        if not scale:
            return found
        step = self.largest / _STEPS_PER_LARGEST if scale[0] is None else scale[0]
        mean = _ratio(self.sum_abs, step) / max(1, self.count)
        worst = None if self.positions is None else float(self.positions.max()) / max(1, self.samples)
        return replace(
            found,
            max_steps=_ratio(self.max_abs, step),
            mean_steps=mean,
            most_steps=_ratio(self.most(), step),
            worst_mean_steps=None if worst is None else _ratio(worst, step),
        )

    def _signal_to_noise_db(self) -> float | None:
        signal, noise = self.signal.result(), self.squares / max(1, self.count)
        if not signal:
            return None
        if not noise:
            return math.inf
        return -math.inf if math.isinf(noise) else 10 * math.log10(signal / noise)


class _Variance:
    """Variance of values that come batch by batch, each batch's mean taken into account.

    Source: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0

    def update(self, values: Tensor) -> None:
        """Add a batch of finite values."""
        count, mean = values.numel(), float(values.mean())
        total, apart = self.count + count, mean - self.mean
        self.squares += float((values - mean).square().sum()) + apart**2 * self.count * count / total
        self.mean += apart * count / total
        self.count = total

    def result(self) -> float:
        """Give the variance; 0 where there was no value."""
        return self.squares / max(1, self.count)


def _ratio(difference: float, unit: float) -> float:
    if difference == 0:
        return 0.0
    return difference / unit if unit else math.inf
