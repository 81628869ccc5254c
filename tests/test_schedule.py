from __future__ import annotations

import pytest

from lightning_edge.quantization import Quantize
from lightning_edge.schedule import Clock, check_moment, check_order, check_phases


@pytest.mark.parametrize("moment", [-1, 1.5, -0.1, True, "0.5", None])
def test_what_is_no_moment_is_refused_with_what_is_allowed(moment: object) -> None:
    with pytest.raises(ValueError, match=r"start=.* is not a moment of training.*whole number.*fraction"):
        check_moment("start", moment)  # type: ignore[arg-type]


def test_an_epoch_is_reached_when_it_begins() -> None:
    assert not Clock(epoch=1, progress=0.9).reached(2)
    assert Clock(epoch=2, progress=0.0).reached(2)


def test_a_fraction_is_reached_within_rounding() -> None:
    assert Clock(epoch=0, progress=0.1 + 0.2).reached(0.3)
    assert Clock(epoch=0, progress=(2 + 1 / 10) / 3).reached(0.7)
    assert not Clock(epoch=0, progress=0.29).reached(0.3)


def test_a_fraction_never_comes_where_the_length_is_not_known() -> None:
    assert not Clock(epoch=1000, progress=None).reached(0.0)


def test_moments_of_one_kind_keep_their_order() -> None:
    with pytest.raises(ValueError, match=r"freeze=2 comes before start=3"):
        check_order("start", 3, "freeze", 2)
    check_order("start", 3, "freeze", 0.5)


@pytest.mark.parametrize(
    "phases",
    [Quantize, Quantize(), [Quantize], [Quantize(), "prune"], "quantize"],
    ids=["class", "phase", "classes", "name", "text"],
)
def test_what_is_no_list_of_phases_is_refused(phases: object) -> None:
    with pytest.raises(TypeError, match=r"phases=.*uantize.* is no list of phases; give for example \[Quantize"):
        check_phases(phases)  # type: ignore[arg-type]
