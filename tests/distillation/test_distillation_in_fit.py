"""Distillation in a Trainer, against knowledge distillation written by hand into training_step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distilled import START, Net, images, seeded, step
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge.callbacks.distillation import DistillationWiring
from lightning_edge.distillation import (
    AttentionTransfer,
    Distill,
    FeatureMatching,
    KLDivergence,
)
from lightning_edge.errors import CompressionError
from lightning_edge.schedule import Clock, Phase

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("error:::lightning_edge", "error::lightning_edge.user_warnings.EdgeWarning"),
]


class Task(L.LightningModule):
    """The user's module: nothing in it knows of distillation."""

    def __init__(self, manual: bool = False, output: str = "tensor", calls: int = 1) -> None:
        super().__init__()
        self.net = seeded(Net, 0)
        self.automatic_optimization = not manual
        self.output, self.calls = output, calls

    def task_loss(self, batch: list[Tensor]) -> Tensor:
        losses = []
        for _ in range(self.calls):
            logits = self.net(batch[0])
            losses.append(F.cross_entropy(logits, batch[1]) + self.extra(logits, batch[0]))
        return torch.stack(losses).sum() if self.calls > 1 else losses[0]

    def extra(self, logits: Tensor, x: Tensor) -> Any:
        return 0.0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if self.output == "none" and batch_idx % 2:
            return None
        loss = self.task_loss(batch)
        self.log("users_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            optimizer.step()  # type: ignore[union-attr]
            return None
        return {"loss": loss, "more": 1} if self.output == "dict" else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class ByHand(Task):
    """The same with distillation written into it."""

    def __init__(self, teacher: nn.Module, task_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._teacher = [teacher.eval().requires_grad_(False)]
        self.task_weight = task_weight

    def task_loss(self, batch: list[Tensor]) -> Tensor:
        if self.calls == 1:
            logits = self.net(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            return (loss if self.task_weight == 1 else loss * self.task_weight) + self.kl(logits, batch[0])
        return super().task_loss(batch)

    def extra(self, logits: Tensor, x: Tensor) -> Any:
        return self.kl(logits, x)

    def kl(self, logits: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._teacher[0](x)
        kl = F.kl_div(F.log_softmax(logits / 2, 1), F.softmax(wanted / 2, 1), reduction="batchmean")
        return 0.7 * (kl * 2**2)


class Compression(L.Callback):
    """As much of EdgeCompressionCallback as distillation needs."""

    def __init__(self, settings: Distill, phases: list[Phase] | None = None) -> None:
        self.wiring = DistillationWiring(settings, phases or [settings])
        self.saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.wiring.attach(trainer, pl_module, pl_module.net, self.saved)  # type: ignore[arg-type]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        done = (trainer.current_epoch + batch_idx / trainer.num_training_batches) / (trainer.max_epochs or 1)
        self.wiring.begin_step(Clock(trainer.current_epoch, done))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.wiring.before_optimizer_step(optimizer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["distillation"] = self.wiring.state()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["distillation"]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.wiring.detach(pl_module)


def loader(size: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (size,), generator=generator)
    # With a generator of its own, as a loader draws a number at each epoch, at a resumed one at another time.
    return DataLoader(TensorDataset(images(size), labels), batch_size=4, generator=generator)


def fit(module: L.LightningModule, *callbacks: L.Callback, **trainer: Any) -> L.Trainer:
    torch.manual_seed(11)
    ckpt_path = trainer.pop("ckpt_path", None)
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": checkpoints, **trainer}
    fitted = L.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    fitted.fit(module, loader(), ckpt_path=ckpt_path)
    return fitted


def difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.net.parameters(), second.net.parameters(), strict=True)  # type: ignore[union-attr]
    return max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("module", "trainer"),
    [
        ({}, {}),
        ({"output": "dict"}, {}),
        ({"output": "none"}, {}),
        ({"manual": True}, {}),
        ({"calls": 2}, {}),
        ({}, {"precision": "bf16-mixed"}),
        ({"manual": True}, {"precision": "bf16-mixed"}),
        ({}, {"precision": "bf16-true"}),
        ({}, {"accumulate_grad_batches": 4}),
        ({}, {"gradient_clip_val": 0.1}),
    ],
)
def test_equals_distillation_by_hand(module: dict[str, Any], trainer: dict[str, Any]) -> None:
    teacher = seeded(Net, 1, 6)
    hand, ours, plain = ByHand(copy.deepcopy(teacher), **module), Task(**module), Task(**module)
    if trainer.get("precision") == "bf16-true":
        hand._teacher[0].bfloat16()
    fit(hand, **trainer)
    fit(plain, **trainer)
    fit(ours, Compression(Distill(teacher, [KLDivergence(2.0, weight=0.7)])), **trainer)
    # Calls that add up are added in another order.
    assert difference(hand, ours) <= (1e-6 if module.get("calls") else 0)
    assert difference(plain, ours) > 1e-4


def test_task_weight_equals_the_weight_by_hand() -> None:
    teacher = seeded(Net, 1, 6)
    hand, ours = ByHand(copy.deepcopy(teacher), task_weight=0.3), Task()
    fit(hand)
    fit(ours, Compression(Distill(teacher, [KLDivergence(2.0, weight=0.7)], task_weight=0.3)))
    assert difference(hand, ours) == 0


def test_a_window_leaves_the_rest_of_training_as_it_was() -> None:
    class HalfByHand(ByHand):
        def kl(self, logits: Tensor, x: Tensor) -> Any:
            return super().kl(logits, x) if self.current_epoch == 1 else 0.0

    teacher = seeded(Net, 1, 6)
    hand, ours = HalfByHand(copy.deepcopy(teacher)), Task()
    fit(hand, max_epochs=3)
    fit(ours, Compression(Distill(teacher, [KLDivergence(2.0, weight=0.7)], start=1, end=2)), max_epochs=3)
    assert difference(hand, ours) == 0


def test_losses_are_logged_apart() -> None:
    class Remember(Compression):
        seen: dict[str, Tensor]

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.seen = dict(trainer.callback_metrics)

    teacher = seeded(Net, 1, 6)
    callback = Remember(Distill(teacher, [KLDivergence(2.0, weight=0.7), AttentionTransfer(["conv"])]))
    fit(Task(), callback)
    logged = callback.seen
    assert {"edge/task_loss", "edge/distill/kl", "edge/distill/attention", "users_loss"} <= set(logged)
    assert torch.equal(logged["edge/task_loss"], logged["users_loss_step"])
    assert float(logged["edge/distill/kl"]) > 0


def test_the_module_is_left_as_it_was_also_after_an_error() -> None:
    class Breaks(Task):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            if batch_idx == 2:
                raise KeyError("the user's own")
            return super().training_step(batch, batch_idx)

    callback = Compression(Distill(seeded(Net, 1)))
    module = Breaks()
    with pytest.raises(KeyError, match="the user's own"):
        fit(module, callback)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    callback.wiring.detach(module)
    assert "training_step" not in vars(module)
    module = Task(manual=True)
    module.manual_backward = users = lambda loss: loss.backward()  # type: ignore[method-assign, assignment]
    fit(module, Compression(Distill(seeded(Net, 1))))
    assert vars(module)["manual_backward"] is users
    assert "training_step" not in vars(module)
    assert list(module.state_dict()) == list(Task().state_dict())


def test_gradients_of_adapters_are_averaged_over_processes() -> None:
    """The trainer's reduction stands in for one over processes, which tests with real ones need seconds to start."""

    class Halved:
        world_size, optimizers = 2, ()

        class strategy:
            @staticmethod
            def reduce(gradient: Tensor, reduce_op: str) -> Tensor:
                assert reduce_op == "mean"
                return gradient / 2

    module, teacher = Task(), seeded(Net, 1, 6)
    losses = [FeatureMatching(["conv"]), FeatureMatching(["relu"], start=0.5)]
    wiring = DistillationWiring(Distill(teacher, losses), [])
    trainer: Any = Halved()
    sgd = torch.optim.SGD(module.parameters(), 0.1)
    trainer.optimizers = [sgd]
    wiring.attach(trainer, module, module.net, None)  # type: ignore[arg-type]
    distillation = wiring._distillation
    assert distillation is not None
    step(distillation, images(), clock=Clock(0, 0.5))
    wiring.begin_step(START)
    first, second, third, _ = distillation.adapters.parameters()
    first.grad = torch.ones_like(first)
    wiring.before_optimizer_step(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1))
    assert torch.equal(first.grad, torch.ones_like(first))
    wiring.before_optimizer_step(sgd)
    assert torch.equal(first.grad, torch.ones_like(first) / 2)
    assert torch.equal(second.grad, torch.zeros_like(second))  # type: ignore[arg-type]
    assert third.grad is None  # its loss has not begun
    wiring.detach(module)


def test_a_second_fit_is_not_wrapped_twice() -> None:
    teacher = seeded(Net, 1, 6)
    callback = Compression(Distill(teacher, [KLDivergence(2.0, weight=0.7)]))
    hand, ours = ByHand(copy.deepcopy(teacher)), Task()
    for _ in range(2):
        fit(hand)
        torch.manual_seed(11)
        fit(ours, callback)
    assert difference(hand, ours) == 0


def test_resuming_is_exact_with_adapters(tmp_path: Path) -> None:
    teacher = seeded(Net, 1, 6)

    def compression() -> Compression:
        return Compression(Distill(teacher, [FeatureMatching(["conv"]), KLDivergence(end=1)]))

    class Deterministic(Task):
        def on_train_epoch_start(self) -> None:
            torch.manual_seed(self.current_epoch)  # dropout

    whole, again = Deterministic(), Deterministic()
    callbacks = [compression(), compression()]
    fit(whole, callbacks[0], ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=3)
    path = tmp_path / "epoch=0.ckpt"
    assert list(torch.load(path, weights_only=True)["distillation"]["adapters"]) == ["features/conv"]
    resumed = fit(again, callbacks[1], max_epochs=3, ckpt_path=path)
    assert difference(whole, again) == 0
    states = [callback.wiring.state()["adapters"]["features/conv"] for callback in callbacks]
    assert torch.equal(states[0]["weight"], states[1]["weight"])
    parameters = resumed.optimizers[0].param_groups[0]["params"]
    assert len(parameters) == len(list(again.parameters())) + 2
    assert all(p in resumed.optimizers[0].state for p in parameters)


def test_manual_optimization_of_two_networks() -> None:
    """The student's loss is added where its gradients are on, and once."""

    class Adversarial(Task):
        def __init__(self) -> None:
            super().__init__(manual=True)
            self.judge = seeded(lambda: nn.Linear(3, 1), 2)
            self.grads: list[list[bool]] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            student, judge = self.optimizers()  # type: ignore[misc, union-attr]
            for optimizer, sign in ((judge, 1), (student, -1)):
                self.toggle_optimizer(optimizer)
                self.manual_backward(sign * self.judge(self.net(batch[0])).mean())
                self.grads.append([p.grad is not None for p in self.net.parameters()])
                optimizer.step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), 0.0) for net in (self.net, self.judge)]

    class Count(Compression):
        counted = 0

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.counted += "edge/distill/kl" in trainer.callback_metrics

    callback, module = Count(Distill(seeded(Net, 1))), Adversarial()
    fit(module, callback, limit_train_batches=2)
    assert callback.counted == 2
    assert [all(flags) for flags in module.grads] == [any(flags) for flags in module.grads] == [False, True] * 2


def test_a_step_around_the_network_is_refused() -> None:
    class Around(Task):
        def task_loss(self, batch: list[Tensor]) -> Tensor:
            return F.cross_entropy(self.net.forward(batch[0]), batch[1])

    class Eval(Task):
        def task_loss(self, batch: list[Tensor]) -> Tensor:
            self.net.eval()
            return super().task_loss(batch)

    for module in (Around(), Eval()):
        with pytest.raises(CompressionError, match="does not call the network as a whole in training mode"):
            fit(module, Compression(Distill(seeded(Net, 1))))


def test_a_backward_around_lightning_is_told() -> None:
    class Direct(Task):
        def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.task_loss(batch).backward()

    with pytest.warns(UserWarning, match="Call self.manual_backward"):
        fit(Direct(manual=True), Compression(Distill(seeded(Net, 1))), limit_train_batches=1)
