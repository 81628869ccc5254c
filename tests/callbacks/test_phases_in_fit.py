"""Pruning and its company in real Trainers: what else holds the network goes on, and looking leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import Distill, EdgeCompressionCallback, Factorize, Prune, Quantize, Sparsify, record
from lightning_edge.callbacks import processes
from lightning_edge.distillation import FeatureMatching
from lightning_edge.errors import CompressionError
from lightning_edge.quantization import is_quantized

pytestmark = pytest.mark.filterwarnings("ignore")


class Network(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean((2, 3)))
        return logits


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Network()
        self.losses: list[float] = []
        self.kept: list[Tensor] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        value = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", value)
        self.losses.append(float(value))
        self.kept.append(value)  # with its graph, which remembers the shapes of its time
        return value

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2, amsgrad=True)


class TwoOptimizers(Task):
    """Manual optimization, features and head each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net.features.parameters(), 1e-2, momentum=0.9),
            torch.optim.Adam(self.net.head.parameters(), 1e-2),
        ]


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(24, 1, 6, 6, generator=generator), torch.randint(0, 3, (24,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def fit(
    task: Task, *callbacks: L.Callback, epochs: int = 4, ckpt_path: Path | None = None, **settings: Any
) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        deterministic=True,
        **settings,
    )
    trainer.fit(task, data(), ckpt_path=ckpt_path)
    return trainer


def new(kind: type[Task] = Task) -> Task:
    L.seed_everything(0, verbose=False)
    return kind()


def edge(*phases: Any) -> EdgeCompressionCallback:
    return EdgeCompressionCallback(list(phases))


def cut(**settings: Any) -> Prune:
    return Prune(**{"macs": 0.5, "start": 1, "round_to": 2, **settings})


class Watch(L.Callback):
    """Remembers parameters and optimizer state around the cut, and whether every parameter moves afterwards."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append(
            {
                "optimizers": [id(optimizer) for optimizer in trainer.optimizers],
                "held": [id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]],
                "owned": [id(p) for p in pl_module.parameters()],
                "values": [p.detach().clone() for p in pl_module.parameters()],
            }
        )


@pytest.mark.parametrize("kind", [Task, TwoOptimizers])
@pytest.mark.parametrize("criterion", ["l2", "taylor", "obd"])
def test_optimizers_go_on_across_a_cut(kind: type[Task], criterion: str) -> None:
    task, plain, watch = new(kind), new(kind), Watch()
    trainer = fit(task, edge(cut(criterion=criterion)), watch)
    fit(plain)
    assert sum(p.numel() for p in task.parameters()) < sum(p.numel() for p in plain.parameters())
    # Up to the cut nothing of the looking shows, also not of the gradients that a criterion asks for.
    assert task.losses[:3] == plain.losses[:3]
    first, last = watch.seen[0], watch.seen[-1]
    assert last["optimizers"] == first["optimizers"]
    assert sorted(last["held"]) == sorted(last["owned"]) == sorted(first["owned"])
    after = zip(watch.seen[-2]["values"], last["values"], strict=True)
    assert all(not torch.equal(earlier, later) for earlier, later in after)
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            assert all(value.shape == parameter.shape for value in state.values() if value.dim() > 0)


def test_gradients_that_are_accumulated_go_on_across_a_cut() -> None:
    gradients: list[dict[str, Tensor]] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            named = pl_module.named_parameters()
            gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    task = new()
    # Three batches an epoch and steps after every second and at its end: the cut comes inside the first pair.
    fit(task, Look(), edge(cut(start=0.125)), Look(), epochs=4, accumulate_grad_batches=2, max_steps=-1)
    pairs = [(before, after) for before, after in zip(gradients[::2], gradients[1::2], strict=True) if before]
    changed = [(b, a) for b, a in pairs if b["net.head.weight"].shape != a["net.head.weight"].shape]
    assert len(changed) == 1
    for name, before in changed[0][0].items():
        after = changed[0][1][name]
        assert after.abs().sum() > 0
        assert set(after.flatten().tolist()) <= set(before.flatten().tolist())


@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
)
def test_averaged_copies_are_cut_along(averaging: Any) -> None:
    task, callback = new(), averaging()
    shapes: list[bool] = []

    class Compare(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            for copied in processes.averaged_copies(trainer):
                pairs = zip(copied.parameters(), pl_module.parameters(), strict=True)
                shapes.append(all(one.shape == other.shape for one, other in pairs))

    fit(task, edge(Factorize(energy=0.6, start=1, round_to=1), cut(start=2)), callback, Compare())
    assert shapes
    assert all(shapes)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_other_precisions(precision: Any) -> None:
    task, teacher = new(), Network(24)
    fit(task, edge(cut(), Distill(teacher), Quantize(start=2)), precision=precision)
    assert is_quantized(task.net)
    assert torch.isfinite(torch.tensor(task.losses)).all()


def test_a_fast_dev_run_goes_through_every_phase() -> None:
    task = new()
    phases = [
        Factorize(energy=0.6, start=90, round_to=1),
        cut(start=92, end=95, round_to=1),
        Sparsify(sparsity=0.5, start=96),
        Distill(Network(24), start=91),
        Quantize(start=99),
    ]
    fit(task, edge(*phases), fast_dev_run=True)
    assert is_quantized(task.net)
    assert isinstance(task.net.head, nn.Sequential)
    assert task.net.head[0].in_features < 16
    assert any((value == 0).float().mean() > 0.3 for name, value in task.named_parameters() if "weight" in name)


def test_the_regularizer_is_added_once_per_step_however_many_optimizers() -> None:
    asked: list[int] = []

    class Counting(Prune):
        def before_step(self, *args: Any) -> None:
            asked.append(1)
            super().before_step(*args)

    task = new(TwoOptimizers)
    fit(task, edge(Counting(macs=0.5, start=2, round_to=2, sparse_learning=1e-3)), epochs=2)
    assert len(asked) == len(task.losses)


def test_a_second_fit_goes_on_with_the_network_as_it_is() -> None:
    task, callback = new(), edge(cut())
    fit(task, callback)
    width = task.net.head.in_features
    fit(task, callback)
    assert task.net.head.in_features == width
    fit(task, edge(cut(round_to=1)))  # another callback prunes what it finds
    assert task.net.head.in_features < width


def test_hooks_are_taken_away_after_an_error() -> None:
    class Failing(Task):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            raise RuntimeError("the user's own")

    task = new(Failing)
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(task, edge(cut(), Distill(Network(24))))
    assert not {"training_step", "on_load_checkpoint", "on_save_checkpoint"} & set(task.__dict__)


def test_a_criterion_of_gradients_needs_a_loss() -> None:
    class Skipping(Task):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.loss(batch)

    with pytest.raises(CompressionError, match=r"training_step gave no loss.*such as 'l2'"):
        fit(new(Skipping), edge(cut(criterion="taylor")))


class TwoNetworks(Task):
    """Manual optimization: another network is trained before ours is called."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(36, 1)
        self.counted: Tensor
        self.register_buffer("counted", torch.zeros(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        self.counted += len(batch[0])
        other = self.other(batch[0].flatten(1)).square().mean()
        for optimizer, loss in ((first, lambda: other), (second, lambda: self.loss(batch))):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.other.parameters(), 0.1), torch.optim.Adam(self.net.parameters(), 1e-2)]


@pytest.mark.parametrize("criterion", ["l2", "taylor", "obd"])
def test_looking_at_a_batch_trains_no_other_network(criterion: str) -> None:
    looked, plain = new(TwoNetworks), new(TwoNetworks)
    fit(looked, EdgeCompressionCallback([cut(criterion=criterion)], module="net"))
    fit(plain)
    assert torch.equal(looked.other.weight, plain.other.weight)  # type: ignore[union-attr, arg-type]
    assert looked.losses[:3] == plain.losses[:3]
    assert looked.counted == plain.counted


def test_zeros_of_an_earlier_fit_stay_zeros() -> None:
    task = new()
    fit(task, edge(Sparsify(sparsity=0.5, start=1)))
    zeros = task.net.head.weight == 0
    assert zeros.any()
    fit(task, edge(Quantize(start=1)))
    assert (task.net.head.weight[zeros] == 0).all()
    with pytest.raises(CompressionError, match="was quantized before"):
        fit(task, edge(cut()))


def test_a_masked_network_is_not_pruned_any_more() -> None:
    task = new()
    fit(task, edge(Sparsify(sparsity=0.5, start=1)))
    with pytest.raises(CompressionError, match="has masks of an earlier Sparsify"):
        fit(task, edge(cut()))


@pytest.mark.parametrize("phase", [Prune(params=0.5, end=1.0, round_to=2), Sparsify(sparsity=0.5, start=0.0, end=1.0)])
def test_a_ramp_that_does_not_end_is_told(phase: Any) -> None:
    with pytest.warns(UserWarning, match=r"did not finish: training ended .* before its last change at 1\.0"):
        fit(new(), edge(phase))


def test_named_parameters_and_fused_optimizers_go_on() -> None:
    class Named(Task):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.named_parameters(), 1e-2, momentum=0.9, fused=True)

    task, watch = new(Named), Watch()
    losses = [FeatureMatching({"features": "features"})]
    fit(
        task, edge(Factorize(energy=0.6, start=1, round_to=1), cut(start=2), Distill(Network(24), losses=losses)), watch
    )
    adapters = set(watch.seen[-1]["held"]) - set(watch.seen[-1]["owned"])
    assert len(adapters) == 2
    assert set(watch.seen[-1]["owned"]) <= set(watch.seen[-1]["held"])


