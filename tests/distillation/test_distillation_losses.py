"""Each loss of a distillation against its formula, written out by value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_edge.distillation import (
    DIST,
    AttentionTransfer,
    FeatureMatching,
    KLDivergence,
    LogitsMSE,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("error:::lightning_edge", "error::lightning_edge.user_warnings.EdgeWarning"),
]


def softened(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def pearson(x: list[float], y: list[float]) -> float:
    a, b = [v - sum(x) / len(x) for v in x], [v - sum(y) / len(y) for v in y]
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)


def test_kl_is_the_teachers_against_the_students(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    expected = 0.0
    for s_row, t_row in zip(student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(softened(s_row, 3.0), softened(t_row, 3.0), strict=True)
        expected += sum(t * math.log(t / s) for s, t in pairs)
    assert float(KLDivergence(3.0).compare(student, teacher)) == pytest.approx(expected / 6 * 9, rel=1e-12)
    assert float(KLDivergence(3.0).compare(teacher, teacher)) == pytest.approx(0.0, abs=1e-12)


def test_logits_mse_is_the_mean_of_squares(logits: tuple[Tensor, Tensor]) -> None:
    pairs = zip(logits[0].flatten().tolist(), logits[1].flatten().tolist(), strict=True)
    assert float(LogitsMSE().compare(*logits)) == pytest.approx(sum((s - t) ** 2 for s, t in pairs) / 24, rel=1e-12)


def test_dist_is_correlation_within_samples_and_within_classes(logits: tuple[Tensor, Tensor]) -> None:
    students, teachers = ([softened(row, 2.0) for row in side.tolist()] for side in logits)
    inter = 1 - sum(pearson(s, t) for s, t in zip(students, teachers, strict=True)) / 6
    columns = [pearson([row[c] for row in students], [row[c] for row in teachers]) for c in range(4)]
    intra = 1 - sum(columns) / 4
    loss = DIST(beta=2.0, gamma=0.5, temperature=2.0)
    assert float(loss.compare(*logits)) == pytest.approx((2.0 * inter + 0.5 * intra) * 4, rel=1e-9)
    # Relations, not values: what is only scaled in probability space agrees.
    assert float(loss.compare(logits[0], logits[0])) == pytest.approx(0.0, abs=1e-9)


def test_dist_of_one_sample_has_a_gradient(logits: tuple[Tensor, Tensor]) -> None:
    student = logits[0][:1].requires_grad_()
    DIST().compare(student, logits[1][:1]).backward()
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]
    assert student.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_class_probabilities_of_positions_are_taken_per_position(logits: tuple[Tensor, Tensor]) -> None:
    def as_map(rows: Tensor) -> Tensor:  # (6, 4) -> (1, 4, 2, 3)
        return rows.t().reshape(1, 4, 2, 3)

    for loss in (KLDivergence(2.0), DIST()):
        flat, mapped = loss.compare(*logits), loss.compare(as_map(logits[0]), as_map(logits[1]))
        assert float(mapped) == pytest.approx(float(flat), rel=1e-12)


def test_feature_matching_averages_the_larger_to_the_smaller() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)
    pooled = torch.stack(
        [student[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3)) for i in (0, 1) for j in (0, 1)]
    )
    expected = (pooled - teacher.flatten(2).permute(2, 0, 1)).square().mean()
    assert torch.allclose(FeatureMatching(["conv"]).compare(student, teacher), expected)
    assert torch.allclose(FeatureMatching(["conv"]).compare(teacher, student), expected)


def test_attention_transfer_compares_normalized_maps_of_any_width() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 2), torch.randn(2, 5, 2, 2)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        maps = []
        for feature in (s, t):
            energy = [sum(float(feature[c, i, j]) ** 2 for c in range(len(feature))) for i in (0, 1) for j in (0, 1)]
            norm = math.sqrt(sum(e * e for e in energy))
            maps.append([e / norm for e in energy])
        expected += sum((a - b) ** 2 for a, b in zip(*maps, strict=True))
    assert float(AttentionTransfer(["conv"]).compare(student, teacher)) == pytest.approx(expected / 8, rel=1e-5)
