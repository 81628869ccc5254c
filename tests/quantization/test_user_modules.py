"""What users write: each works in int8, with the numbers to show it, or is refused with one clear error."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from test_compression import Network, Task, data, edge, fit, new
from torch import Tensor, nn

from lightning_edge.errors import CompressionError, RecordError
from lightning_edge.network import Inputs, flatten_outputs
from lightning_edge.quantization import attach, calibrate, convert, is_quantized, quantize, quantized_forward
from lightning_edge.quantization.train.layers import GraphDropout, StopGradient
from lightning_edge.record import load_compressed
from lightning_edge.user_warnings import EdgeWarning

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

F = nn.functional


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class User(nn.Module):
    """A convolution and a linear layer, and between them what a test is about."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.function(self, self.conv(images)).mean((2, 3)))
        return logits


def images(samples: int = 8) -> Tensor:
    return torch.randn(samples, 3, 8, 8)


def close_and_converted(network: nn.Module, make: Callable[[int], Any], tolerance: float = 0.05) -> nn.Module:
    """Quantize, compare with float, and compare the converted graph with what was quantized."""
    network.eval()
    batches = [make(16) for _ in range(3)]
    quantized = quantize(network, batches)
    inputs = Inputs.of(batches[0])
    with torch.no_grad():
        expected = flatten_outputs(network(*inputs.args, **inputs.kwargs))
        found = flatten_outputs(quantized(*inputs.args, **inputs.kwargs))
        shipped = flatten_outputs(convert(quantized)(*inputs.args, **inputs.kwargs))
    for e, f, s in zip(expected, found, shipped, strict=True):
        assert float((e - f).abs().max() / e.abs().max()) < tolerance
        torch.testing.assert_close(s, f, rtol=0, atol=float(e.abs().max()) / 100)
    return quantized


def write_into_part(_: nn.Module, y: Tensor) -> Tensor:
    y[:, :4] = torch.relu(y[:, :4])
    return y


def write_through_view(_: nn.Module, y: Tensor) -> Tensor:
    y.view(y.shape[0], -1).relu_()
    return y


def drop_always(_: nn.Module, y: Tensor) -> Tensor:
    return F.dropout(y, 0.3)


def autocast(_: nn.Module, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return y * 2 + 1


def autocast_within(_: nn.Module, y: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return autocast(_, y)


def autocast_off(_: nn.Module, y: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return y * 2 + 1


class Counting(User):
    def __init__(self) -> None:
        super().__init__(lambda _, y: y)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(images)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (User(write_into_part), "writes in place .*read through another view"),
        (User(write_through_view), "writes in place .*read through another view"),
        (User(drop_always), "drops values in evaluation too.*training=self.training"),
        (User(autocast), "turns torch.autocast on in forward"),
        (User(autocast_within), "turns torch.autocast on in forward"),
        (Counting(), "writes into its buffer 'seen'"),
        (
            User(lambda s, y: s.norm(y), norm=nn.BatchNorm2d(8, track_running_stats=False)),
            "keeps no running statistics",
        ),
    ],
    ids=["part", "view", "dropout", "autocast", "autocast within", "buffer", "statistics"],
)
def test_what_one_graph_cannot_do_is_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        quantize(network.eval(), [images()])


def test_parts_with_autocast_off_are_captured() -> None:
    close_and_converted(User(autocast_off), images)


def test_parts_with_autocast_off_are_told_in_mixed_precision() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(EdgeWarning, match="turns torch.autocast off"):
        quantize(User(autocast_off).eval(), [images()])


class Stars(User):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(args[0]) + kwargs["shift"]


def test_a_forward_with_stars_works() -> None:
    make = lambda n: Inputs((images(n),), {"shift": torch.randn(n, 4)})  # noqa: E731
    close_and_converted(Stars(lambda _, y: y), make)


class NormOverTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)).mean(2))
        return out


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (NormOverTokens(), (5, 6)),
        (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3)), (6,)),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 3)), (3, 12)),
    ],
    ids=["channels second behind a linear layer", "vectors", "sequences"],
)
def test_batch_norm_without_a_layer_before_it_is_a_layer_itself(network: nn.Module, shape: tuple[int, ...]) -> None:
    network.train()
    for _ in range(20):
        network(torch.randn(32, *shape) + 0.5)
    quantized = close_and_converted(network, lambda n: torch.randn(n, *shape) + 0.5)
    graph = quantized_forward(quantized)[1].bind()
    assert not any("batch_norm" in str(node.target) for node in graph.graph.nodes if node.op == "call_function")


