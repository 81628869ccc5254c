"""Recurrent layers written out step by step: the same values, one quantizer for all steps, a state in float."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from lightning_edge import convert, quantize
from lightning_edge.network import Inputs
from lightning_edge.quantization import Quantize
from lightning_edge.quantization.capture.graph import capture
from lightning_edge.quantization.network import attach
from lightning_edge.quantization.post_training import calibrate
from lightning_edge.surgery import in_mode
from lightning_edge.user_warnings import EdgeWarning

STEPS, WIDTH = 4, 6


class Sequence(nn.Module):
    """A recurrent layer over a sequence, and a linear one on its last step."""

    def __init__(self, kind: type[nn.RNNBase], **settings: bool | int | float) -> None:
        super().__init__()
        self.memory = kind(5, WIDTH, **settings)
        self.head = nn.Linear(WIDTH * (2 if settings.get("bidirectional") else 1), 3)

    def forward(self, sounds: Tensor) -> tuple[Tensor, Tensor]:
        if not self.memory.batch_first:
            sounds = sounds.transpose(0, 1)
        outputs, states = self.memory(sounds)
        hidden = states[0] if isinstance(states, tuple) else states
        return self.head(outputs[:, -1] if self.memory.batch_first else outputs[-1]), hidden.transpose(0, 1)


class Cells(nn.Module):
    """Cells that the network calls in a loop of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRUCell(5, WIDTH)
        self.second = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, sounds: Tensor) -> Tensor:
        hidden = torch.zeros(len(sounds), WIDTH)
        states = None
        for step in range(STEPS):
            hidden = self.first(sounds[:, step], hidden)
            states = self.second(hidden, states)
        assert states is not None
        return states[0]


class Stream(nn.Module):
    """One step of a network for streaming: its states go in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.memory = nn.GRU(5, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, sound: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        outputs, last = self.memory(self.layer(sound).relu().unsqueeze(1), states.transpose(0, 1).contiguous())
        return self.head(outputs[:, 0]), last.transpose(0, 1)


class Decoder(nn.Module):
    """A recurrent layer whose first state is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.bridge = nn.Linear(5, WIDTH)
        self.memory = nn.GRU(5, WIDTH, batch_first=True)

    def forward(self, sounds: Tensor) -> Tensor:
        outputs: Tensor = self.memory(sounds, self.bridge(sounds[:, 0]).unsqueeze(0))[0]
        return outputs


@cache
def sounds(steps: int = STEPS) -> Tensor:
    return torch.randn(32, steps, 5, generator=torch.Generator().manual_seed(0))


