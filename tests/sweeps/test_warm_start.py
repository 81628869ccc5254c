"""What all trials of a sweep begin from: trained once whoever asks, and loaded before a trial's first batch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from sweep_files import CONFIG, GRID, sweep_of
from torch.utils.data import DataLoader

from lightning_edge import EdgeCompressionCallback, Prune, WarmStart
from lightning_edge.errors import RecordError, SweepError
from lightning_edge.sweeps.fit import Fit, InterruptedFitError
from lightning_edge.sweeps.objectives import TrialFailedError
from lightning_edge.sweeps.warm_start import beginning_from, common_start
from lightning_edge.zoo.networks import DigitsCNN
from lightning_edge.zoo.task import Classifier


class Training:
    """Writes what a training would, and counts how often it is asked to."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.asked = status, list[Fit]()

    def __call__(self, fit: Fit) -> int:
        self.asked.append(fit)
        threading.Event().wait(0.1)
        if self.status:
            (fit.folder / "log.txt").write_text("error: it diverged\n")
            return self.status
        saver = fit.config["trainer"]["callbacks"][-1]["init_args"]
        (Path(saver["dirpath"]) / f"{saver['filename']}.ckpt").write_text("weights")
        return 0


def test_it_is_trained_once_for_all_who_ask_without_compression_and_files(tmp_path: Path) -> None:
    training, found = Training(), list[Path]()
    # A base that keeps no checkpoints of its own: Lightning then refuses ours.
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "enable_checkpointing": False}}

    def ask() -> None:
        found.append(common_start(7, config, tmp_path, threading.Event(), lambda line: None, training))

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert found == [tmp_path / "warm-start" / "float.ckpt"] * 3
    assert found[0].read_text() == "weights"
    (fit,) = training.asked
    trainer = fit.config["trainer"]
    assert trainer["max_epochs"] == 7
    assert trainer["enable_checkpointing"] is True
    assert [entry["class_path"].rpartition(".")[2] for entry in trainer["callbacks"]] == ["ModelCheckpoint"] * 2
    assert fit.config["model"] == CONFIG["model"]
    assert CONFIG["trainer"]["max_epochs"] == 3


def test_a_training_that_fails_is_told_with_its_cause_and_tried_again(tmp_path: Path) -> None:
    def start(training: Training) -> Path:
        return common_start(7, CONFIG, tmp_path, threading.Event(), lambda line: None, training)

    with pytest.raises(TrialFailedError, match="the float network could not be trained: it diverged"):
        start(Training(status=1))
    assert start(Training()).exists()


def test_who_waits_can_be_stopped(tmp_path: Path) -> None:
    stop, begun, release = threading.Event(), threading.Event(), threading.Event()

    def long(fit: Fit) -> int:
        begun.set()
        release.wait(30)
        return 1

    def fail() -> None:
        with pytest.raises(TrialFailedError):
            common_start(7, CONFIG, tmp_path, threading.Event(), lambda line: None, long)

    first = threading.Thread(target=fail)
    first.start()
    assert begun.wait(10)
    stop.set()
    with pytest.raises(InterruptedFitError):
        common_start(7, CONFIG, tmp_path, stop, lambda line: None, long)
    release.set()
    first.join()


def test_it_belongs_to_what_a_sweep_is(tmp_path: Path) -> None:
    (tmp_path / "float.ckpt").write_text("weights")
    given = sweep_of(f"{GRID}\nwarm_start: float.ckpt", tmp_path / "study.yaml")
    assert given.definition.warm_start == str(tmp_path / "float.ckpt")
    assert common_start(given.definition.warm_start, CONFIG, tmp_path, threading.Event()) == tmp_path / "float.ckpt"
    identity = given.definition.identity()
    assert identity["warm_start"] == '"float.ckpt"'
    assert sweep_of(f"{GRID}\nwarm_start: {{epochs: 7}}").definition.identity()["warm_start"] == "7"
    assert "warm_start" not in sweep_of(GRID).definition.identity()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("none.ckpt", "warm_start: there is no file 'none.ckpt'"),
        ("{epochs: 0}", "warm_start.epochs: given 0"),
        ("{epoch: 3}", r"warm_start: given \{'epoch': 3\}; allowed: the path of a checkpoint, or"),
        ("12", "warm_start: given 12; allowed"),
    ],
)
def test_a_mistake_is_one_clear_error(given: str, told: str) -> None:
    with pytest.raises(SweepError, match=told):
        sweep_of(f"{GRID}\nwarm_start: {given}")


def fit(root: Path, callbacks: list[Any], epochs: int = 1, ckpt_path: str | None = None) -> Trainer:
    torch.manual_seed(0)
    samples = [(torch.rand(1, 8, 8), number % 10) for number in range(16)]
    trainer = Trainer(
        default_root_dir=root,
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(network=DigitsCNN(), learning_rate=0.0)
    trainer.fit(module, DataLoader(samples, batch_size=8), ckpt_path=ckpt_path)
    return trainer


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = trainer.lightning_module.state_dict()
    return {name: value for name, value in weights.items() if "running" not in name and "num_batches" not in name}


def test_a_fit_begins_with_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = fit(tmp_path, [EdgeCompressionCallback([Prune(macs=0.5, start=0)])])
    with torch.no_grad():
        next(iter(first.lightning_module.parameters())).add_(1)
    first.save_checkpoint(tmp_path / "pruned.ckpt")
    begun = beginning_from({"trainer": {"callbacks": None}}, tmp_path / "pruned.ckpt")["trainer"]["callbacks"][0]
    assert begun["class_path"] == "lightning_edge.WarmStart"
    # The network's shape comes along, and nothing was trained in between: its learning rate is 0.
    again = fit(tmp_path, [WarmStart(**begun["init_args"])])
    assert again.lightning_module.training
    assert again.global_step == 2
    for name, value in state_of(first).items():
        torch.testing.assert_close(state_of(again)[name], value, rtol=0, atol=0)

    # A training that is resumed goes on with its own.
    with torch.no_grad():
        next(iter(again.lightning_module.parameters())).add_(1)
    again.save_checkpoint(tmp_path / "again.ckpt")
    resumed = fit(tmp_path, [WarmStart(tmp_path / "pruned.ckpt")], epochs=2, ckpt_path=str(tmp_path / "again.ckpt"))
    for name, value in state_of(again).items():
        torch.testing.assert_close(state_of(resumed)[name], value, rtol=0, atol=0)


def test_a_checkpoint_of_another_network_is_one_error(tmp_path: Path) -> None:
    other = torch.nn.Linear(3, 2)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "other.ckpt")
    with pytest.raises(RecordError, match=r"other\.ckpt' do not fit Classifier"):
        fit(tmp_path, [WarmStart(tmp_path / "other.ckpt")])
