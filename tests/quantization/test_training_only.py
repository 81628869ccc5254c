"""What networks do in training only, and those that are written differently for the two modes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_compression import Task, edge, fit, new
from test_user_modules import User, close_and_converted, images
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.exporters import export
from lightning_edge.network import Inputs
from lightning_edge.quantization import attach, calibrate, convert, detach, is_quantized, quantize
from lightning_edge.quantization.capture import train_eval_graph
from lightning_edge.quantization.capture.exported import exported
from lightning_edge.quantization.train.layers import GraphDropout

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class DropPath(nn.Module):
    """Stochastic depth as timm writes it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


class Noise(nn.Module):
    """Noise on activations."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class Auxiliary(nn.Module):
    """Gives a second value in training."""

    def forward(self, x: Tensor) -> Any:
        return (x, x.mean()) if self.training else x


class Residual(nn.Module):
    """A block with a layer that only training sees on its branch."""

    def __init__(self, regularizer: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.regularizer = regularizer
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        kept = self.regularizer(self.second(x))
        logits: Tensor = self.head((x + (sum(kept) if isinstance(kept, tuple) else kept)).mean((2, 3)))
        return logits


def trained(network: nn.Module, images: Tensor) -> nn.Module:
    attach(network, Inputs.of(images))
    calibrate(network, Inputs.of(images))
    for module in network.modules():
        if hasattr(module, "disable_observer"):
            module.disable_observer()  # ranges do not move between two calls
    return network.train()


@pytest.mark.parametrize("regularizer", [DropPath(0.5), Noise()], ids=["stochastic depth", "noise"])
def test_random_layers_go_on_in_training_only(regularizer: nn.Module) -> None:
    network, images = Residual(copy.deepcopy(regularizer)), torch.randn(16, 3, 6, 6)
    state = torch.random.get_rng_state()
    trained(network, images)
    assert torch.equal(torch.random.get_rng_state(), state)  # looking for such layers draws nothing
    assert not torch.equal(network(images), network(images))
    network.regularizer.eval()  # type: ignore[union-attr]
    assert torch.equal(network(images), network(images))
    network.train().eval()
    assert torch.equal(network(images), network(images))
    plain = quantize(Residual(nn.Identity()).eval(), [images])
    assert torch.isfinite(plain(images)).all()
    files = convert(network).graph
    assert not any(node.op == "call_module" or "bernoulli" in str(node.target) for node in files.graph.nodes)  # type: ignore[union-attr]


def test_a_copy_has_its_own_layer() -> None:
    images = torch.randn(16, 3, 6, 6)
    network = trained(Residual(DropPath(0.5)), images)
    other = copy.deepcopy(network)
    other.regularizer.rate = 0.0  # type: ignore[union-attr, assignment]
    assert torch.equal(other(images), other(images))
    assert not torch.equal(network(images), network(images))


def test_stochastic_depth_is_what_the_user_wrote() -> None:
    """A sample's branch is kept, and scaled, or dropped as a whole."""
    network, images = trained(Residual(DropPath(0.5)), torch.randn(64, 3, 6, 6)), torch.randn(64, 3, 6, 6)
    outputs = network(images).detach()
    network.regularizer.rate = 0.0  # type: ignore[union-attr, assignment]
    whole = network(images).detach()
    network.second.weight.data.zero_()  # type: ignore[union-attr, operator]
    network.second.bias.data.zero_()  # type: ignore[union-attr, operator]
    dropped = network(images).detach()
    step = float(whole.abs().max()) / 20
    away = (outputs - dropped).abs().amax(1)
    assert 16 < int((away < step / 4).sum()) < 48
    assert not torch.allclose(outputs, whole, atol=step)


def test_what_changes_its_form_in_training_is_refused() -> None:
    with pytest.raises(CompressionError, match=r"Residual computes something else in training.*mean"):
        attach(Residual(Auxiliary()), Inputs.of(torch.randn(4, 3, 6, 6)))


class WithDepth(Task):
    """The task's network with stochastic depth before its head."""

    def __init__(self) -> None:
        super().__init__()
        self.net.features.append(DropPath(0.5))


def test_stochastic_depth_in_fit_resumes_exactly(tmp_path: Path) -> None:
    whole = new(WithDepth)
    fit(whole, edge(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    assert any(isinstance(module, GraphDropout) for module in whole.modules())
    losses = [new(WithDepth), new(WithDepth)]
    for resumed in losses:
        torch.manual_seed(7)  # Lightning does not keep random states in checkpoints
        fit(resumed, edge(), ckpt_path=tmp_path / "epoch=2.ckpt")
    first, second = (module.state_dict() for module in losses)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


class CachedBiases(nn.Module):
    """Attention biases as LeViT keeps them: looked up in training, remembered in evaluation."""

    def __init__(self, *, wrong: bool = False) -> None:
        super().__init__()
        self.layer, self.biases = nn.Linear(6, 8), nn.Parameter(torch.randn(4))
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("places", torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]), persistent=False)
        self.head, self.cache = nn.Linear(8, 3), {}  # type: ignore[var-annotated]
        self.wrong = wrong

    def train(self, mode: bool = True) -> CachedBiases:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            biases = self.biases[self.places] * (2 if self.wrong else 1)
        else:
            if "all" not in self.cache:
                self.cache["all"] = self.biases[self.places]
            biases = self.cache["all"]
        logits: Tensor = self.head(self.drop(self.norm(self.layer(x)) + biases).relu())
        return logits


