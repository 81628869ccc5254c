"""torch.compile through the whole schedule: before the switch, across it, frozen, in evaluation, converted."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import EdgeCompressionCallback, Quantize
from lightning_edge.network import Inputs
from lightning_edge.quantization import attach, calibrate, convert, quantized_forward


def small() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    for _ in range(3):
        network(torch.randn(4, 1, 6, 6))
    return network


def agree(compiled: Any, inside: nn.Module, eager: nn.Module, seed: int, tolerance: float) -> None:
    """Take the same step with both; compare outputs, gradients, ranges and statistics."""
    outputs = []
    for called, network in ((compiled, inside), (eager, eager)):
        torch.manual_seed(seed)
        network.zero_grad()
        outputs.append(called(torch.randn(4, 1, 6, 6)))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=tolerance)
    for a, b in zip(inside.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=max(tolerance, 1e-5))
    state = eager.state_dict()
    for name, value in inside.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_compiled_network_goes_through_the_whole_schedule(backend: str) -> None:
    torch._dynamo.reset()
    inside = small()
    inside[3] = nn.Dropout(0.0)  # a compiler draws other random numbers
    eager = copy.deepcopy(inside)
    counter: Any = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(inside, backend=counter)
    # Inductor's own order of additions: where it lands on another level, one step of the output.
    tolerance = 0.0 if backend == "aot_eager" else 0.02
    agree(compiled, inside, eager, 0, max(tolerance, 1e-6))
    frames = [counter.frame_count]
    images = torch.randn(4, 1, 6, 6)
    for network in (inside, eager):
        attach(network, Inputs.of(images), live_batch_norm=True)
        calibrate(network, Inputs.of(images))
    changes: list[Any] = [
        lambda child: None,
        lambda child: child.fold_batch_norms(),
        lambda child: child.freeze_observers(),
    ]
    for change in changes:
        for network in (inside, eager):
            change(quantized_forward(network)[1])
        calls = quantized_forward(inside)[1].calls
        for seed in range(3):
            agree(compiled, inside, eager, seed, tolerance)
        assert quantized_forward(inside)[1].calls == calls + 3
        frames.append(counter.frame_count)
    # Compiled once for each part of the schedule, as one graph, and not in each step again.
    assert frames == [1, 2, 3, 4]
    inside.eval()
    with torch.no_grad():
        torch.testing.assert_close(convert(inside)(images), compiled(images), rtol=0, atol=max(tolerance, 1e-6))


@pytest.mark.slow
def test_a_later_batch_of_another_size_is_taken() -> None:
    torch._dynamo.reset()
    network = small().train()
    compiled = torch.compile(network, backend="aot_eager")
    attach(network, Inputs.of(torch.randn(4, 1, 6, 6)))
    calibrate(network, Inputs.of(torch.randn(4, 1, 6, 6)))
    assert [len(compiled(torch.randn(size, 1, 6, 6))) for size in (4, 3, 2)] == [4, 3, 2]


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = torch.compile(small(), backend="aot_eager")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.slow
def test_a_compiled_network_trains_through_the_switch_in_a_fit() -> None:
    torch._dynamo.reset()
    data = DataLoader(TensorDataset(torch.randn(16, 1, 6, 6), torch.randint(0, 3, (16,))), 4)
    task = Task()
    phase = Quantize(start=1, freeze_observers=2)
    trainer = L.Trainer(
        max_epochs=3,
        callbacks=[EdgeCompressionCallback([phase])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, data)
    network, child = quantized_forward(task)
    assert child.calls >= 8
    assert child.frozen
    images = torch.randn(4, 1, 6, 6)
    network.eval()
    torch.testing.assert_close(convert(task)(images), network(images), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_network_may_be_the_first_to_observe() -> None:
    torch._dynamo.reset()
    network = small().train()
    attach(network, Inputs.of(torch.randn(4, 1, 6, 6)))
    compiled = torch.compile(network, backend="aot_eager")
    for _ in range(2):
        compiled(torch.randn(4, 1, 6, 6)).sum().backward()
    images = torch.randn(4, 1, 6, 6)
    network.eval()
    torch.testing.assert_close(convert(network)(images), network(images), rtol=0, atol=1e-6)
