"""Checkpoints of unknown origin: what is no record of this package is one error, and changes no network."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import (
    Distill,
    EdgeCompressionCallback,
    Factorize,
    Prune,
    Quantize,
    RecordError,
    Sparsify,
    load_compressed,
)
from lightning_edge.record import KEY


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(task: Task, max_epochs: int, checkpoint: Path | None = None) -> L.Trainer:
    torch.manual_seed(0)
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EdgeCompressionCallback(copy.deepcopy(PHASES))],
    )
    data = TensorDataset(torch.randn(16, 8), torch.randn(16, 4))
    trainer.fit(task, DataLoader(data, batch_size=8), ckpt_path=checkpoint)
    return trainer


PHASES = [
    Factorize(size=0.9, round_to=4, include=["2"]),
    Prune(macs=0.6, start=1, round_to=4),
    Sparsify(sparsity=0.5, start=2, rewind_to=1),
    Quantize(start=3, freeze_observers=3),
    Distill(teacher="self"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a training with every phase has saved."""
    path = tmp_path_factory.mktemp("checkpoint") / "whole.ckpt"
    fit(Task(), 4).save_checkpoint(path)
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def changes(checkpoint: dict[str, Any], phase: str, kind: str) -> list[dict[str, Any]]:
    return [change for change in checkpoint[KEY]["changes"] if (change["phase"], change["kind"]) == (phase, kind)]


def loads(checkpoint: dict[str, Any], path: Path) -> nn.Module:
    torch.save(checkpoint, path)
    return load_compressed(path, Task())