def operations(graph: nn.Module) -> Counter[str]:
    assert isinstance(graph, torch.fx.GraphModule)
    return Counter(getattr(node.target, "__name__", "").split(".")[0] for node in graph.graph.nodes)


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(lambda: Sequence(nn.GRU, batch_first=True), id="gru"),
        pytest.param(lambda: Sequence(nn.LSTM), id="lstm-steps-first"),
        pytest.param(
            lambda: Sequence(nn.GRU, num_layers=2, bidirectional=True), id="gru-both-ways", marks=pytest.mark.slow
        ),
        pytest.param(lambda: Sequence(nn.LSTM, num_layers=2, bidirectional=True, bias=False), id="lstm-both-ways"),
        pytest.param(Cells, id="cells"),
    ],
)
def test_steps_compute_what_the_layer_does(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    built = network().eval()
    graph = capture(built, Inputs((sounds(),), {}), trained=False, steps_written_out={}).graph
    assert not {"gru", "lstm", "gru_cell", "lstm_cell"} & set(operations(graph))
    for size in (1, 32):
        torch.testing.assert_close(graph(sounds()[:size]), built(sounds()[:size]), atol=1e-6, rtol=1e-5)


def test_all_steps_share_weights_and_ranges() -> None:
    torch.manual_seed(0)
    network = Sequence(nn.GRU, batch_first=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", EdgeWarning)  # a first state of zeros is no empty range
        quantized = quantize(network, [sounds()])
        converted = convert(quantized)
    expected, outputs = network(sounds())[0], quantized(sounds())[0]
    noise = (outputs - expected).square().mean()
    assert 10 * torch.log10(expected.var() / noise) > 30
    assert torch.equal(converted.graph(sounds())[0], outputs)
    found = operations(converted.graph)
    assert found["linear"] == 2 + STEPS
    weights = [tensor for tensor in converted.graph.state_dict().values() if tensor.dtype == torch.int8]
    assert sum(weight.numel() for weight in weights) == 3 * WIDTH * (5 + WIDTH) + 3 * WIDTH
    # The state that U multiplies has one scale in all steps, and so has its product.
    steps = [node for node in converted.graph.graph.nodes if "linear" in str(node.target)][1:-1]
    assert len({node.args[0].args[1:3] for node in steps}) == 1
    assert steps[0].args[0].args[1:3] == (1 / 128, 0)
    assert len({next(iter(node.users)).args[1:3] for node in steps}) == 1


def test_a_layer_learns_through_its_steps_and_checkpoints_fit() -> None:
    torch.manual_seed(0)
    network = Sequence(nn.LSTM, num_layers=2, dropout=0.5).train()
    twin = copy.deepcopy(network)
    child = attach(network, Inputs((sounds(),), {}))
    calibrate(network, Inputs((sounds(),), {}))
    network(sounds())[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.memory.parameters())
    assert not torch.equal(network(sounds())[0], network(sounds())[0])  # the dropout between the layers
    with torch.no_grad(), in_mode(network, training=False):
        ours = network(sounds())[0]
        torch.testing.assert_close(child.bind()(sounds())[0], ours)  # as converted, and as run
    attach(twin, Inputs((sounds(),), {}))
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin.eval()(sounds())[0], ours)


def test_states_pass_from_step_to_step_in_float() -> None:
    torch.manual_seed(0)
    network = Stream().eval()
    sequence, states = sounds(24), torch.rand(32, 2, WIDTH) * 2 - 1
    quantized = quantize(network, [(sequence[:, 0], states)])
    graph = convert(quantized).graph
    *_, output = graph.graph.nodes
    assert "dequantize" in str(output.args[0][0].target)
    assert "dequantize" not in str(output.args[0][1].target)
    by_name = {node.name: node for node in graph.graph.nodes}
    assert not any("quantize" in str(user.target) for user in by_name["states"].users)
    expected, ours = torch.zeros(32, 2, WIDTH), torch.zeros(32, 2, WIDTH)
    for step in range(24):
        expected = network(sequence[:, step], expected)[1]
        ours = quantized(sequence[:, step], ours)[1]
    noise = (ours - expected).square().mean() / expected.var()
    assert noise.item() < 0.003


def test_layers_that_are_skipped_stay_whole() -> None:
    network = Sequence(nn.GRU, batch_first=True).eval()
    found = operations(convert(quantize(network, [sounds()], skip=["memory"])).graph)
    assert (found["gru"], found["linear"]) == (1, 1)


@pytest.mark.parametrize(
    ("network", "steps", "reason"),
    [
        (lambda: Sequence(nn.GRU, batch_first=True), 17, "memory stays float in the int8 network: it makes 17 steps"),
        pytest.param(
            lambda: Sequence(nn.RNN, batch_first=True), 4, "only GRU and LSTM", marks=pytest.mark.slow, id="plain"
        ),
        (Decoder, 4, "its first state is neither zero"),
    ],
)
def test_layers_that_stay_whole_are_told(network: type[nn.Module], steps: int, reason: str) -> None:
    with pytest.warns(EdgeWarning, match=reason):
        graph = capture(network().eval(), Inputs((sounds(steps),), {}), trained=False, steps_written_out={}).graph
    assert {"gru", "rnn_tanh"} & set(operations(graph))


def test_checkpoints_of_earlier_versions_keep_layers_whole() -> None:
    zeros = torch.zeros(2, STEPS, 5)
    change = {"kind": "attach", "averaging": 0.01, "live_batch_norm": False, "written_out": True}
    network = Sequence(nn.GRU, batch_first=True)
    Quantize.perform(network, {**change, "args": [zeros], "kwargs": {}})
    assert operations(network.edge_quantizers.bind())["gru"] == 1
