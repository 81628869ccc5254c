"""Every phase and every pair of phases: a training that stops and resumes ends, bit by bit, as one that did not."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import EdgeCompressionCallback, Factorize, Prune, Quantize, Sparsify, load_compressed
from lightning_edge.errors import RecordError
from lightning_edge.record import KEY

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"
PHASES = ["factorize", "prune", "sparsify", "distill", "quantize"]


def load_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_and_resume", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


subject = load_benchmark()


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(32, 1, 8, 8, generator=generator), torch.randint(0, 10, (32,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=16)


def fit(
    names: str,
    *callbacks: L.Callback,
    resume: Path | None = None,
    loader: Any = None,
    new: Callable[[], L.LightningModule] = subject.Task,
    **settings: Any,
) -> Any:
    """Train a fresh task; give it, its Trainer and the state that must be the same bit by bit."""
    L.seed_everything(0, verbose=False)
    task = new()
    settings = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **settings}
    edge = [EdgeCompressionCallback(subject.phases(names))] if names else []
    trainer = L.Trainer(
        max_epochs=subject.EPOCHS,
        callbacks=[*edge, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        deterministic=True,
        **settings,
    )
    trainer.fit(task, loader or data(), ckpt_path=resume)
    state = {"network": task.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
    return task, trainer, state


def every_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1)


@pytest.mark.parametrize(
    "names",
    [
        "prune+quantize",
        "+".join(PHASES),
        *(
            pytest.param("+".join(names), marks=pytest.mark.slow)
            for count in (1, 2)
            for names in itertools.combinations(PHASES, count)
            if names != ("prune", "quantize")
        ),
    ],
)
def test_resuming_is_bitwise_exact(tmp_path: Path, names: str) -> None:
    whole, _, expected = fit(names, every_epoch(tmp_path))
    # From between the changes of the phases, and from the last epoch but one.
    for epoch in (2, 4, 6):
        *_, found = fit(names, resume=tmp_path / f"epoch={epoch}.ckpt")
        assert subject.equal(found, expected), f"resumed after epoch {epoch}"
    path = tmp_path / f"epoch={subject.EPOCHS - 1}.ckpt"
    assert torch.load(path, weights_only=True)[KEY]["changes"]
    loaded = load_compressed(path, subject.Task())
    images = next(iter(data()))[0]
    assert torch.equal(loaded.network(images), whole.eval().network(images))  # type: ignore[operator]


class Recurrent(subject.Task):  # type: ignore[misc, name-defined]
    """A classification of sequences, by a recurrent layer that is written out step by step in int8."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.network = nn.Sequential(kind(5, 6, batch_first=True), LastStep(), nn.Linear(6, 3))


class LastStep(nn.Module):
    def forward(self, given: tuple[Tensor, Any]) -> Tensor:
        return given[0][:, -1]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_layers_in_int8_resume_exactly(tmp_path: Path, kind: type[nn.RNNBase]) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences, labels = torch.randn(32, 4, 5, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    settings: dict[str, Any] = {
        "new": lambda: Recurrent(kind),
        "loader": DataLoader(TensorDataset(sequences, labels), batch_size=16),
    }
    whole, _, expected = fit("quantize", every_epoch(tmp_path), **settings)
    called = {str(node.target) for node in whole.network.edge_quantizers.bind().graph.nodes}
    assert "aten.sigmoid.default" in called  # of a gate
    assert not {"aten.gru.input", "aten.lstm.input"} & called
    for epoch in (4, 5, 6):  # int8 begins with the sixth
        *_, found = fit("quantize", resume=tmp_path / f"epoch={epoch}.ckpt", **settings)
        assert subject.equal(found, expected), f"resumed after epoch {epoch}"
    path = tmp_path / f"epoch={subject.EPOCHS - 1}.ckpt"
    loaded = load_compressed(path, Recurrent(kind))
    assert torch.equal(loaded.network(sequences), whole.eval().network(sequences))  # type: ignore[operator]
    # Without either the ranges have no place, as for every other network.
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*edge_quantizers"):
        Recurrent.load_from_checkpoint(path, kind=kind)


class StatefulLoader:
    """Says how far it has come, and goes on from there."""

    def __init__(self) -> None:
        self.batches = list(data())
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.position % len(self), len(self)):
            self.position = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@pytest.mark.parametrize("names", ["", "prune+quantize"], ids=["without compression", "with"])
