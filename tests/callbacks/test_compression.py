"""EdgeCompressionCallback in real Trainers: what survives the switch to int8, what resumes, what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import record
from lightning_edge.callbacks.compression import EdgeCompressionCallback
from lightning_edge.errors import CompressionError, RecordError
from lightning_edge.quantization import Quantize, convert, is_quantized, quantized_forward
from lightning_edge.record import KEY, load_compressed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

SAMPLES, BATCH = 20, 8  # the last batch has four


class Network(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03), nn.ReLU()
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.features(x).mean((2, 3))))
        return logits


class Task(L.LightningModule):
    """The user's module: nothing in it knows of compression."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network()
        self.losses: list[float] = []

    def predict(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.predict(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.predict(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self.predict(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class OwnForward(Task):
    """Layers directly on the LightningModule."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return out

    def predict(self, x: Tensor) -> Tensor:
        out: Tensor = self(x)
        return out


class Parts(Task):
    """Two networks, one after the other, and no forward."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.body, self.head = Network(), nn.Linear(3, 3)
        self.losses: list[float] = []

    def predict(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


class KeywordsAndDict(Task):
    """Several inputs, by keyword, and a dict for an output."""

    class Network(Network):
        def forward(self, image: Tensor, *, shift: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"logits": super().forward(image) + shift, "features": self.features(image)}

    def __init__(self) -> None:
        super().__init__()
        self.net = self.Network()

    def predict(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(image=x, shift=x.mean((2, 3)))["logits"]
        return out


class Manual(Task):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(SAMPLES) % 3), BATCH)


def fit(
    task: L.LightningModule, *callbacks: L.Callback, epochs: int = 4, ckpt_path: Any = None, **settings: Any
) -> L.Trainer:
    settings = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **settings}
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        deterministic=True,
        **settings,
    )
    trainer.fit(task, data(), data(), ckpt_path=ckpt_path)
    return trainer


def new(task: Callable[[], Task] = Task) -> Task:
    L.seed_everything(0, verbose=False)
    return task()


def edge(module: str | None = None, **settings: Any) -> EdgeCompressionCallback:
    return EdgeCompressionCallback([Quantize(**{"start": 2, **settings})], module=module)


@pytest.mark.parametrize(
    ("task", "module"),
    [(Task, None), (OwnForward, None), (Parts, "body"), (KeywordsAndDict, None), (Manual, None)],
    ids=["submodule", "own forward", "named", "keywords and dict", "manual optimization"],
)
def test_int8_training_works_in_every_shape_of_module(task: Callable[[], Task], module: str | None) -> None:
    user = new(task)
    fit(user, edge(module))
    assert len(user.losses) == 4 * 3
    assert all(torch.isfinite(torch.tensor(user.losses)))
    batch = next(iter(data()))
    user.eval()
    quantized = user.predict(batch[0])
    converted = convert(user)
    network, _ = quantized_forward(user)
    forward = network.forward
    network.forward = converted.forward
    torch.testing.assert_close(user.predict(batch[0]), quantized, rtol=0, atol=1e-5)
    network.forward = forward


def test_float_epochs_are_those_of_a_training_without_the_callback() -> None:
    plain, ours = new(), new()
    fit(plain)
    fit(ours, edge())
    assert ours.losses[: 2 * 3] == plain.losses[: 2 * 3]
    assert ours.losses[2 * 3 :] != plain.losses[2 * 3 :]


def test_optimizer_and_schedule_go_on_across_the_switch() -> None:
    seen: list[tuple[int, float, float, int]] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            (optimizer,) = trainer.optimizers
            first = optimizer.param_groups[0]["params"][0]
            steps = float(optimizer.state[first].get("step", 0))
            seen.append((id(optimizer), optimizer.param_groups[0]["lr"], steps, id(first)))

    user = new()
    before = [id(parameter) for parameter in user.parameters()]
    trainer = fit(user, edge(), Watch(), gradient_clip_val=0.5)
    assert [id(parameter) for parameter in user.parameters()] == before
    assert [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]] == before
    assert len({optimizer for optimizer, *_ in seen}) == len({first for *_, first in seen}) == 1
    assert [step for _, _, step, _ in seen] == list(range(12))
    assert [rate for _, rate, _, _ in seen] == [1e-2 * 0.5**epoch for epoch in range(4) for _ in range(3)]


def test_accumulated_gradients_survive_a_switch_in_their_middle() -> None:
    user = new()
    # Three batches an epoch, steps after every second: the switch at epoch 1 comes with one batch accumulated.
    trainer = fit(user, edge(start=1), accumulate_grad_batches=2, epochs=3)
    assert trainer.global_step == 6
    assert all(torch.isfinite(parameter).all() for parameter in user.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision: Any) -> None:
    user = new()
    fit(user, edge(), precision=precision, epochs=3)
    assert is_quantized(user.net)
    assert torch.isfinite(torch.tensor(user.losses)).all()
    # A file computes in float32 between its integers, whatever the network was trained in.
    images, _ = next(iter(data()))
    converted = convert(user)
    assert all(value.dtype is not torch.float64 for value in converted.state_dict().values())
    found, expected = converted(images), user.float().eval().predict(images)
    assert found.dtype is torch.float32
    (scale,) = converted.output_scales
    assert scale is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 * scale)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_ranges_stay_in_float32_in_other_precisions_and_resume_exactly(tmp_path: Path, precision: Any) -> None:
    whole = new()
    fit(whole, edge(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), precision=precision)
    resumed = new()
    fit(resumed, edge(), ckpt_path=tmp_path / "epoch=2.ckpt", precision=precision)
    expected, found = whole.state_dict(), resumed.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        # Lightning loads a checkpoint while the network is still float32, which loses digits of doubles.
        assert precision == "64-true" or torch.equal(found[name], value), name
    scales = [value.dtype for name, value in found.items() if name.endswith(("scale", "min_val", "max_val"))]
    assert scales
    assert set(scales) == {torch.float32}


