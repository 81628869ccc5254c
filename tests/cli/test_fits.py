"""`lightning-edge fits`: what is needed beside what there is, what is lacking, and the status."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from deployables import batches, network

from lightning_edge.boards import read_board
from lightning_edge.cli import fits
from lightning_edge.errors import ExportError
from lightning_edge.exporters import export
from lightning_edge.exporters.micro.operators import METHODS
from lightning_edge.reporting import needs
from lightning_edge.reporting.budget import Excess

pytest.importorskip("litert_torch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 file, written once."""
    path = tmp_path_factory.mktemp("model") / "net.tflite"
    export(network("pooled", "int8"), "tflite", path, batches=batches("pooled"))
    return path


def test_a_file_that_fits(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fits.main([str(model), "--device", "stm32l4r5"]) == 0
    told = capsys.readouterr().out
    assert f"{model.stat().st_size:,} bytes" in told
    assert "2,097,152 bytes" in told
    assert told.endswith("It fits.\n")


def test_what_a_file_needs(model: Path) -> None:
    found = needs.needs_of(model, read_board("nrf5340"))
    assert found.size_bytes == model.stat().st_size
    assert found.weight_bytes == 2 * 8 * 9 + 8 * 3
    assert found.macs == 5 * 4 * 2 * 8 * 9 + 8 * 3
    assert found.lacking == ()
    assert found.arena_bytes is not None
    assert found.fits


def test_by_how_much_it_must_shrink(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(read_board("nrf5340"), arena_bytes=400)
    monkeypatch.setattr(fits, "read_board", lambda name: small)
    monkeypatch.setattr("lightning_edge.reporting.budget.read_board", lambda name: small)
    assert fits.main([str(model), "--device", "nrf5340"]) == 3
    found = needs.needs_of(model, small)
    assert found.verdict.exceeded == (Excess("arena_bytes", 400, found.arena_bytes or 0),)
    told = " ".join(capsys.readouterr().out.split())
    assert f"above 400; it must shrink by {1 - 400 / (found.arena_bytes or 0):.0%}" in told
    assert told.endswith("It does not fit.")


def test_operations_that_the_runtime_lacks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "METHODS", {name: method for name, method in METHODS.items() if name != "CONV_2D"})
    found = needs.needs_of(model, read_board("nrf5340"))
    assert found.lacking == ("TensorFlow Lite Micro has no kernel for CONV_2D",)
    assert not found.fits
    # Another runtime has one.
    assert needs.needs_of(model, read_board("raspberry-pi-5")).fits


def test_a_format_that_the_board_does_not_run_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="iphone runs files of coreml, executorch, and this is one of tflite"):
        needs.needs_of(model, read_board("iphone"))
    assert fits.main([str(tmp_path / "none.tflite"), "--device", "coral"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_a_recipe_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fits.main(["recipe:quickstart", "--device", "stm32l4r5"]) == 0
    told = capsys.readouterr().out
    assert "5,696 bytes" in told
    assert "without training" in told
    assert list(tmp_path.iterdir()) == []