def test_a_record_of_every_phase_is_taken(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    kinds = {(change["phase"], change["kind"]) for change in checkpoint[KEY]["changes"]}
    assert {phase for phase, _ in kinds} == {"factorize", "prune", "sparsify", "quantize", "distill"}
    assert {("prune", "trial"), ("prune", "cut"), ("sparsify", "rewind"), ("quantize", "freeze_observers")} <= kinds
    loaded = loads(checkpoint, tmp_path / "c.ckpt")
    assert torch.equal(loaded.state_dict()["network.0.weight"], checkpoint["state_dict"]["network.0.weight"])


def first_kept(change: dict[str, Any]) -> list[Any]:
    entry: list[Any] = next(iter(change["kept"].values()))[0]
    return entry


def of_cut(edit: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda checkpoint: edit(changes(checkpoint, "prune", "cut")[0])


def of_mask(edit: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda checkpoint: edit(changes(checkpoint, "sparsify", "mask")[-1])


def twice(checkpoint: dict[str, Any]) -> None:
    recorded = checkpoint[KEY]["changes"]
    recorded.insert(recorded.index(changes(checkpoint, "prune", "cut")[0]), copy.deepcopy(first_cut(checkpoint)))


def first_cut(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return changes(checkpoint, "prune", "cut")[0]


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a list": (lambda c: c.update({KEY: []}), r"it is \[\] and not an object"),
    "an unknown key": (lambda c: c[KEY].update(more=1), r"it has 'more', which a record of this version has not"),
    "an unknown phase": (lambda c: first_cut(c).update(phase="melt"), r"a change by phase 'melt'"),
    "an unknown kind": (lambda c: first_cut(c).update(kind="melt"), r"kind is 'melt' and not one of trial, cut"),
    "a text for changes": (lambda c: c[KEY].update(changes="cut"), r"changes is 'cut' and not a list"),
    "an unknown value": (of_cut(lambda change: change.update(more=1)), r"has 'more', which a change of prune has not"),
    "no epoch": (of_cut(lambda change: change.pop("epoch")), r"lacks 'epoch'"),
    "a share above 1": (of_cut(lambda change: change.update(along=2)), r"along is 2 and not a share"),
    "indices out of range": (
        of_cut(lambda change: first_kept(change).__setitem__(1, first_kept(change)[1] + 1000)),
        r"its indices are not sorted, each once and below \d+",
    ),
    "negative indices": (
        of_cut(lambda change: first_kept(change).__setitem__(1, first_kept(change)[1] - 1000)),
        r"its indices are not sorted",
    ),
    "an index twice": (
        of_cut(lambda change: first_kept(change).__setitem__(1, torch.zeros_like(first_kept(change)[1]))),
        r"its indices are not sorted, each once",
    ),
    "no index": (
        of_cut(lambda change: first_kept(change).__setitem__(1, torch.zeros(0, dtype=torch.int64))),
        r"indices torch.Size\(\[0\]\) torch.int64 stay",
    ),
    "more elements than bytes": (
        of_cut(lambda change: first_kept(change).__setitem__(1, torch.zeros(1, dtype=torch.int64).expand(10**12))),
        r"has 1000000000000 elements and not the bytes of them",
    ),
    "a negative size": (
        of_cut(lambda change: first_kept(change).__setitem__(2, -1)),
        r"is -1 and not a whole number of 0 or more",
    ),
    "a dimension twice": (
        of_cut(lambda change: next(iter(change["kept"].values())).append(first_kept(change))),
        r"dimension 0 is given twice",
    ),
    "an attribute of another kind": (
        of_cut(lambda change: next(iter(change["attributes"].values())).update(training=[1, 0])),
        r"has 'training', which is no count of channels",
    ),
    "an attribute that is no count": (
        of_cut(lambda change: next(iter(change["attributes"].values())).update({"weight.data": [1, 1]})),
        r"has 'weight.data', which is no count of channels",
    ),
    "a count that the network does not have": (
        of_cut(lambda change: next(iter(change["attributes"].values())).update(heads=[4, 2])),
        r"does not fit Task: The recorded cut does not fit .*heads is None, the record says 4",
    ),
    "a cut twice": (twice, r"does not fit Task: The recorded cut does not fit"),
    "a mask that is cut": (
        of_mask(lambda change: change["masks"].update({name: bits[:-1] for name, bits in change["masks"].items()})),
        r"bytes of torch.uint8 for \d+ weights",
    ),
    "a mask of another weight": (of_mask(lambda change: change["masks"].clear()), r"of different weights"),
    "a negative shape": (
        of_mask(lambda change: next(iter(change["shapes"].values())).__setitem__(0, -4)),
        r"is -4 and not a whole number of 0 or more",
    ),
    "a layer twice": (
        lambda c: changes(c, "factorize", "factorize")[0].update(
            layers=changes(c, "factorize", "factorize")[0]["layers"] * 2
        ),
        r"names a layer twice",
    ),
    "an int8 call of objects": (
        lambda c: changes(c, "quantize", "attach")[0].update(args=[{1, 2}]),
        r"args\[0\] is a set and neither a tensor nor a plain value",
    ),
    "remembered NaN": (
        lambda c: next(iter(changes(c, "sparsify", "remember")[0]["weights"].values())).fill_(torch.nan),
        r"holds values that are no numbers",
    ),
    "float NaN": (lambda c: next(iter(c[KEY]["float_state"].values())).fill_(torch.nan), r"float_state.* no numbers"),
    "NaN weights": (
        lambda c: c["state_dict"]["network.0.weight"].fill_(torch.nan),
        r"values that are not finite in '0.weight': the training diverged",
    ),
    "settings of tensors": (
        lambda c: c[KEY]["settings"]["prune"].update(macs=torch.ones(2)),
        r"settings.prune.macs is a Tensor and no plain value",
    ),
    "inherited out of range": (lambda c: c[KEY].update(inherited=[99]), r"inherited is \[99\], and there are \d+"),
    "weights by number": (lambda c: c.update(state_dict={1: torch.ones(1)}), r"a name in state_dict is 1 and not"),
    "weights that are none": (lambda c: c["state_dict"].update({"network.0.weight": 3}), r"do not fit Task"),
    "control characters": (lambda c: c[KEY].update({"\x1b[31m": 1}), r"has '\\x1b\[31m', which"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_is_one_error(checkpoint: dict[str, Any], tmp_path: Path, name: str) -> None:
    edit, message = HOSTILE[name]
    given = copy.deepcopy(checkpoint)
    edit(given)
    with pytest.raises(RecordError, match=message):
        loads(given, tmp_path / "c.ckpt")


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.ckpt")
    with pytest.raises(RecordError, match="is a named pipe and not a file"):
        load_compressed(tmp_path / "c.ckpt", Task())


def places(plain: Any) -> list[tuple[Any, Any]]:
    pairs = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    return [place for key, value in list(pairs) for place in ((plain, key), *places(value))]


def test_any_value_in_any_place_is_refused_or_taken(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    strange = [None, True, -1, 2**70, 0.5, "", [], {}, [[1]], torch.ones(3), torch.tensor(-1), {"": ""}, {1: 1}]
    numbers = random.Random(0)
    refused = 0
    for seed in range(60):
        given = copy.deepcopy(checkpoint)
        container, key = numbers.choice(places(given[KEY]))
        container[key] = numbers.choice(strange)
        try:
            loads(given, tmp_path / "c.ckpt")
        except RecordError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, {key!r}: {type(error).__name__}: {error}") from error
    assert refused > 30


def test_a_run_that_resumes_refuses_it_too(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    given = copy.deepcopy(checkpoint)
    changes(given, "prune", "cut")[0]["along"] = 2
    torch.save(given, tmp_path / "c.ckpt")
    with pytest.raises(RecordError, match=r"in the checkpoint cannot be used: .*along is 2 and not a share"):
        fit(Task(), 5, tmp_path / "c.ckpt")
