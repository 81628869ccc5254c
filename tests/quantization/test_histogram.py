from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import HistogramObserver

from lightning_edge.quantization.train.histogram import FastHistogramObserver


def batches(kind: str) -> list[Tensor]:
    torch.manual_seed(0)
    return {
        "normal": [torch.randn(4, 8, 16, 16) * size for size in (1, 3, 2)],
        "rectified": [torch.randn(4, 8, 16, 16).relu() for _ in range(3)],
        "outlier": [torch.cat([torch.randn(5000), torch.tensor([1000.0])]) for _ in range(2)],
        "one value": [torch.full((5,), 0.7)],
        "zeros": [torch.zeros(5)],
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "rectified", "outlier", "one value", "zeros"])
def test_the_range_is_that_of_torchao_to_the_bit(kind: str) -> None:
    ours, theirs = (
        observer(dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_affine)
        for observer in (FastHistogramObserver, HistogramObserver)
    )
    for batch in batches(kind):
        for observer in (ours, theirs):
            observer(batch)
        for own, other in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
            assert torch.equal(own, other)


def test_the_range_of_huge_values_is_that_of_small_ones() -> None:
    small, huge = (
        FastHistogramObserver(dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_affine)
        for _ in range(2)
    )
    factor = 2.0**60  # untrained networks without norms get there
    for batch in batches("outlier"):
        small(batch)
        huge(batch * factor)
    (scale, zero_point), (huge_scale, huge_zero_point) = small.calculate_qparams(), huge.calculate_qparams()
    assert torch.equal(huge_scale, scale * factor)
    assert torch.equal(huge_zero_point, zero_point)
