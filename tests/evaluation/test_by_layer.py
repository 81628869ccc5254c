"""A network layer by layer, and the classes of what is made of it: small networks, no file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_edge import Factorize, Prune, record
from lightning_edge.evaluation import by_layer
from lightning_edge.evaluation.by_layer import layer_rows
from lightning_edge.evaluation.class_changes import ClassCounter, Labels
from lightning_edge.network import Inputs
from lightning_edge.quantization import convert, quantize
from lightning_edge.reporting.layers import LayerRow
from lightning_edge.schedule import Clock, Phase


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stem(images).mean((2, 3)))
        return logits


class _Batch:
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def inputs(self) -> Inputs:
        return Inputs.of(self.images)


IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def changed(network: nn.Module, phase: Phase, inputs: Tensor = IMAGES) -> nn.Module:
    change = phase.plan(network, Clock(0, 0.0), [], _Batch(inputs))  # type: ignore[arg-type]
    assert change is not None
    record.perform(network, {"phase": phase.name, **change})
    return network


def rows_of(network: nn.Module, int8: bool = True, **settings: list[str]) -> tuple[dict[str, LayerRow], str | None]:
    network.eval()
    converted = convert(quantize(network, [IMAGES], **settings)) if int8 else None
    rows, told = layer_rows(network, network, [Inputs.of(IMAGES)], converted)
    return {row.name: row for row in rows}, told


def test_bytes_before_and_now_by_layer() -> None:
    rows, told = rows_of(Network())
    assert told is None
    assert [*rows] == ["stem.0", "head"]
    # A byte a weight, four a bias: the folded norm is the convolution's.
    assert (rows["stem.0"].precision, rows["stem.0"].bytes) == ("int8", 16 * 9 + 4 * 16)
    assert rows["stem.0"].float_bytes == 4 * (16 * 9 + 16)
    assert (rows["head"].bytes, rows["head"].float_bytes) == (64 + 16, 4 * (64 + 4))
    assert all(row.increase is not None and row.increase > 0 for row in rows.values())


def test_a_layer_that_stays_float_has_its_bytes() -> None:
    rows, _ = rows_of(Network(), skip=["head"])
    assert (rows["head"].precision, rows["head"].bytes) == ("float", 4 * (64 + 4))
    assert rows["stem.0"].precision == "int8"


def test_without_an_int8_network_nothing_is_measured() -> None:
    rows, told = rows_of(Network(), int8=False)
    assert told is None
    assert rows["head"] == LayerRow("head", "float", 4 * (64 + 4), 4 * (64 + 4), None)


def test_a_layer_that_was_cut_is_held_against_what_it_was() -> None:
    rows, _ = rows_of(changed(Network(), Prune(layers={"stem.0": 0.5}, start=0, end=0, round_to=4)), int8=False)
    assert rows["stem.0"].float_bytes == 4 * (16 * 9 + 16)
    assert rows["stem.0"].bytes < 4 * (16 * 9 + 16)
    assert rows["head"].bytes < 4 * (64 + 4) == rows["head"].float_bytes


def test_a_layer_that_was_factorized_is_still_one() -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    changed(network, Factorize(size=0.5, start=0), torch.randn(8, 64))
    assert any(len(name.split(".")) > 2 for name, _ in network.named_parameters())
    converted = convert(quantize(network, [torch.randn(8, 64)]))
    rows, _ = layer_rows(network, network, [Inputs.of(torch.randn(8, 64))], converted)
    assert [row.name for row in rows] == ["0", "2"]
    assert rows[0].float_bytes == 4 * (64 * 64 + 64)
    assert rows[0].bytes < 0.6 * 64 * 64


def test_what_would_take_long_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_layer, "_LONGEST_S", -1.0)
    rows, told = rows_of(Network())
    assert all(row.increase is None for row in rows.values())
    assert told is not None
    assert "was not measured: it takes about 0 s here" in told


def scores(*classes: int, count: int = 4) -> list[Tensor]:
    return [nn.functional.one_hot(torch.tensor(classes), count).float()]


def test_changes_are_counted_with_labels() -> None:
    labels = Labels()
    counter = ClassCounter(labels)
    for before, now, truth in (((0, 1, 2), (0, 2, 2), [0, 1, 2]), ((1, 3), (2, 1), [2, -100])):
        labels.note((torch.zeros(len(truth)), torch.tensor(truth)))
        counter.update(scores(*before), scores(*now))
    found = counter.result()
    assert found is not None
    assert (found.samples, found.changed) == (5, 3)
    assert found.pairs == ((1, 2, 2), (3, 1, 1))
    assert found.first == ((1, 1, 2), (3, 1, 2), (4, 3, 1))
    assert (found.became_right, found.became_wrong) == (1, 1)  # -100 is no class
    assert found.by_class == ((1, 1, 1), (1, 1, 0), (2, 1, 2), (0, 0, 0))
    assert [list(row) for row in found.before] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert [list(row) for row in found.now] == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(2), (torch.zeros(2),), (torch.zeros(2), torch.zeros(2)), (torch.zeros(2), torch.zeros(3).long())],
)
def test_changes_are_counted_without_labels(batch: object) -> None:
    labels = Labels()
    labels.note(batch)
    counter = ClassCounter(labels)
    counter.update(scores(0, 1), scores(0, 2))
    found = counter.result()
    assert found is not None
    assert found.changed == 1
    assert found.became_right is None
    assert found.by_class == found.before == found.now == ()


def test_a_shared_largest_score_is_no_change_and_a_regression_has_no_classes() -> None:
    counter = ClassCounter(Labels())
    counter.update([torch.tensor([[1.0, 1.0, 0.0]])], [torch.tensor([[0.0, 1.0, 0.0]])])
    found = counter.result()
    assert found is not None
    assert found.changed == 0
    counter = ClassCounter(Labels())
    counter.update([torch.zeros(4, 1)], [torch.ones(4, 1)])
    assert counter.result() is None


def test_the_network_is_left_alone() -> None:
    network = changed(Network(), Prune(layers={"stem.0": 0.5}, start=0, end=0, round_to=4)).eval()
    before = copy.deepcopy(network.state_dict())
    rows_of(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert record.changes_of(network)