@pytest.mark.parametrize("step", [9, *(pytest.param(step, marks=pytest.mark.slow) for step in (5, 13))])
def test_a_checkpoint_from_the_middle_of_an_epoch_resumes_exactly_with_a_stateful_loader(
    tmp_path: Path, names: str, step: int
) -> None:
    steps = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    *_, expected = fit(names, steps, loader=StatefulLoader())
    *_, found = fit(names, resume=tmp_path / f"step={step}.ckpt", loader=StatefulLoader())
    assert subject.equal(found, expected)


def test_averaged_weights_follow_a_cut_and_resume_exactly(tmp_path: Path) -> None:
    names = "factorize+prune"
    *_, expected = fit(names, EMAWeightAveraging(decay=0.5), every_epoch(tmp_path))
    for epoch in (1, 2, 3, 5):
        *_, found = fit(names, EMAWeightAveraging(decay=0.5), resume=tmp_path / f"epoch={epoch}.ckpt")
        assert subject.equal(found, expected), f"resumed after epoch {epoch}"


@pytest.mark.slow
def test_an_earlier_checkpoint_of_a_larger_network_validates_after_training(tmp_path: Path) -> None:
    task, trainer, _ = fit("factorize+prune+quantize", every_epoch(tmp_path))
    outputs = {}
    images = next(iter(data()))[0]
    for epoch in (0, 7, 3, 1, 7):
        path = tmp_path / f"epoch={epoch}.ckpt"
        task.test_step = lambda batch, batch_idx: None
        trainer.test(task, data(), ckpt_path=path, verbose=False)
        outputs[epoch] = task.eval().network(images)
        assert torch.equal(outputs[epoch], load_compressed(path, subject.Task()).network(images))  # type: ignore[operator]
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([Prune(macs=0.25, start=2, end=4, criterion="taylor")], r"prune\.macs: checkpoint 0\.5; this run 0\.25"),
        (
            [Factorize(energy=0.5, start=0)],
            r"(?s)factorize: checkpoint has no such phase; this run has it with.*prune:",
        ),
        (
            [Prune(macs=0.5, start=2, end=4, criterion="taylor"), Quantize(start=5)],
            r"quantize: checkpoint has no such phase; this run has it with \{'start': 5",
        ),
    ],
)
def test_a_checkpoint_and_a_run_that_disagree_are_refused_with_both_shown(
    tmp_path: Path, phases: list[Any], message: str
) -> None:
    fit("prune", every_epoch(tmp_path))
    trainer = L.Trainer(
        max_epochs=8, callbacks=[EdgeCompressionCallback(phases)], logger=False, accelerator="cpu", barebones=True
    )
    with pytest.raises(RecordError, match=message):
        trainer.fit(subject.Task(), data(), ckpt_path=tmp_path / "epoch=3.ckpt")


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (
            [Prune(macs=0.5, start=3, end=6), Quantize(start=5)],
            "Prune makes its last change at 6 and Quantize begins at 5",
        ),
        ([Sparsify(sparsity=0.5, start=0.1), Prune(macs=0.5, start=0.2)], "Prune makes its last .* Sparsify begins"),
        ([Factorize(energy=0.9, start=2), Prune(macs=0.5, start=1)], "Factorize makes its last .* Prune begins at 1"),
    ],
)
def test_phases_in_the_wrong_order_are_refused(phases: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EdgeCompressionCallback(phases)


def test_epochs_and_fractions_are_compared_once_the_length_is_known() -> None:
    phases = [Prune(macs=0.5, start=1, end=7), Quantize(start=0.5)]
    trainer = L.Trainer(
        max_epochs=8, callbacks=[EdgeCompressionCallback(phases)], logger=False, accelerator="cpu", barebones=True
    )
    with pytest.raises(Exception, match=r"last change at 7 and Quantize begins at 0\.5.*max_epochs=8"):
        trainer.fit(subject.Task(), data())


@pytest.mark.slow
def test_a_killed_training_ends_as_if_nothing_had_happened() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARK), "--kills", "2"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "2 of 2 killed and resumed trainings ended bitwise equal" in done.stdout
