"""Linear layers with one scale for their whole weight: in training, in checkpoints and in the files."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edge.errors import RecordError
from lightning_edge.exporters import export, target
from lightning_edge.exporters.passes.graph import operation
from lightning_edge.network import Inputs
from lightning_edge.quantization import Quantize, convert, quantize
from lightning_edge.record import check_agreement, settings_of
from lightning_edge.schedule import Change, Clock


class Mixed(nn.Sequential):
    """A convolution, and two linear layers with a BatchNorm between them; 120 outputs of these."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64), nn.BatchNorm1d(64), nn.Linear(64, 56)
        )


class Batch:
    """What a phase asks of the batch at hand."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def inputs(self) -> Inputs:
        return Inputs.of(self.images)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def images() -> Tensor:
    return torch.randn(8, 3, 6, 6)


def stored(network: nn.Module) -> Counter[str]:
    """How the weights of a quantized network are dequantized."""
    graph: Any = convert(network).graph
    return Counter(
        operation(node)
        for node in graph.graph.nodes
        if operation(node).startswith("dequantize_") and node.args[0].op == "get_attr"
    )


def train(network: nn.Module, phase: Quantize, changes: list[Change], steps: range) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    network.train()
    for step in steps:
        torch.manual_seed(step)
        batch: Any = Batch(images())
        while (change := phase.plan(network, Clock(step // 2, None), changes, batch)) is not None:
            Quantize.perform(network, change)
            phase.prime(network, change, batch)
            changes.append(change)
        optimizer.zero_grad()
        network(batch.images).square().mean().backward()
        optimizer.step()


def test_linear_layers_have_one_scale_and_convolutions_keep_theirs() -> None:
    network = Mixed().eval()
    assert stored(quantize(network, [images()])) == {"dequantize_per_channel": 3}
    whole = quantize(network, [images()], linear_weights="per_tensor")
    assert stored(whole) == {"dequantize_per_channel": 1, "dequantize_per_tensor": 2}
    x = images()
    assert torch.equal(convert(whole)(x), whole(x))


def test_training_resumes_exactly_and_ships_what_it_trained(tmp_path: Path) -> None:
    phase = Quantize(start=1, fold_batch_norm=4, freeze_observers=3, linear_weights="per_tensor")
    network, changes = Mixed(), list[Change]()
    fresh = copy.deepcopy(network)
    train(network, phase, changes, range(5))
    assert phase.describe(changes[0]).endswith("one scale for each linear layer's weight")
    torch.save({"changes": changes, "weights": network.state_dict()}, tmp_path / "checkpoint.pt")
    train(network, phase, changes, range(5, 10))

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for change in saved["changes"]:
        Quantize.perform(fresh, change)
    fresh.load_state_dict(saved["weights"])
    train(fresh, phase, saved["changes"], range(5, 10))
    for (name, ours), (_, theirs) in zip(fresh.state_dict().items(), network.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    assert stored(fresh.eval())["dequantize_per_tensor"] == 2
    x = images()
    assert torch.equal(convert(fresh)(x), fresh(x))


def test_a_checkpoint_with_other_scales_is_refused_and_one_from_before_is_taken() -> None:
    whole = {"settings": settings_of([Quantize(linear_weights="per_tensor")])}
    with pytest.raises(RecordError, match="linear_weights: checkpoint 'per_tensor'; this run None"):
        check_agreement(whole, [Quantize()])
    before = settings_of([Quantize()])
    assert "linear_weights" not in before["quantize"]
    check_agreement({"settings": before}, [Quantize()])
    check_agreement(whole, [Quantize(linear_weights="per_tensor")])


def test_another_word_is_refused_with_the_two_there_are() -> None:
    with pytest.raises(ValueError, match=r"linear_weights='row' is not one of \('per_channel', 'per_tensor'\)"):
        Quantize(linear_weights="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="linear_weights='row'"):
        quantize(Mixed(), [images()], linear_weights="row")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("coreml", "executorch", "tflite"))]
)
def test_files_compute_the_same_and_are_smaller(tmp_path: Path, name: str) -> None:
    module = target(name)
    for needed in module.needs:
        pytest.importorskip(needed)
    network, x = Mixed().eval(), images()
    sizes = {}
    for scales in ("per_channel", "per_tensor"):
        converted = convert(quantize(network, [x], linear_weights=scales))
        artifact = export(converted, name, tmp_path / f"{scales}{module.suffix}", batches=[x])
        assert artifact.contents.float_compute_ops == ()
        assert artifact.contents.int8_weight_bytes == 8 * 27 + 128 * 64 + 64 * 56
        assert artifact.agreement is not None
        assert artifact.agreement.max_steps is not None
        assert artifact.agreement.max_steps < 1.5
        sizes[scales] = artifact.size_bytes
    assert sizes["per_channel"] - sizes["per_tensor"] >= 4 * (64 + 56 - 2)


class Product(nn.Module):
    """Linear layers as products with matrices, which are stored the other way around: as GPT-2's Conv1D."""

    def __init__(self, like: nn.Linear, added: bool) -> None:
        super().__init__()
        self.matrix = nn.Parameter(like.weight.detach().T.contiguous())
        self.row = nn.Parameter(like.bias.detach().clone()) if added else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix if self.row is None else torch.addmm(self.row, x, self.matrix)


def around(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), layer, nn.ReLU(), nn.Linear(5, 3)).eval()


@pytest.mark.parametrize("added", [False, True])
def test_products_with_a_matrix_are_linear_layers(added: bool) -> None:
    linear = nn.Linear(12, 5, bias=added)
    if not added:
        linear.bias = None  # type: ignore[assignment]
    written = around(linear)
    product = copy.deepcopy(written)
    product[2] = Product(linear if added else nn.Linear(12, 5), added)  # type: ignore[index]
    product[2].matrix.data = linear.weight.detach().T.contiguous()  # type: ignore[index, union-attr]
    rows = torch.randn(32, 6)
    first, second = (convert(quantize(network, [rows])) for network in (written, product))
    torch.testing.assert_close(first(rows), second(rows), rtol=0, atol=1e-5)
    assert stored(quantize(product, [rows])) == {"dequantize_per_channel": 3}
    # Trained on, the matrix is what learns.
    trained = quantize(product, [rows]).train()
    trained(rows).square().sum().backward()
    assert trained[2].matrix.grad is not None  # type: ignore[index]
    assert trained[2].matrix.grad.abs().sum() > 0  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["executorch", "tflite"])
def test_files_with_products_with_a_matrix_or_a_stack_of_them_are_right(name: str, tmp_path: Path) -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.product = nn.Linear(6, 12), Product(nn.Linear(12, 8), False)
            self.stack, self.last = nn.Parameter(torch.randn(4, 2, 3) * 0.5), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            heads = torch.relu(self.product(torch.relu(self.first(x)))).view(-1, 4, 2)
            logits: Tensor = self.last(torch.einsum("bhd,hde->bhe", heads, self.stack).flatten(1))
            return logits

    pytest.importorskip("executorch" if name == "executorch" else "litert_torch")
    rows = [torch.randn(16, 6) for _ in range(3)]
    with pytest.warns(UserWarning, match="compute in float"):  # the stack, between int8 values
        artifact = export(quantize(Stacked().eval(), rows), name, tmp_path / f"net{target(name).suffix}", batches=rows)
    assert artifact.agreement is not None
    assert artifact.agreement.max_steps is not None
    assert artifact.agreement.max_steps <= 1
    assert len(artifact.contents.float_compute_ops) == 1
