"""Trials that are ended before their time: the callback that ends them, and what the sweep makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from sweep_files import CONFIG, GRID, engine, report_of
from torch.utils.data import DataLoader

from lightning_edge.callbacks.stop_trial import StopTrial
from lightning_edge.errors import HOPELESS, HopelessError, SweepError
from lightning_edge.reporting.html.sweep import sweep_page
from lightning_edge.sweeps.fit import Fit
from lightning_edge.sweeps.objectives import TrialStoppedError
from lightning_edge.sweeps.progress import progress_line
from lightning_edge.sweeps.stop_early import StopEarly, read_stop_early, with_stop
from lightning_edge.zoo.networks import DigitsCNN
from lightning_edge.zoo.task import Classifier

RULE = "stop_early: {when: val_acc < 0.6, after_epochs: 2}\n"


def fit(when: str, after_epochs: int, factor: float = 1.0) -> Trainer:
    torch.manual_seed(0)
    module = Classifier(DigitsCNN())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)
    batches = DataLoader([(torch.rand(1, 8, 8), 1) for _ in range(4)], batch_size=4)
    trainer = Trainer(
        max_epochs=4,
        limit_train_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StopTrial(when, after_epochs)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, batches, batches)
    return trainer


def test_a_training_ends_when_the_condition_holds_and_not_before() -> None:
    with pytest.raises(HopelessError, match=r"val_loss is .* after 3 epochs, and val_loss > 0 ends a trial"):
        fit("val_loss > 0", 3)
    assert fit("val_loss < 0", 1).current_epoch == 4
    with pytest.raises(HopelessError, match="val_loss is nan after 1"):
        fit("val_loss > 1e30", 1, factor=float("nan"))
    with pytest.raises(SweepError, match=r"the validation logs no 'val_accuracy'; it logs: .*val_acc"):
        fit("val_accuracy < 1", 4)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("val_acc < 0.6", "given 'val_acc < 0.6'; allowed: {when:"),
        ({"after_epochs": 2}, "allowed: {when: val_acc < 0.6, after_epochs: 5}"),
        ({"when": "val_acc < 0.6", "epochs": 2}, "allowed: {when:"),
        ({"when": "val_acc"}, "stop_early.when: given 'val_acc'; allowed: a name, one of"),
        ({"when": "val_acc < 1", "after_epochs": 0}, "stop_early.after_epochs: given 0; allowed: a whole number"),
        ({"when": "val_acc < 1", "after_epochs": True}, "stop_early.after_epochs: given True; allowed: a whole number"),
    ],
)
def test_what_is_no_rule(given: Any, told: str) -> None:
    with pytest.raises(SweepError) as raised:
        read_stop_early(given)
    assert told in str(raised.value)


def test_every_trial_has_the_callback_that_ends_it() -> None:
    rule = read_stop_early({"when": "val_acc < 0.6", "after_epochs": 2})
    *others, last = with_stop(CONFIG, rule)["trainer"]["callbacks"]
    assert others == CONFIG["trainer"]["callbacks"]
    assert StopTrial(**last["init_args"]).after_epochs == 2
    assert last["class_path"] == f"{StopTrial.__module__}.{StopTrial.__name__}"
    assert isinstance(rule, StopEarly)
    assert with_stop(CONFIG, None) == CONFIG
    for given in (None, [], last, [last]):  # none, one that is not in a list, and a list
        assert with_stop({"trainer": {"callbacks": given}}, rule)["trainer"]["callbacks"] == [last] * (
            2 if given else 1
        )


@pytest.mark.parametrize("sampler", ["grid", "tpe", "nsga2"])
def test_a_stopped_trial_counts_is_told_and_is_no_failure(tmp_path: Path, sampler: str) -> None:
    def runner(fit: Fit) -> Mapping[str, Any]:
        assert fit.config["trainer"]["callbacks"][-1]["init_args"]["when"] == "val_acc < 0.6"
        report = report_of(fit.config)
        if report["rows"][-1]["metrics"]["val_acc"] < 0.8:
            raise TrialStoppedError("val_acc is 0.5 after 2 epochs, and val_acc < 0.6 ends a trial")
        return report

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        front = engine(tmp_path, f"{GRID}{RULE}sampler: {sampler}\n", runner).run().front
    by_status = {trial.number: trial.status for trial in front.trials}
    assert [*by_status.values()].count("ended early") >= 3  # three failures of a cause would end the sweep
    assert len(by_status) == 6
    stopped = next(trial for trial in front.trials if trial.status == "ended early")
    assert stopped.reason is not None
    assert stopped.reason.startswith("val_acc is 0.5")
    assert not stopped.feasible
    assert f"{[*by_status.values()].count('ended early')} ended early" in progress_line(front, 6, 5, 1)
    page = sweep_page(yaml.safe_load((tmp_path / "front.json").read_text()))
    assert "ended early" in page
    assert engine(tmp_path, f"{GRID}{RULE}sampler: {sampler}\n", runner).run().front.trials == front.trials


def test_a_fit_that_is_not_worth_the_rest_ends_with_a_status_of_its_own(tmp_path: Path) -> None:
    trainer = {"max_epochs": 3, "limit_train_batches": 1, "limit_val_batches": 1, "logger": False}
    trainer |= {"default_root_dir": str(tmp_path), "enable_checkpointing": False, "callbacks": []}
    config = with_stop({"trainer": trainer}, read_stop_early({"when": "val_acc <= 1"}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "lightning_edge.cli", "fit"]
    ended = subprocess.run(
        [*command, "--config", "recipe:quickstart", "--config", str(tmp_path / "config.yaml")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == HOPELESS, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: val_acc is ")
