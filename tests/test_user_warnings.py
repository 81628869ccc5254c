"""Where our warnings point, and how a command prints them."""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable
from types import FunctionType

import pytest

from lightning_edge.user_warnings import EdgeWarning, print_messages_only, warn


def inside(module: str) -> Callable[..., None]:
    """A function of that module, which calls another or warns."""

    def call(function: Callable[[], None] | None = None) -> None:
        warn("it is slow") if function is None else function()

    return FunctionType(call.__code__, {"__name__": module, "warn": warn}, argdefs=call.__defaults__)


def test_a_warning_names_the_line_of_the_user_behind_ours_and_lightnings() -> None:
    with pytest.warns(EdgeWarning, match="it is slow") as caught:
        inside("lightning.pytorch.trainer")(inside("lightning_edge.exporters.pipeline"))
    assert caught[0].filename == __file__
    assert linecache.getline(__file__, caught[0].lineno).strip().startswith('inside("lightning.pytorch.trainer")(')


def test_a_command_prints_the_message_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    print_messages_only()
    assert warnings.formatwarning(EdgeWarning("it is slow"), EdgeWarning, "a.py", 1) == "warning: it is slow\n"
    assert warnings.formatwarning(UserWarning("other"), UserWarning, "a.py", 1).startswith("a.py:1: UserWarning: other")
