"""The user's own loop with another network's answers, and the reference that is run once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy, Metric, MetricCollection

from lightning_edge.comparison import Comparison
from lightning_edge.errors import EdgeError
from lightning_edge.evaluation import reference as reference_module
from lightning_edge.evaluation.reference import Reference, checksum
from lightning_edge.evaluation.validation import Validation, calibration_inputs
from lightning_edge.network import Inputs
from lightning_edge.surgery import find_network

IMAGES = torch.randn(22, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(22) % 2


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8, **options)


class Classifier(L.LightningModule):
    """Steps, a metric object and habits that users have: they reach for the logger and the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.accuracy = Accuracy("multiclass", num_classes=2)
        self.seen: list[int] = []
        self.set_up = 0

    def setup(self, stage: str) -> None:
        self.set_up += 1
        if self.set_up > 1:
            self.net = nn.Linear(3, 2)

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.log("epoch", float(self.trainer.current_epoch))
        return nn.functional.cross_entropy(self.net(batch[0] * 10), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        assert self.logger is not None
        self.logger.experiment.add_text("text", "nothing")
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_acc", self.accuracy)
        self.log_dict({"val_loss": nn.functional.cross_entropy(logits, batch[1])}, logger=False)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Direct(L.LightningModule):
    """Layers on the module itself, and no validation step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.first(images)
        return {"hidden": hidden, "logits": self.second(hidden)}


def always(label: int) -> Any:
    def answer(images: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(images),), label), 2).float()

    return answer


def test_metrics_are_the_users_own_with_the_answers_given() -> None:
    validation = Validation(Classifier(), loader())
    for label in (0, 1):
        metrics = validation.run(always(label))
        assert metrics["val_acc"] == pytest.approx(float((label == LABELS).float().mean()))
    assert set(metrics) == {"val_acc", "val_loss"}


def test_own_network_gives_what_a_trainer_gives() -> None:
    module = Classifier()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module.logger_was = None
    expected = Validation(module, loader()).run(module.net)
    with torch.no_grad():
        accuracy = float((module.net(IMAGES).argmax(1) == LABELS).float().mean())
    assert expected["val_acc"] == pytest.approx(accuracy)
    assert trainer.state.fn is None


def test_module_of_the_user_is_left_alone() -> None:
    module = Classifier()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module.trainer = trainer
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    net = module.net
    Validation(module, loader()).run(always(0))
    assert module.trainer is trainer
    assert module.net is net
    assert "forward" not in net.__dict__
    assert module.training
    assert module.set_up == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_setup_that_builds_a_new_network_does_not_replace_the_trained_one() -> None:
    module = Classifier()
    module.setup("fit")
    assert Validation(module, loader()).run(always(1))["val_acc"] == pytest.approx(0.5)


def test_test_split_runs_the_test_step() -> None:
    assert "val_acc" in Validation(Classifier(), loader(), split="test").run(always(0))


@pytest.mark.parametrize(("limit", "samples"), [(1, 8), (2, 16), (1.0, 22), (0.5, 8)])
@pytest.mark.parametrize("own_step", [True, False])
def test_limit_of_batches_is_kept(limit: float, samples: int, own_step: bool) -> None:
    seen: list[int] = []

    def answer(images: Tensor) -> Tensor:
        seen.append(len(images))
        return torch.zeros(len(images), 2)

    metrics: dict[str, Metric] | None = None if own_step else {"acc": Accuracy("multiclass", num_classes=2)}
    Validation(Classifier(), loader(), limit_batches=limit, metrics=metrics).run(answer)
    assert sum(seen) == samples


def test_no_batches_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="limit_batches=0 leaves nothing"):
        Validation(Classifier(), loader(), limit_batches=0)
    with pytest.raises(ValueError, match=r"split='train' is not one of .*validate.*test"):
        Validation(Classifier(), loader(), split="train")  # type: ignore[arg-type]


def test_loop_that_goes_around_the_network_is_an_error() -> None:
    class Around(Classifier):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", nn.functional.linear(batch[0], self.net.weight).sum())

    with pytest.raises(EdgeError, match=r"validation_step of Around did not call the network.*module="):
        Validation(Around(), loader()).run(always(0))


def test_batch_hooks_of_the_data_module_are_used() -> None:
    class Data(L.LightningDataModule):
        def setup(self, stage: str) -> None:
            self.ready = stage

        def val_dataloader(self) -> DataLoader[Any]:
            return loader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 100, batch[1]

    data = Data()
    smallest: list[float] = []

    def answer(images: Tensor) -> Tensor:
        smallest.append(float(images.min()))
        return torch.zeros(len(images), 2)

    for metrics in (None, {"acc": Accuracy("multiclass", num_classes=2)}):
        Validation.of_datamodule(Classifier(), data, metrics=metrics).run(answer)
    assert data.ready == "validate"
    assert min(smallest) > 90


class Augmenting(L.LightningDataModule):
    """Changes batches while its Trainer trains, as augmentation on the device does."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    val_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert self.trainer is not None
        return [100 + torch.rand_like(batch[0]), batch[1]] if self.trainer.training else batch


@pytest.mark.parametrize("metrics", [None, {"val_acc": Accuracy("multiclass", num_classes=2)}], ids=["step", "metrics"])
def test_training_augmentation_stays_out_of_the_validation_after_a_fit(metrics: Any) -> None:
    fed: list[float] = []

    class AtTheEnd(L.Callback):
        def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert trainer.training  # what the data module would see
            network = find_network(pl_module)

            def answer(images: Tensor) -> Tensor:
                fed.append(float(images.max()))
                logits: Tensor = network(images)
                return logits

            Validation.after_fit(trainer, pl_module, None, "validate", metrics).run(answer)
            assert trainer.datamodule.trainer is trainer  # type: ignore[attr-defined]

    class Plain(Classifier):
        def validation_step(self, batch: Any, index: int) -> None:
            self.accuracy(self.net(batch[0]), batch[1])
            self.log("val_acc", self.accuracy)

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[AtTheEnd()], **quiet)
    trainer.fit(Plain(), datamodule=Augmenting())
    assert len(fed) == 3
    assert max(fed) == float(IMAGES.max())


