"""Networks that users brought and that failed once: each is one of a kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_user_modules import User, close_and_converted, images
from torch import Tensor, nn
from torch.nn import functional

from lightning_edge.errors import CompressionError
from lightning_edge.exporters.passes.precision import float_layers, float_products, int8_weight_count
from lightning_edge.network import Inputs
from lightning_edge.quantization import attach, convert, quantize
from lightning_edge.quantization.capture.graph import capture
from lightning_edge.quantization.phase import Quantize
from lightning_edge.quantization.trial import try_out
from lightning_edge.schedule import Clock

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "activation",
    [lambda y: functional.celu(y, 0.5), functional.celu, functional.selu],
    ids=["celu of 0.5", "celu", "selu"],
)
def test_celu_and_selu_are_elus_of_scaled_values(activation: Callable[[Tensor], Tensor]) -> None:
    network = User(lambda _, y: activation(y)).eval()
    graph = capture(network, Inputs.of(images())).graph
    found = {str(node.target) for node in graph.graph.nodes}
    assert "aten.elu.default" in found
    assert not found & {"aten.celu.default", "aten.selu.default"}
    x = images(5)
    torch.testing.assert_close(graph(x), network(x), rtol=1e-5, atol=1e-6)
    close_and_converted(network, images)


@pytest.mark.parametrize(
    "feature",
    [
        lambda y: torch.log(y.square() + 1e-6),
        lambda y: torch.log10(y.abs().clamp(min=1e-5)),
        lambda y: torch.log1p((y * y).mean((2, 3), keepdim=True) * 1e-3),
    ],
    ids=["energy", "clamped", "mean"],
)
def test_what_a_logarithm_is_taken_of_stays_float(feature: Callable[[Tensor], Tensor]) -> None:
    quantized = quantize(User(lambda _, y: feature(y)).eval(), [images() for _ in range(3)])
    graph = quantized.edge_quantizers._graph  # type: ignore[union-attr]
    (log,) = [node for node in graph.graph.nodes if "log" in str(node.target)]
    source = log.args[0]
    while source.op == "call_function" and "conv" not in str(source.target):
        source = source.args[0]
    # The first quantizer on the way back is the one behind the convolution.
    assert source.op == "call_module"
    assert "conv" in str(source.args[0].target)
    x = images(4)
    assert torch.isfinite(quantized(x)).all()


def test_len_of_a_tensor_is_its_batch_size() -> None:
    token = nn.Parameter(torch.randn(1, 1, 6))

    class Classed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.token, self.head = nn.Linear(6, 6), token, nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            joined = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
            logits: Tensor = self.head(joined.mean(1))
            return logits

    quantized = close_and_converted(Classed(), lambda samples: torch.randn(samples, 4, 6))
    assert quantized(torch.randn(1, 4, 6)).shape == (1, 2)
    assert len([1, 2]) == 2  # Python's own again


def test_a_batch_size_made_a_number_is_told_as_such() -> None:
    network = User(lambda _, y: torch.cat([y[at : at + 1] for at in range(int(y.shape[0]))]))
    with pytest.raises(CompressionError, match=r"makes the number 2 of the batch size.*write x\.shape\[0\]"):
        quantize(network.eval(), [images()])


def test_spectral_norm_trains_in_int8() -> None:
    network = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4))
    batches = [torch.randn(16, 8) for _ in range(20)]
    attach(network.train(), Inputs.of(batches[0]), averaging=0.1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    losses = []
    for x in batches:
        loss = (network(x) - x[:, :4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    weight = network[0].weight
    largest = float(torch.linalg.matrix_norm(weight, 2))
    assert abs(largest - 1) < 0.05  # along the vectors of the first step, still nearly the norm


@pytest.mark.parametrize("post_training", [False, True])
def test_a_value_without_a_range_names_its_layer(post_training: bool) -> None:
    network = User(lambda m, y: m.inverse(y), inverse=Inverse())

    def run() -> None:
        if post_training:
            quantize(network.eval(), [images()])
        else:
            attach(network.train(), Inputs.of(images()))
            network(images())

    with pytest.raises(CompressionError, match=r"not finite.*from 'reciprocal' in 'inverse'; skip=\['inverse'\] keeps"):
        run()


class Inverse(nn.Module):
    """Divides by what is 0 in int8 and in float."""

    def forward(self, y: Tensor) -> Tensor:
        return 1 / (y * 0)


class Branches(nn.Module):
    """Decides by a value, as no graph can."""

    def forward(self, y: Tensor) -> Tensor:
        return y.relu() if bool(y.sum() > 0) else -y


class FirstBatch:
    """A batch of training."""

    def __init__(self) -> None:
        self.images = images()

    def inputs(self) -> Inputs:
        return Inputs.of(self.images)

    def gradients(self, *, per_sample: bool = False) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("part", "message"),
    [(Inverse(), r"not finite.*skip=\['part'\] keeps"), (Branches(), "must not branch on values")],
)
def test_what_cannot_be_quantized_is_found_with_the_first_batch(part: nn.Module, message: str) -> None:
    network = User(lambda m, y: m.part(y), part=part).train()
    with pytest.raises(CompressionError, match=message):
        Quantize(start=5).plan(network, Clock(0, 0.0), [], FirstBatch())


def test_the_trial_is_made_once_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    network, calls = User(lambda _, y: y).train(), []
    monkeypatch.setattr("lightning_edge.quantization.phase.try_out", lambda *args: calls.append(try_out(*args)))
    network.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    batch, phase = FirstBatch(), Quantize(start=5)
    random_state = torch.random.get_rng_state()
    for epoch in range(3):
        assert phase.plan(network, Clock(epoch, epoch / 10), [], batch) is None
    assert len(calls) == 1
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert network.training
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_network_fed_nan_is_told_which_input_holds_it() -> None:
    x = images()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(CompressionError, match="input 'images' holds it"):
        quantize(User(lambda _, y: y).eval(), [x])


def test_convolutions_of_volumes_are_int8() -> None:
    network = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 4, 3, padding="same")
    ).eval()
    graph = convert(quantize(network, [torch.randn(2, 2, 3, 4, 4)])).graph
    assert int8_weight_count(graph, without_zeros=False) == 4 * 2 * 27 + 4 * 4 * 27
    assert not float_layers(graph)
    assert float_products(graph) == ["conv3d", "conv3d"]  # LiteRT and ExecuTorch have no int8 kernel for them