def kinds(task: Task) -> list[str]:
    return [change["kind"] for change in record.changes_of(task.net)]


def test_a_cut_that_cannot_come_is_refused_at_the_first_batch() -> None:
    for phase, reason in ((cut(macs=1, start=3), "layers would be empty"), (cut(ignore=["stem"]), "names no layer")):
        task = new()
        with pytest.raises(CompressionError, match=reason):
            fit(task, edge(phase))
        assert task.losses == []


def test_the_trial_comes_behind_factorize_and_is_no_beginning() -> None:
    task = new()
    fit(task, edge(Factorize(energy=0.6, start=1, round_to=1), cut(start=2)))
    assert kinds(task) == ["factorize", "trial", "cut"]
    with pytest.warns(UserWarning, match="Prune will never begin"):
        fit(new(), edge(cut(start=99)))


def test_a_resumed_training_goes_on_from_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, path = new(), tmp_path / "before.ckpt"
    fit(task, edge(cut(start=2)), epochs=1).save_checkpoint(path)
    assert kinds(task) == ["trial"]
    again = new()
    monkeypatch.setattr("lightning_edge.pruning.phase.plan_trial", None)
    monkeypatch.setattr("lightning_edge.pruning.plan.find_fault", None)
    fit(again, edge(cut(start=2)), ckpt_path=path)
    assert kinds(again) == ["trial", "cut"]


def test_lbfgs_is_refused_before_anything_is_cut() -> None:
    class Flat(Task):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    task = new(Flat)
    with pytest.raises(CompressionError, match="LBFGS keeps one flat history"):
        fit(task, edge(cut(start=0)))
    assert task.net.head.in_features == 16


def test_a_restored_network_of_the_same_structure_keeps_its_parameters() -> None:
    task = new()
    fit(task, edge(Factorize(energy=0.6, start=1, round_to=1)))
    before = list(task.parameters())
    record.restore(task.net, copy.deepcopy(record.changes_of(task.net)))
    assert all(one is other for one, other in zip(task.parameters(), before, strict=True))


def test_the_switch_to_int8_draws_no_random_number() -> None:
    states: list[Tensor] = []

    class Look(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            states.append(torch.get_rng_state())

    fit(new(), Look(), edge(Quantize(start=1)), Look(), epochs=2)
    assert all(torch.equal(before, after) for before, after in zip(states[::2], states[1::2], strict=True))