def test_given_metrics_take_the_place_of_the_step() -> None:
    metrics: dict[str, Metric] = {"accuracy": Accuracy("multiclass", num_classes=2)}
    validation = Validation(Classifier(), [loader(), loader()], metrics=metrics)
    assert not validation.own_step
    assert validation.run(always(1)) == {"accuracy": 0.5}
    assert validation.run(always(1)) == {"accuracy": 0.5}


def test_metrics_of_several_values_are_told_apart_or_left_out() -> None:
    metrics: dict[str, Any] = {
        "all": MetricCollection({"accuracy": Accuracy("multiclass", num_classes=2)}),
        "each": Accuracy("multiclass", num_classes=2, average="none"),
    }
    with pytest.warns(UserWarning, match=r"metrics='each' gives 2 values"):
        assert Validation(Classifier(), loader(), metrics=metrics).run(always(1)) == {"all_accuracy": 0.5}


def test_without_a_step_and_metrics_the_network_is_still_called() -> None:
    module = Direct()
    called: list[Tensor] = []
    validation = Validation(module, DataLoader(IMAGES, batch_size=11))  # type: ignore[arg-type]
    assert validation.run(lambda images: called.append(images)) == {}
    assert torch.equal(torch.cat(called), IMAGES)


def test_metrics_without_target_and_batches_without_order_are_errors() -> None:
    metrics: dict[str, Metric] = {"accuracy": Accuracy("multiclass", num_classes=2)}
    with pytest.raises(EdgeError, match=r"need a target, and the batches are of Tensor"):
        Validation(Classifier(), DataLoader(IMAGES), metrics=metrics).run(always(0))  # type: ignore[arg-type]
    named = DataLoader([{"image": IMAGES[0]}])  # type: ignore[arg-type]
    with pytest.raises(EdgeError, match="a batch of dict does not say which part"):
        Validation(Classifier(), named, metrics=metrics).run(always(0))


def test_metrics_of_the_copy_wait_for_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    module = Classifier()
    assert module.accuracy.distributed_available_fn()
    # gather_all_tensors would fail here, as there is no process group.
    assert Validation(module, loader()).run(always(0))["val_acc"] == pytest.approx(0.5)


def test_lightning_says_nothing_of_the_inner_trainer(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Validation(Classifier(), loader(num_workers=0)).run(always(0))
    assert capsys.readouterr().out == ""
    assert not caplog.records


def runs_of(reference: Reference) -> list[int]:
    runs: list[int] = []
    network = reference.network

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return network(*args, **kwargs)

    reference.network = counted  # type: ignore[assignment]
    return runs


def test_reference_runs_once_for_all_candidates() -> None:
    reference = Reference(nn.Linear(3, 2))
    runs = runs_of(reference)
    validation = Validation(Classifier(), loader())
    first = validation.run(reference.answers())
    comparison = Comparison()
    second = validation.run(reference.answers(lambda images: [images @ torch.eye(3)[:, :2]], comparison))
    assert len(runs) == 3
    assert first != second
    assert comparison.result().samples == 22
    assert comparison.result().max_relative > 0


def test_reference_runs_again_where_the_data_comes_in_another_order() -> None:
    torch.manual_seed(0)
    reference = Reference(nn.Linear(3, 2))
    runs = runs_of(reference)
    network = reference.network
    validation = Validation(Classifier(), loader(shuffle=True))
    validation.run(reference.answers())
    comparison = Comparison()
    validation.run(reference.answers(lambda images: [network(images)], comparison))
    assert len(runs) > 6
    assert comparison.result().max_relative < 1e-6


def test_reference_keeps_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "_KEPT_OUTPUT_BYTES", 8 * 2 * 4)
    reference = Reference(nn.Linear(3, 2))
    runs = runs_of(reference)
    for _ in range(2):
        Validation(Classifier(), loader()).run(reference.answers())
    assert len(runs) == 3 + 2