def test_checkpoints_of_every_time_validate_and_test(tmp_path: Path) -> None:
    user = new()
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1)
    stopping = EarlyStopping("val_loss", patience=50)
    trainer = fit(user, edge(), checkpoints, stopping)
    last = {name: value.clone() for name, value in user.state_dict().items()}
    measured = trainer.validate(user, data(), verbose=False)
    for epoch, quantized in ((0, False), (3, True), (1, False), (2, True)):
        trainer.test(user, data(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False)
        assert is_quantized(user.net) == quantized
    trainer.test(user, data(), ckpt_path="best", verbose=False)
    assert trainer.validate(user, data(), ckpt_path=tmp_path / "epoch=3.ckpt", verbose=False) == measured
    assert all(torch.equal(value, last[name]) for name, value in user.state_dict().items())
    # A fresh module and Trainer, which have no batch to capture the network with.
    fresh = L.Trainer(logger=False, callbacks=[edge()], accelerator="cpu", enable_progress_bar=False)
    assert fresh.validate(new(), data(), ckpt_path=tmp_path / "epoch=3.ckpt", verbose=False) == measured


@pytest.mark.parametrize("settings", [{}, {"fold_batch_norm": 3, "freeze_observers": 3}], ids=["folded", "live"])
def test_resuming_from_any_epoch_is_bitwise_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = new()
    fit(whole, edge(**settings), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    for epoch in (0, 1, 2):
        resumed = new()
        callback = edge(**settings)
        fit(resumed, callback, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        expected, found = whole.state_dict(), resumed.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        baseline = callback.baseline(resumed)
        assert not is_quantized(baseline)


def test_checkpoints_load_safely_and_without_a_trainer(tmp_path: Path) -> None:
    user = new()
    fit(user, edge(), ModelCheckpoint(tmp_path, "last"))
    path = tmp_path / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert [change["kind"] for change in saved[KEY]["changes"]] == ["attach", "freeze_observers"]
    loaded = load_compressed(path, new())
    batch = next(iter(data()))
    assert torch.equal(loaded.predict(batch[0]), user.eval().predict(batch[0]))  # type: ignore[operator]


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(RecordError, match="is not a Lightning checkpoint"):
        load_compressed(tmp_path / "broken.ckpt", new())


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    fit(new(), edge(), ModelCheckpoint(tmp_path, "last"))
    other = new()
    other.net.head = nn.Linear(4, 7)
    with pytest.raises(RecordError, match="do not fit Task"):
        load_compressed(tmp_path / "last.ckpt", other)


def test_the_baseline_is_the_float_network_at_the_switch(tmp_path: Path) -> None:
    user, reference = new(), new()
    callback = edge()
    fit(user, callback)
    fit(reference, epochs=2)
    expected, found = reference.net.state_dict(), callback.baseline(user).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_asking_for_the_inputs_leaves_no_trace() -> None:
    """With the ranges never used, training with the switch must equal training without it, dropout and all."""

    class Quiet(Quantize):
        def plan(self, network: Any, clock: Any, changes: Any, batch: Any) -> None:
            if clock.reached(self.start):
                assert batch.inputs().batch_size in (8, 4)

    losses = []
    for callbacks in ([], [EdgeCompressionCallback([Quiet(start=0)])]):
        user = new()
        user.net.dropout.p = 0.5
        fit(user, *callbacks)
        losses.append(user.losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("task", "module", "message"),
    [
        (Parts, None, r"Parts has 2 submodules.*'body', 'head'.*module="),
        (Parts, "bdy", r"module='bdy' is not a submodule.*'body', 'head'"),
    ],
)
def test_a_network_that_cannot_be_told_is_asked_for(task: Any, module: str | None, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        fit(new(task), edge(module))


class Around(OwnForward):
    """Has a forward, and a training_step that does not use it."""

    def predict(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return out


def test_a_training_step_that_goes_around_the_network_is_refused() -> None:
    with pytest.raises(CompressionError, match=r"training_step does not call Around as a whole.*'conv', 'head'"):
        fit(new(Around), edge())


class Dodging(Task):
    """Calls the network once, and its parts from then on."""

    def predict(self, x: Tensor) -> Tensor:
        if not is_quantized(self.net):
            return super().predict(x)
        out: Tensor = self.net.head(self.net.features(x).mean((2, 3)))
        return out


def test_a_network_that_is_not_called_once_quantized_is_refused() -> None:
    with pytest.raises(CompressionError, match=r"nothing is trained quantized.*'net'"):
        fit(new(Dodging), edge())


def test_two_callbacks_are_refused() -> None:
    with pytest.raises(CompressionError, match="2 EdgeCompressionCallbacks"):
        fit(new(), edge(), edge())


def test_a_fraction_of_an_unknown_length_is_refused() -> None:
    with pytest.raises(CompressionError, match=r"length is not known \(max_epochs=-1, max_steps=-1\)"):
        fit(new(), edge(start=0.5), epochs=-1, max_time="00:00:00:20")


def test_fractions_count_steps_where_steps_end_the_training() -> None:
    user = new()
    fit(user, edge(start=0.5), epochs=-1, max_steps=6)
    assert is_quantized(user.net)


def test_a_fast_dev_run_goes_through_every_phase() -> None:
    user = new()
    fit(user, edge(start=99, freeze_observers=100), fast_dev_run=True)
    assert quantized_forward(user)[1].frozen


class Skipping(Task):
    """Its first batches of the second epoch are skipped."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 1 and batch_idx < 2:
            return None
        return super().training_step(batch, batch_idx)


def test_a_phase_begins_with_the_first_batch_that_is_not_skipped() -> None:
    task = new(Skipping)
    fit(task, edge(start=1), epochs=3)
    (change,) = [change for change in record.changes_of(task.net) if change["kind"] == "attach"]
    assert change["epoch"] == 1


@pytest.mark.parametrize("nothing", [{"limit_train_batches": 0}, {"max_steps": 0}], ids=str)
def test_a_training_of_nothing_is_told(nothing: dict[str, int]) -> None:
    with pytest.warns(UserWarning, match="Quantize never began: no batch was trained"):
        fit(new(), edge(start=0.5), epochs=1, **nothing)


@pytest.mark.parametrize("start", [2, 1.0])
def test_a_phase_that_cannot_begin_is_told_before_the_first_step_and_once(start: float) -> None:
    told: list[str] = []

    class Listening(Task):
        def on_train_start(self) -> None:
            told.extend(str(warning.message) for warning in caught)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(new(Listening), edge(start=start), epochs=2)
    (line,) = [line for line in told if "Quantize will never begin" in line]
    assert f"it begins at {start!r}, and this training ends before that (max_epochs=2; 1.0 is the end)" in line
    assert len([warning for warning in caught if "never" in str(warning.message)]) == 1


@pytest.mark.parametrize(
    ("phases", "message"), [([], "phases is empty"), ([Quantize(), Quantize()], "names a kind twice")]
)
def test_phases_that_make_no_sense_are_refused(phases: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EdgeCompressionCallback(phases)
