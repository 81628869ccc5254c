"""Our fake-quantizer against torch's own operations and against what conversion writes."""

from __future__ import annotations

import pytest
import torch
from torchao.quantization.pt2e.observer import MovingAverageMinMaxObserver

from lightning_edge.quantization.fake_quantize import FakeQuantize, _RoundToScales
from lightning_edge.quantization.quantizer import PerChannelMinMaxNow


def per_tensor() -> FakeQuantize:
    return FakeQuantize(
        MovingAverageMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.int8,
        qscheme=torch.per_tensor_affine,
        averaging_constant=0.5,
    )


def per_channel() -> FakeQuantize:
    return FakeQuantize(
        PerChannelMinMaxNow,
        quant_min=-127,
        quant_max=127,
        dtype=torch.int8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def test_values_and_gradients_are_those_of_torch() -> None:
    torch.manual_seed(0)
    ours = per_tensor()
    ours(torch.randn(64, 8))
    ours.disable_observer()
    x = (3 * torch.randn(1000, 8)).requires_grad_()
    theirs = torch.fake_quantize_per_tensor_affine(x, ours.scale, ours.zero_point, -128, 127)
    out = ours(x)
    torch.testing.assert_close(out, theirs, rtol=0, atol=1e-6)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    (reference,) = torch.autograd.grad((theirs * weights).sum(), x)
    assert torch.equal(gradient, reference)
    assert bool((gradient == 0).any())  # some values were clipped, or the test would say nothing


def test_the_path_for_devices_computes_the_same() -> None:
    torch.manual_seed(0)
    ours = per_tensor()
    ours(torch.randn(64, 8))
    ours.disable_observer()
    x = (3 * torch.randn(1000, 8)).requires_grad_()
    with_tensors = _RoundToScales.apply(x, ours.scale, ours.zero_point, -128, 127)
    assert isinstance(with_tensors, torch.Tensor)
    assert torch.equal(with_tensors, ours(x))
    (a,) = torch.autograd.grad(with_tensors.sum(), x)
    (b,) = torch.autograd.grad(ours(x).sum(), x)
    assert torch.equal(a, b)


@pytest.mark.parametrize("make", [per_tensor, per_channel])
def test_training_rounds_to_the_values_that_conversion_writes(make: object) -> None:
    torch.manual_seed(0)
    fake = make()  # type: ignore[operator]
    x = torch.randn(16, 32)
    out = fake(x)
    scale, zero_point = fake.calculate_qparams()
    ops = torch.ops.quantized_decomposed
    if fake.is_per_channel:
        quantized = ops.quantize_per_channel(x, scale, zero_point, 0, -127, 127, torch.int8)
        converted = ops.dequantize_per_channel(quantized, scale, zero_point, 0, -127, 127, torch.int8)
    else:
        quantized = ops.quantize_per_tensor(x, float(scale), int(zero_point), -128, 127, torch.int8)
        converted = ops.dequantize_per_tensor(quantized, float(scale), int(zero_point), -128, 127, torch.int8)
    assert torch.equal(out, converted)


def test_weights_keep_no_memory_of_larger_ones() -> None:
    fake = per_channel()
    fake(torch.full((4, 2), 100.0))
    fake(torch.full((4, 2), 1.0))
    torch.testing.assert_close(fake.scale, torch.full((4,), 2 / 254))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_float_type_goes_in_and_comes_out(dtype: torch.dtype) -> None:
    fake = per_tensor()
    x = torch.randn(64, 8, dtype=dtype, requires_grad=True)
    out = fake(x)
    out.sum().backward()
    assert out.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert fake.scale.dtype == torch.float32
