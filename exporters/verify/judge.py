"""The verdict on a file, from how far its outputs lay from its network's and what that does to the user's metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning_edge.contents import Precision
from lightning_edge.measure import Agreement, OutputAgreement, Tolerance
from lightning_edge.verdict import Judgement, MetricChange

# Equal but for the rounding of integers that come as floats, and of sums in float32 in another order.
_EXACT_STEPS = 1e-3
_EXACT_RELATIVE = 1e-5
# Below this ratio of signal to noise the error is a third of the signal.
_NOISE_DB = 10.0
# So much further off than what is close is no rounding, see docs/measuring.md.
_TIMES_CLOSE = 10.0
# Outputs that hardly change from sample to sample, as an untrained network's, differ by a step or two and have more
# noise than signal: from here on that counts.
_TIMES_CLOSE_TO_COUNT = 5.0
# Other classes, and by more than the last steps of scores that are nearly equal, as those of hardly trained networks.
_OTHER_CLASSES = 0.8
_OTHER_CLASSES_DB = 20.0
# An error 1.5 times that of the network's own rounding is no more than it: other values are tipped.
_OVER_OWN_DB = 20 * math.log10(1.5)


def judge(
    agreement: Agreement,
    precision: Precision,
    tolerance: Tolerance,
    *,
    names: Sequence[str] = (),
    rounding: Callable[[], Agreement] | None = None,
    change: MetricChange | None = None,
) -> Judgement:
    """Judge a file by how far it lay from its network.

    What decides is what matters to a user: the metric and the classes, then the mean and the bulk of the values. No
    limit gets stricter with the number of samples.

    Args:
        agreement: What was found.
        precision: Precision of the network.
        tolerance: What counts as close.
        names: Names of the outputs.
        rounding: Finds what an int8 network's own rounding moves its outputs by, on the same samples. It is called
            only where it can change the grade.
        change: The user's metric, if there is one that decides.
    """
    cost = [] if change is None else [str(change)]
    if any(output.not_finite for output in agreement.outputs):
        return Judgement("broken", ("values are not finite where the network's are", *cost))
    if _is_exact(agreement, precision) and agreement.top1 in (1.0, None):
        return Judgement("exact")
    violations = tolerance.violations(agreement, precision, names)
    if not violations:
        return Judgement("close", _distance(agreement))
    own = None
    if precision == "int8" and rounding is not None:
        least = tolerance.violations(agreement, precision, names, _without_limit(agreement))
        if len(least) < len(violations) or _is_something_else(agreement, tolerance):
            own = rounding()
            violations = tolerance.violations(agreement, precision, names, own)
    if own is not None and not violations:
        by = f"{own.mean_steps:.2g} on average, {own.max_steps:.3g} at most"
        as_far = f"the network's own rounding in float32 moves it as far ({by})"
        return Judgement("close", (*_distance(agreement), as_far))
    reasons = (*violations, *_noise(agreement, own), *cost)
    if change is not None and (change.kept or change.lost):
        return Judgement("broken" if change.lost else "differs", reasons)
    return Judgement("broken" if _is_something_else(agreement, tolerance, own) else "differs", reasons)


def _is_exact(agreement: Agreement, precision: Precision) -> bool:
    if precision == "int8" and agreement.max_steps is not None:
        return agreement.max_steps <= _EXACT_STEPS
    return agreement.max_relative <= _EXACT_RELATIVE


def _without_limit(agreement: Agreement) -> Agreement:
    """A rounding so large that no limit that follows it holds."""
    unbounded = OutputAgreement(mean_steps=math.inf, most_steps=math.inf, worst_mean_steps=math.inf)
    return Agreement(agreement.samples, None, (unbounded,) * len(agreement.outputs))


def _is_something_else(agreement: Agreement, tolerance: Tolerance, own: Agreement | None = None) -> bool:
    """Whether classes, noise or the mean difference lie far off, and further than the network's own rounding does."""
    if _is_beyond(_TIMES_CLOSE, agreement, tolerance, own):
        return True
    ratio = _snr_db(agreement)
    if own is not None and ratio >= _snr_db(own) - _OVER_OWN_DB:
        return False
    other_classes = agreement.top1 is not None and agreement.top1 < _OTHER_CLASSES and ratio < _OTHER_CLASSES_DB
    in_steps = any(output.mean_steps is not None for output in agreement.outputs)
    seen = not in_steps or _is_beyond(_TIMES_CLOSE_TO_COUNT, agreement, tolerance, own)
    return seen and (other_classes or ratio < _NOISE_DB)


def _is_beyond(times: float, agreement: Agreement, tolerance: Tolerance, own: Agreement | None) -> bool:
    """Whether the mean difference of an output is over so many times what is close."""
    owns = (None,) * len(agreement.outputs) if own is None else own.outputs
    return any(
        output.mean_steps is not None and output.mean_steps > times * tolerance.steps("mean_steps", of_own)
        for output, of_own in zip(agreement.outputs, owns, strict=True)
    )


def _noise(agreement: Agreement, own: Agreement | None) -> list[str]:
    ratio = _snr_db(agreement)
    by_own = "" if own is None else f" (the network's own rounding in float32: {_snr_db(own):.3g} dB)"
    return [f"signal to noise {ratio:.3g} dB{by_own}"] if ratio < _OTHER_CLASSES_DB else []


def _snr_db(agreement: Agreement) -> float:
    """That of the output with the most noise."""
    return min((output.snr_db for output in agreement.outputs if output.snr_db is not None), default=math.inf)


def _distance(agreement: Agreement) -> tuple[str, ...]:
    if agreement.mean_steps is not None:
        difference = f"{agreement.mean_steps:.2g} quantization steps off on average, {agreement.max_steps:.3g} at most"
    else:
        difference = f"{agreement.max_relative:.2g} of the largest output off at most"
    return (difference if agreement.top1 is None else f"{difference}, the same class for {agreement.top1:.2%}",)