class MadeOnEval(CachedBiases):
    """As EfficientFormer keeps them: made by ``eval()``, gone with ``train()``."""

    def train(self, mode: bool = True) -> MadeOnEval:
        super().train(mode)
        if mode and hasattr(self, "made"):
            del self.made
        elif not mode:
            self.made = self.biases[self.places].detach()
        return self

    def forward(self, x: Tensor) -> Tensor:
        biases = self.biases[self.places] if self.training else self.made
        logits: Tensor = self.head(self.drop(self.norm(self.layer(x)) + biases).relu())
        return logits


@pytest.mark.parametrize("kind", [CachedBiases, MadeOnEval])
@pytest.mark.parametrize("training", [True, False])
def test_what_evaluation_remembers_is_learnt_and_converted(kind: type[CachedBiases], training: bool) -> None:
    network, x = kind().train(training), torch.randn(32, 6)
    network.norm.eval()  # by itself, as users freeze it
    attach(network, Inputs.of(x))
    assert network.training is training
    assert not network.norm.training
    calibrate(network, Inputs.of(x))
    network.train()(x).sum().backward()
    assert network.biases.grad is not None
    assert float(network.biases.grad.abs().sum()) > 0
    before = network.eval()(x).detach()
    network.biases.data.add_(1.0)
    after = network(x).detach()
    assert float((after - before).abs().max()) > 0.01  # evaluation sees what was learnt
    torch.testing.assert_close(convert(network)(x), after, rtol=0, atol=float(after.abs().max()) / 50)
    assert not torch.equal(network.train()(x), network(x))  # dropout goes on


def test_the_float_network_forgets_what_capturing_left_in_it() -> None:
    network, x = CachedBiases().eval(), torch.randn(8, 6)
    with torch.no_grad():
        expected = network(x)
    float_network = copy.deepcopy(network)
    attach(network, Inputs.of(x))
    detach(network)
    assert torch.equal(network(x), expected)
    assert torch.isfinite(quantize(float_network, [x])(x)).all()
    assert torch.equal(float_network(x), expected)


def test_what_cannot_be_copied_is_told() -> None:
    network, x = CachedBiases().eval(), torch.randn(8, 6)
    network(x)  # with gradients: what it keeps is no leaf
    with pytest.raises(CompressionError, match=r"CachedBiases cannot be copied.*results of earlier calls"):
        quantize(network, [x])
    with pytest.raises(CompressionError, match=r"CachedBiases cannot be copied"):
        export(network, "onnx", "net.onnx", inputs=x)


def test_modes_that_compute_different_values_are_refused() -> None:
    with pytest.raises(CompressionError, match=r"CachedBiases computes something else in training.*to other values"):
        attach(CachedBiases(wrong=True), Inputs.of(torch.randn(8, 6)))


class Skipping(User):
    """Leaves everything out by chance in training, decided by a random number as LayerDrop does."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training and torch.rand([]) < 0.9:
            return super().forward(images * 0)
        return super().forward(images)


class Doubled(User):
    """Gives something else in training."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (2 if self.training else 1)


class Otherwise(User):
    """Gives the other one of two halves in training."""

    def forward(self, images: Tensor) -> Tensor:
        parts = super().forward(images).chunk(2, 1)
        return parts[1 if self.training else 0]


class Checked(User):
    """Looks at values in training, as DETR does for infinite ones."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training and torch.isinf(images).any():
            return super().forward(images.clamp(-1, 1))
        return super().forward(images)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Checked, "cannot be captured"),
        (Doubled, r"in training than in evaluation: aten\.mul\.Tensor.*, 2\)"),
        (Otherwise, r"in training than in evaluation: .*getitem"),
    ],
)
def test_what_training_alone_does_matters_for_training_alone(kind: type[User], message: str) -> None:
    network = kind(lambda _, y: y.relu())
    close_and_converted(network, images)
    with pytest.raises(CompressionError, match=message):
        attach(network, Inputs.of(images()))


def test_layers_that_are_left_out_by_chance_all_run_in_int8() -> None:
    network, batch = Skipping(lambda _, y: y.relu()), images()
    expected = network.eval()(batch)
    quantized = close_and_converted(network, images)  # nothing to tell of: nothing is trained
    assert is_quantized(quantized)
    with pytest.warns(UserWarning, match="which layers run, as LayerDrop does.*all of them run"):
        attach(network.train(), Inputs.of(batch))
    for _ in range(5):
        torch.testing.assert_close(network(batch), expected, rtol=0, atol=float(expected.abs().max()) / 20)


@pytest.mark.parametrize(("trained", "expected"), [(False, [True]), (True, [True, False])])
def test_one_capture_is_for_any_batch(trained: bool, expected: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes in symbols take most of the time; x[:, 0] and a size in a reshape do not ask for them twice."""
    any_batch: list[bool] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        any_batch.append(kwargs.get("any_batch", True))
        return exported(*args, **kwargs)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(6, 4), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.layer(x.reshape(x.shape[0] * 2, 6))).reshape(x.shape[0], 2, 4)[:, 0]

    monkeypatch.setattr(train_eval_graph, "exported", counted)
    graph = train_eval_graph.capture_modes(First(), Inputs.of(torch.randn(2, 12)), trained=trained)
    assert any_batch == expected
    assert graph(torch.randn(5, 12)).shape == (5, 4)