def test_answers_come_in_the_structure_of_the_network() -> None:
    network = Direct().eval()
    reference = Reference(network)
    with torch.no_grad():
        expected = network(IMAGES)
        answer = reference.answers(lambda images: [torch.zeros(22, 4), torch.ones(22, 2)])
        found = answer(IMAGES)
    assert list(found) == list(expected)
    assert torch.equal(found["logits"], torch.ones(22, 2))
    assert reference.call.batch_size == 1


def test_changing_an_answer_in_place_does_not_change_what_is_kept() -> None:
    reference = Reference(nn.Linear(3, 2))
    with torch.no_grad():
        first = reference.answers()(IMAGES)
        kept = first.clone()
        first.zero_()
        assert torch.equal(reference.answers()(IMAGES), kept)


@pytest.mark.parametrize(
    "other",
    [
        Inputs((IMAGES + 1e-6,)),
        Inputs((IMAGES.double(),)),
        Inputs((IMAGES.reshape(11, 6),)),
        Inputs((IMAGES, 2)),
        Inputs(kwargs={"x": IMAGES}),
    ],
)
def test_checksum_tells_calls_apart(other: Inputs) -> None:
    assert checksum(Inputs((IMAGES,))) == checksum(Inputs((IMAGES.clone(),)))
    assert checksum(Inputs((IMAGES,))) != checksum(other)


def test_checksum_takes_every_kind_of_tensor() -> None:
    for tensor in (torch.tensor(1.0), torch.rand(2).bfloat16(), torch.ones(2, dtype=torch.bool), torch.zeros(0, 3)):
        assert isinstance(checksum(Inputs((tensor,))), int)


@pytest.fixture
def attached() -> Iterator[Classifier]:
    module = Classifier()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    yield module
    module.trainer = None


def test_calibration_sees_what_training_feeds_the_network(attached: Classifier) -> None:
    found = calibration_inputs(attached, loader(), batches=2)
    assert [inputs.batch_size for inputs in found] == [8, 8]
    assert torch.equal(found[0].args[0], IMAGES[:8] * 10)
    assert "log" not in attached.__dict__


def test_calibration_falls_back_to_validation(attached: Classifier) -> None:
    def broken(batch: Any, index: int) -> Tensor:
        raise RuntimeError("needs the optimizer")

    attached.training_step = broken  # type: ignore[method-assign]
    assert attached.trainer.logger is None
    attached.validation_step = lambda batch, index: attached_net(batch)  # type: ignore[method-assign, assignment]

    def attached_net(batch: Any) -> Any:
        raise RuntimeError("broken as well")

    with pytest.raises(EdgeError, match="broken as well"):
        calibration_inputs(attached, loader(), batches=2)


class EvaluationOnly(Classifier):
    """A training step that goes around the network."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.linear(batch[0], self.net.weight).sum()

    def validation_step(self, batch: Any, index: int) -> None:
        self.net(batch[0] + 1)


def test_calibration_takes_the_validation_step_where_training_goes_around_the_network() -> None:
    found = calibration_inputs(EvaluationOnly(), loader(), batches=1)
    assert torch.equal(found[0].args[0], IMAGES[:8] + 1)


def test_calibration_of_the_module_itself() -> None:
    class Whole(Direct):
        def training_step(self, batch: Any) -> Tensor:
            loss: Tensor = self(batch[0])["logits"].sum()
            return loss

    module = Whole()
    assert find_network(module) is module
    assert len(calibration_inputs(module, loader(), batches=9)) == 3


def test_nothing_waits_for_other_processes_before_the_loop() -> None:
    class Downloading(Classifier):
        def prepare_data(self) -> None:
            pytest.fail("asked to prepare data again")

        def validation_step(self, batch: Any, index: int) -> None:
            # Lightning puts a barrier of all processes around a prepare_data that is overridden.
            assert not is_overridden("prepare_data", self)
            super().validation_step(batch, index)

    assert Validation(Downloading(), loader()).run(always(0))["val_acc"] == pytest.approx(0.5)