class Attention(nn.Module):
    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mask = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), mask

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        return F.softmax(self.mask(scores), -1) @ self.value(x)


@pytest.mark.parametrize(
    "mask",
    [
        lambda scores: scores.masked_fill(torch.arange(5) > 3, -1e9),
        lambda scores: scores + torch.full((5, 5), float("-inf")).triu(1),
        lambda scores: scores + torch.where(torch.arange(5) > 3, torch.finfo(torch.float32).min, 0.0),
    ],
    ids=["masked_fill", "causal", "additive"],
)
def test_masked_attention_keeps_its_scores(mask: Callable[[Tensor], Tensor]) -> None:
    close_and_converted(Attention(mask), lambda n: torch.randn(n, 5, 8))


def no_grad_part(_: nn.Module, y: Tensor) -> Tensor:
    with torch.no_grad():
        return y * 2


def test_gradients_stop_where_the_user_stopped_them() -> None:
    for function in (no_grad_part, lambda _, y: y.detach()):
        network = User(function).train()
        calibrate_on = Inputs((images(),))
        attach(network, calibrate_on)
        calibrate(network, calibrate_on)
        network(images()).sum().backward()
        assert network.conv.weight.grad is None
        assert network.head.weight.grad is not None
        assert any(isinstance(module, StopGradient) for module in network.modules())
        assert torch.isfinite(convert(network)(images(2))).all()


class Standardized(nn.Conv2d):
    """Weights of mean zero and variance one, by BatchNorm's function, as BiT and timm have them."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.reshape(1, self.out_channels, -1)
        normal = F.batch_norm(weight, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, normal.reshape_as(self.weight), self.bias)


def test_standardized_weights_are_int8_and_learn() -> None:
    network = User(lambda s, y: s.standardized(y).relu(), standardized=Standardized(8, 8, 3))
    quantized = close_and_converted(network, images)
    assert not any("batch_norm" in str(node.target) for node in convert(quantized).graph.graph.nodes)  # type: ignore[union-attr]
    x = images(32)
    network.train()(x).square().sum().backward()
    expected = network.standardized.weight.grad  # type: ignore[union-attr]
    quantized.train()(x).square().sum().backward()
    found = quantized.standardized.weight.grad  # type: ignore[union-attr]
    assert float(F.cosine_similarity(found.flatten(), expected.flatten(), dim=0)) > 0.95  # type: ignore[union-attr, operator]


def test_statistics_of_a_batch_are_refused() -> None:
    network = User(lambda s, y: s.norm(y), norm=nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(CompressionError, match="keeps no running statistics"):
        attach(network, Inputs((images(),)))


def test_two_dropouts_in_a_row_both_drop() -> None:
    network = User(lambda s, y: s.second(s.first(y)), first=nn.Dropout(0.5), second=nn.Dropout2d(0.5)).train()
    attach(network, Inputs((images(),)))
    found = [module.operator for module in network.modules() if isinstance(module, GraphDropout)]
    assert found == [torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default]


class Frozen(Task):
    """A backbone in eval mode while the head trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net.features.append(nn.Dropout(0.5))
        self.net.features.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.net.features.eval()


