"""Two gloo processes, really launched: they cut alike, observe alike, end alike, and end as one process does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import ddp_training
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_edge.callbacks import processes
from lightning_edge.errors import CompressionError
from lightning_edge.quantization import Quantize

SCRIPT = Path(ddp_training.__file__)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What this process, and each of two that are launched, ended with."""
    folder = tmp_path_factory.mktemp("ends")
    done = train(folder, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "last.ckpt").unlink()
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            ddp_training.main(folder, 1)
    finally:
        torch.set_num_threads(threads)
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


def train(folder: Path, *arguments: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_both_processes_end_with_the_same_parameters_and_ranges(ends: dict[str, Any]) -> None:
    first, second = ends["2_processes_rank_0"]["network"], ends["2_processes_rank_1"]["network"]
    assert list(first) == list(second)
    assert first["network.stem.0.weight"].shape[0] < 16
    assert any("edge_quantizers" in name for name in first)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_both_processes_end_with_the_same_optimizer_state(ends: dict[str, Any]) -> None:
    first, second = (ends[f"2_processes_rank_{rank}"]["optimizer"]["state"] for rank in (0, 1))
    assert list(first) == list(second)
    for index, state in first.items():
        assert torch.equal(state["momentum_buffer"], second[index]["momentum_buffer"])


def test_two_processes_compute_what_one_does_on_the_same_global_batch(ends: dict[str, Any]) -> None:
    one, two = ends["1_processes_rank_0"]["network"], ends["2_processes_rank_0"]["network"]
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in two.items()}
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        elif not name.endswith("zero_point"):  # a range that differs by rounding may tip a zero point
            assert torch.equal(two[name], value)
    masked = one["network.block.0.weight"] == 0
    assert masked.any()
    assert torch.equal(masked, two["network.block.0.weight"] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_other_and_the_last_checkpoint_goes_on(
    ends: dict[str, Any], tmp_path: Path, killed: int
) -> None:
    done = train(tmp_path, 2, killed)
    assert done.returncode != 0
    other = int((tmp_path / f"rank_{1 - killed}.pid").read_text())
    deadline = time.monotonic() + 60
    while is_running(other):
        assert time.monotonic() < deadline, f"rank {1 - killed} still waits for rank {killed}"
        time.sleep(0.1)
    assert not list(tmp_path.glob("*.pt"))
    done = train(tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        state = torch.load(tmp_path / f"2_processes_rank_{rank}.pt", weights_only=True)["network"]
        uninterrupted = ends[f"2_processes_rank_{rank}"]["network"]
        assert list(state) == list(uninterrupted)
        assert [name for name in state if not torch.equal(state[name], uninterrupted[name])] == []


def test_strategies_that_split_parameters_are_refused() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    processes.check_strategy(trainer)

    class Sharded(type(trainer.strategy)):  # type: ignore[misc]
        pass

    trainer.strategy.__class__ = Sharded
    with pytest.raises(CompressionError, match=r"strategy is Sharded.*strategy='ddp'"):
        processes.check_strategy(trainer)


def test_averaged_weights_are_refused_beside_int8_only() -> None:
    module = L.LightningModule()
    processes.check_company([EMAWeightAveraging()], module, [])
    with pytest.raises(CompressionError, match="EMAWeightAveraging averages every buffer"):
        processes.check_company([EMAWeightAveraging()], module, [Quantize()])