@pytest.mark.parametrize("settings", [{}, {"fold_batch_norm": 4}], ids=["folded", "live"])
def test_what_the_user_froze_stays_frozen_and_resumes(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = new(Frozen)
    before = copy.deepcopy(whole.net.features.state_dict())
    fit(whole, edge(**settings), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    assert all(torch.equal(value, before[name]) for name, value in whole.net.features.state_dict().items())
    whole.train()
    whole.net.features.eval()
    x = next(iter(data()))[0]
    assert torch.equal(whole.net(x), whole.net(x))
    resumed = new(Frozen)
    fit(resumed, edge(**settings), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True)
    )


def test_forward_hooks_that_stop_running_are_told() -> None:
    network = User(lambda _, y: y)
    network.conv.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"Forward hooks inside User \(conv\) do not run"):
        attach(network, Inputs((images(),)))
    normed = User(lambda _, y: y)
    nn.utils.weight_norm(normed.head)  # its hook computes the weight, and is part of the graph
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attach(normed, Inputs((images(),)))
    assert not [warning for warning in told if "Forward hooks" in str(warning.message)]


def test_a_pickle_is_refused_and_a_copy_is_not() -> None:
    quantized = quantize(User(lambda _, y: y).eval(), [images()])
    with pytest.raises(CompressionError, match=r"quantized User cannot be pickled.*load_compressed"):
        pickle.dumps(quantized)
    x = images()
    assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))


class Built(Task):
    """Makes its network in configure_model."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.losses: list[float] = []
        self.net: Any = None

    def configure_model(self) -> None:
        self.net = self.net or Network()


def test_a_network_built_in_configure_model_is_found_and_resumed(tmp_path: Path) -> None:
    user = new(Built)
    fit(user, edge(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    resumed = new(Built)
    fit(resumed, edge(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert is_quantized(user.net)
    assert is_quantized(resumed.net)


def test_checkpoints_of_weights_only_carry_the_record(tmp_path: Path) -> None:
    user = new()
    trainer = fit(user, edge(), ModelCheckpoint(tmp_path, "last", save_weights_only=True))
    x = next(iter(data()))[0]
    user.eval()
    assert torch.equal(load_compressed(tmp_path / "last.ckpt", new()).net(x), user.net(x))  # type: ignore[operator]
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.equal(load_compressed(tmp_path / "after.ckpt", new()).net(x), user.net(x))  # type: ignore[operator]
    trainer.save_checkpoint(tmp_path / "bare.ckpt", weights_only=True)
    with pytest.raises(RecordError, match="no record of what was quantized"):
        load_compressed(tmp_path / "bare.ckpt", new())


class Hooked(Task):
    """Sets its load hook on the instance, and saves something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[Any] = []
        self.on_load_checkpoint = lambda checkpoint: self.loaded.append(checkpoint["mine"])  # type: ignore

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 7


def test_the_users_own_checkpoint_hooks_run_and_stay(tmp_path: Path) -> None:
    fit(new(Hooked), edge(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    resumed = new(Hooked)
    hook = resumed.on_load_checkpoint
    fit(resumed, edge(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert resumed.loaded == [7]
    assert resumed.on_load_checkpoint is hook
    assert "on_save_checkpoint" not in vars(resumed)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: EMAWeightAveraging(), "EMAWeightAveraging averages every buffer"),
        (lambda: StochasticWeightAveraging(1e-2), "StochasticWeightAveraging learns BatchNorm's statistics anew"),
    ],
)
def test_averaging_that_would_break_int8_is_refused(callback: Callable[[], L.Callback], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        fit(new(), edge(), callback())


class Iterating(Task):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return F.cross_entropy(self.predict(batch[0]), batch[1])


def test_a_step_that_takes_the_iterator_is_refused() -> None:
    with pytest.raises(CompressionError, match="takes dataloader_iter"):
        fit(new(Iterating), edge())


def test_a_network_quantized_by_another_callback_is_refused() -> None:
    user = new()
    callback = edge()
    fit(user, callback)
    fit(user, callback, epochs=5)
    with pytest.raises(CompressionError, match="was quantized before, and not by this callback"):
        fit(user, edge())


class Tempered(Task):
    """One network, a parameter beside it, and no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def predict(self, x: Tensor) -> Tensor:
        return super().predict(x) * self.temperature


def test_a_parameter_beside_the_only_network_does_not_hide_it() -> None:
    user = new(Tempered)
    fit(user, edge())
    assert is_quantized(user.net)
