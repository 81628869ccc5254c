"""The reference interpreter of MIL, against coremltools' own evaluation of constants and against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_edge.errors import RunnerError
from lightning_edge.exporters.coreml.mil.interpreter import (
    SUPPORTED_OPS,
    Constant,
    Interpreter,
    Operation,
    Program,
    Variable,
)
from lightning_edge.exporters.coreml.package import coremltools, plain

pytest.importorskip("coremltools")
tools = coremltools()
mb = tools.converters.mil.Builder

generator = np.random.default_rng(0)
X = generator.standard_normal((2, 3, 4, 6)).astype(np.float32)
Y = generator.standard_normal((2, 3, 4, 6)).astype(np.float32)
POSITIVE = np.abs(X) + 0.1
ROW = generator.standard_normal(6).astype(np.float32)
COUNTS = np.arange(-12, 12, dtype=np.int32).reshape(2, 3, 4)
CODES = generator.integers(-128, 128, (4, 6)).astype(np.int8)
SCALES = np.array([0.5, 0.25, 0.125, 2.0], dtype=np.float32)


def build(function: Callable[..., Any], *shapes: tuple[int, ...], ios: int = 17) -> Any:
    """Make coremltools' program of a function of inputs with these shapes, as it was written, not optimized."""
    # coremltools reads number and names of the inputs from the function's code.
    named: tuple[Callable[..., Any], ...] = (
        lambda a: function(a),
        lambda a, b: function(a, b),
        lambda a, b, c: function(a, b, c),
    )
    specs = [mb.TensorSpec(shape=shape) for shape in shapes]
    program = mb.program(input_specs=specs, opset_version=getattr(tools.target, f"iOS{ios}"))
    return program(named[len(shapes) - 1]).functions["main"]


def interpret(function: Callable[..., Any], *inputs: Tensor, ios: int = 17) -> list[Tensor]:
    return Interpreter(plain(build(function, *(tuple(given.shape) for given in inputs), ios=ios)))(list(inputs))


EVALUATED: dict[str, Callable[[], Any]] = {
    "abs": lambda: mb.abs(x=X),
    "abs of integers": lambda: mb.abs(x=COUNTS),
    "acos": lambda: mb.acos(x=np.tanh(X)),
    "add": lambda: mb.add(x=X, y=Y),
    "add broadcast": lambda: mb.add(x=X, y=ROW),
    "add of integers": lambda: mb.add(x=COUNTS, y=np.int32(3)),
    "asin": lambda: mb.asin(x=np.tanh(X)),
    "atan": lambda: mb.atan(x=X),
    "atanh": lambda: mb.atanh(x=np.tanh(X)),
    "cast to integers": lambda: mb.cast(x=3 * X, dtype="int32"),
    "cast to bool": lambda: mb.cast(x=COUNTS, dtype="bool"),
    "ceil": lambda: mb.ceil(x=X),
    "clip": lambda: mb.clip(x=X, alpha=-0.5, beta=0.5),
    "concat": lambda: mb.concat(values=[X, Y], axis=1),
    "concat of numbers": lambda: mb.concat(values=[np.int32(3), np.int32(5)], axis=0),
    "cos": lambda: mb.cos(x=X),
    "cosh": lambda: mb.cosh(x=X),
    "cumsum": lambda: mb.cumsum(x=X, axis=2),
    "elu": lambda: mb.elu(x=X, alpha=0.3),
    "equal": lambda: mb.equal(x=COUNTS, y=np.int32(2)),
    "erf": lambda: mb.erf(x=X),
    "exp": lambda: mb.exp(x=X),
    "exp2": lambda: mb.exp2(x=X),
    "expand_dims": lambda: mb.expand_dims(x=X, axes=[0, -1]),
    "fill": lambda: mb.fill(shape=[2, 3], value=1.5),
    "floor": lambda: mb.floor(x=X),
    "floor_div of integers": lambda: mb.floor_div(x=COUNTS, y=np.int32(5)),
    "gather": lambda: mb.gather(x=X, indices=[1, 0, 2], axis=1),
    "gather by a matrix": lambda: mb.gather(x=X, indices=[[1, 0], [2, 2]], axis=-2),
    "gather_along_axis": lambda: mb.gather_along_axis(x=X, indices=np.zeros((2, 3, 1, 6), np.int32) + 2, axis=2),
    "gelu": lambda: mb.gelu(x=X),
    "gelu by tanh": lambda: mb.gelu(x=X, mode="TANH_APPROXIMATION"),
    "gelu by sigmoid": lambda: mb.gelu(x=X, mode="SIGMOID_APPROXIMATION"),
    "greater": lambda: mb.greater(x=X, y=Y),
    "greater_equal": lambda: mb.greater_equal(x=COUNTS, y=np.int32(2)),
    "identity": lambda: mb.identity(x=X),
    "inverse": lambda: mb.inverse(x=POSITIVE, epsilon=1e-2),
    "layer_norm": lambda: mb.layer_norm(x=X, axes=[-1], gamma=ROW, beta=ROW, epsilon=1e-3),
    "layer_norm of inner axes": lambda: mb.layer_norm(x=X, axes=[1], gamma=ROW[:3], beta=ROW[3:], epsilon=1e-3),
    "leaky_relu": lambda: mb.leaky_relu(x=X, alpha=0.2),
    "less": lambda: mb.less(x=X, y=Y),
    "less_equal": lambda: mb.less_equal(x=COUNTS, y=np.int32(2)),
    "linear": lambda: mb.linear(x=X[0, 0], weight=Y[0, 0], bias=ROW[:4]),
    "linear_activation": lambda: mb.linear_activation(x=X, alpha=2.0, beta=0.5),
    "l2_norm": lambda: mb.l2_norm(x=X, epsilon=1e-2),
    "log": lambda: mb.log(x=POSITIVE),
    "logical_and": lambda: mb.logical_and(x=X > 0, y=Y > 0),
    "logical_or": lambda: mb.logical_or(x=X > 0, y=Y > 0),
    "logical_xor": lambda: mb.logical_xor(x=X > 0, y=Y > 0),
    "logical_not": lambda: mb.logical_not(x=X > 0),
    "matmul": lambda: mb.matmul(x=X, y=Y, transpose_y=True),
    "matmul transposed": lambda: mb.matmul(x=X, y=Y, transpose_x=True),
    "maximum": lambda: mb.maximum(x=X, y=Y),
    "minimum": lambda: mb.minimum(x=X, y=Y),
    "mod": lambda: mb.mod(x=COUNTS, y=np.int32(5)),
    "mul": lambda: mb.mul(x=X, y=Y),
    "not_equal": lambda: mb.not_equal(x=COUNTS, y=np.int32(2)),
    "pow": lambda: mb.pow(x=POSITIVE, y=1.5),
    "prelu": lambda: mb.prelu(x=X, alpha=ROW[:3]),
    "quantize": lambda: mb.quantize(input=X, scale=0.02, zero_point=np.int8(-5), output_dtype="int8"),
    "quantize unsigned": lambda: mb.quantize(input=X, scale=0.02, zero_point=np.uint8(120), output_dtype="uint8"),
    "quantize without a zero point": lambda: mb.quantize(input=X, scale=0.05, output_dtype="int8"),
    "quantize per channel": lambda: mb.quantize(
        input=X, scale=SCALES / 50, zero_point=np.int8([1, -2, 3, 0]), axis=-2, output_dtype="int8"
    ),
    "real_div": lambda: mb.real_div(x=X, y=POSITIVE),
    "real_div of integers": lambda: mb.real_div(x=COUNTS, y=np.int32(5)),
    "reduce_argmax": lambda: mb.reduce_argmax(x=X, axis=1),
    "reduce_argmin": lambda: mb.reduce_argmin(x=X, axis=-1, keep_dims=True),
    "reduce_l1_norm": lambda: mb.reduce_l1_norm(x=X, axes=[1, 2]),
    "reduce_l2_norm": lambda: mb.reduce_l2_norm(x=X, axes=[1, 2]),
    "reduce_log_sum_exp": lambda: mb.reduce_log_sum_exp(x=X, axes=[1], keep_dims=True),
    "reduce_max": lambda: mb.reduce_max(x=X, axes=[1, -1]),
    "reduce_mean": lambda: mb.reduce_mean(x=X, axes=[2, 3], keep_dims=True),
    "reduce_mean of all": lambda: mb.reduce_mean(x=X),
    "reduce_min": lambda: mb.reduce_min(x=X, axes=[0]),
    "reduce_prod": lambda: mb.reduce_prod(x=X, axes=[1, 2]),
    "reduce_sum": lambda: mb.reduce_sum(x=X, axes=[1, 2]),
    "reduce_sum_square": lambda: mb.reduce_sum_square(x=X, axes=[3]),
    "relu": lambda: mb.relu(x=X),
    "relu6": lambda: mb.relu6(x=8 * X),
    "reshape": lambda: mb.reshape(x=X, shape=[6, -1]),
    "reshape by a zero": lambda: mb.reshape(x=X, shape=[0, 8, 0]),
    "reverse": lambda: mb.reverse(x=X, axes=[1, 3]),
    "round half to even": lambda: mb.round(x=np.array([0.5, 1.5, -0.5, -1.5, 2.4], dtype=np.float32)),
    "rsqrt": lambda: mb.rsqrt(x=POSITIVE, epsilon=1e-2),
    "scaled_tanh": lambda: mb.scaled_tanh(x=X, alpha=0.7, beta=1.3),
    "select": lambda: mb.select(cond=X > 0, a=X, b=Y),
    "shape": lambda: mb.shape(x=X),
    "sigmoid": lambda: mb.sigmoid(x=X),
    "sigmoid_hard": lambda: mb.sigmoid_hard(x=X, alpha=0.3, beta=0.4),
    "sign": lambda: mb.sign(x=X),
    "sin": lambda: mb.sin(x=X),
    "slice_by_index": lambda: mb.slice_by_index(x=X, begin=[0, 1, -3, 0], end=[2, 3, -1, 5]),
    "slice_by_index in steps": lambda: mb.slice_by_index(
        x=X, begin=[0, 0, 3, 5], end=[2, 3, 0, 0], stride=[1, 2, -1, -2], end_mask=[True, True, False, True]
    ),
    "slice_by_index of one": lambda: mb.slice_by_index(
        x=X, begin=[1, 0, -2, 0], end=[2, 0, -1, 0], end_mask=[False, True, False, True], squeeze_mask=[True, False] * 2
    ),
    "slice_by_size": lambda: mb.slice_by_size(x=X, begin=[0, 1, 1, 2], size=[2, 2, -1, 3]),
    "softmax": lambda: mb.softmax(x=X, axis=1),
    "softplus": lambda: mb.softplus(x=X),
    "softsign": lambda: mb.softsign(x=X),
    "split": lambda: mb.split(x=X, axis=1, split_sizes=[1, 2]),
    "split evenly": lambda: mb.split(x=X, axis=3, num_splits=2),
    "sqrt": lambda: mb.sqrt(x=POSITIVE),
    "sinh": lambda: mb.sinh(x=X),
    "square": lambda: mb.square(x=X),
    "squeeze": lambda: mb.squeeze(x=X[:1, :, :1], axes=[0, 2]),
    "stack": lambda: mb.stack(values=[X, Y], axis=1),
    "sub of a number": lambda: mb.sub(x=2.0, y=Y),
    "tan": lambda: mb.tan(x=X),
    "tanh": lambda: mb.tanh(x=X),
    "threshold": lambda: mb.threshold(x=X, alpha=0.3),
    "thresholded_relu": lambda: mb.thresholded_relu(x=X.copy(), alpha=0.3),
    "tile": lambda: mb.tile(x=X, reps=[1, 2, 1, 3]),
    "transpose": lambda: mb.transpose(x=X, perm=[2, 0, -1, 1]),
}


@pytest.mark.parametrize("expression", EVALUATED.values(), ids=EVALUATED)
def test_an_operation_gives_what_coremltools_computes(expression: Callable[[], Any]) -> None:
    made: list[Any] = []

    def function(unused: Any) -> Any:
        result = expression()
        made.extend(result if isinstance(result, list | tuple) else [result])
        return result

    outputs = interpret(function, torch.zeros(1))
    assert len(outputs) == len(made)
    for output, variable in zip(outputs, made, strict=True):
        expected = torch.as_tensor(np.array(variable.val))
        torch.testing.assert_close(output.to(expected.dtype), expected, rtol=1e-5, atol=1e-6)


def test_crop_cuts_height_and_width() -> None:
    x = torch.from_numpy(X)
    (output,) = interpret(lambda given: mb.crop(x=given, crop_height=[1, 2], crop_width=[0, 3]), x)
    assert torch.equal(output, x[:, :, 1:2, 0:3])


def test_quantize_saturates_and_rounds_half_to_even() -> None:
    steps = torch.tensor([-300.0, -128.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 300.0])
    (codes,) = interpret(lambda x: mb.quantize(input=x, scale=0.5, output_dtype="int8"), steps * 0.5)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [-128, -128, -2, 0, 0, 2, 2, 126, 127, 127]
    (codes,) = interpret(
        lambda x: mb.quantize(input=x, scale=0.5, zero_point=np.uint8(3), output_dtype="uint8"), steps * 0.5
    )
    assert codes.tolist() == [0, 0, 1, 3, 3, 5, 5, 129, 131, 255]


@pytest.mark.parametrize(
    ("codes", "settings", "zero_point", "scale"),
    [
        (CODES, {"scale": 0.25, "zero_point": np.int8(-7)}, -7, 0.25),
        (CODES.view(np.uint8), {"scale": 0.25}, 0, 0.25),
        (
            CODES,
            {"scale": SCALES, "zero_point": np.int8([1, -2, 3, 0]), "axis": 0},
            torch.tensor([[1], [-2], [3], [0]]),
            torch.from_numpy(SCALES)[:, None],
        ),
    ],
    ids=["signed", "unsigned without a zero point", "per channel"],
)
def test_dequantize_gives_real_values(codes: Any, settings: dict[str, Any], zero_point: Any, scale: Any) -> None:
    (output,) = interpret(lambda unused: mb.dequantize(input=codes, **settings), torch.zeros(1))
    torch.testing.assert_close(output, (torch.from_numpy(codes.astype(np.float32)) - zero_point) * scale)


def test_sums_of_a_program_with_8_bit_values_do_not_depend_on_their_order() -> None:
    """Int8 kernels sum integers; in float32 the first two addends below would take the third away."""

    def product(x: Any) -> Any:
        codes = mb.quantize(input=x, scale=np.float32(1), output_dtype="int8")
        values = mb.dequantize(input=codes, scale=np.float32(1))
        return mb.linear(x=values, weight=np.array([[2.0**30, 1.0, -(2.0**30)]], dtype=np.float32))

    (output,) = interpret(product, torch.tensor([[1.0, 3.0, 1.0]]))
    assert output.dtype == torch.float32
    assert output.tolist() == [[3.0]]


def test_what_is_fed_is_quantized_in_float32() -> None:
    """As networks and devices do it: the quotient below ends in a half in float32, and in more than that in float64."""
    scale = np.float32(0.1)
    fed = torch.tensor([[0.85]])
    assert float(fed / float(scale)) == 8.5 < float(fed.double() / float(scale))

    def codes(x: Any) -> Any:
        return mb.dequantize(input=mb.quantize(input=x, scale=scale, output_dtype="int8"), scale=np.float32(1))

    (output,) = interpret(codes, fed)
    assert output.tolist() == [[8.0]]


def _weights(ios: int) -> dict[str, Callable[[], Any]]:
    if ios == 17:
        return {
            "constexpr_affine_dequantize per channel": lambda: mb.constexpr_affine_dequantize(
                quantized_data=CODES, zero_point=np.int8([1, 2, -3, 0]), scale=SCALES, axis=0
            ),
            "constexpr_affine_dequantize per tensor": lambda: mb.constexpr_affine_dequantize(
                quantized_data=CODES, zero_point=np.int8(7), scale=np.float32(0.1), axis=0
            ),
            "constexpr_lut_to_dense packed": lambda: mb.constexpr_lut_to_dense(
                indices=np.array([0b11100100, 0b00011011, 0b10110001], np.uint8),
                lut=np.array([-1.0, 0.5, 2.0, 4.0], np.float32),
                shape=np.array([3, 4], np.uint32),
            ),
            "constexpr_cast": lambda: mb.constexpr_cast(source_val=ROW.astype(np.float16), output_dtype="fp32"),
            "constexpr_sparse_to_dense packed": lambda: mb.constexpr_sparse_to_dense(
                nonzero_data=ROW[:3], mask=np.array([0b00001101], np.uint8), shape=np.array([5], np.uint32)
            ),
        }
    return {
        "constexpr_blockwise_shift_scale per channel": lambda: mb.constexpr_blockwise_shift_scale(
            data=CODES, scale=SCALES[:, None], offset=np.int8([[1], [2], [-3], [0]])
        ),
        "constexpr_blockwise_shift_scale in blocks": lambda: mb.constexpr_blockwise_shift_scale(
            data=CODES, scale=generator.standard_normal((2, 3)).astype(np.float32)
        ),
        "constexpr_lut_to_dense in groups": lambda: mb.constexpr_lut_to_dense(
            indices=generator.integers(0, 4, (4, 6)).astype(tools.converters.mil.mil.types.np_uint2_dtype),
            lut=generator.standard_normal((2, 1, 4, 1)).astype(np.float32),
        ),
        "constexpr_lut_to_dense of vectors": lambda: mb.constexpr_lut_to_dense(
            indices=generator.integers(0, 4, (4, 6)).astype(tools.converters.mil.mil.types.np_uint2_dtype),
            lut=generator.standard_normal((1, 2, 4, 3)).astype(np.float32),
            vector_axis=0,
        ),
    }


@pytest.mark.parametrize(("ios", "name"), [(ios, name) for ios in (17, 18) for name in _weights(ios)])
def test_compressed_weights_are_what_coremltools_unpacks(ios: int, name: str) -> None:
    made: list[Any] = []

    def function(unused: Any) -> Any:
        made.append(_weights(ios)[name]())
        return mb.identity(x=made[0])

    (output,) = interpret(function, torch.zeros(1), ios=ios)
    torch.testing.assert_close(output, torch.as_tensor(made[0].op.materialized_val_inference()))


def _conv(spatial: int, **settings: Any) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, 4, *[9] * spatial)
    weight = torch.randn(6, 4 // settings.get("groups", 1), *[3] * spatial)
    bias = torch.randn(6)
    (output,) = interpret(lambda given: mb.conv(x=given, weight=weight.numpy(), bias=bias.numpy(), **settings), x)
    return [x, weight, bias, output]


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"pad_type": "valid"}, {}),
        ({"pad_type": "valid", "strides": 2, "groups": 2}, {"stride": 2, "groups": 2}),
        ({"pad_type": "custom", "pad": (1, 1), "dilations": 2}, {"padding": 1, "dilation": 2}),
        ({"pad_type": "same"}, {"padding": 1}),
    ],
    ids=["valid", "strided in groups", "custom dilated", "same"],
)
def test_conv_is_torchs(spatial: int, settings: dict[str, Any], theirs: dict[str, Any]) -> None:
    def full(key: str) -> Any:
        value = settings[key]
        return (
            list(value) * spatial if key == "pad" else [value] * spatial if key in ("strides", "dilations") else value
        )

    x, weight, bias, output = _conv(spatial, **{key: full(key) for key in settings})
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[spatial - 1]
    torch.testing.assert_close(output, function(x, weight, bias, **theirs))


@pytest.mark.parametrize(("pad_type", "widths"), [("same", (0, 1, 0, 1)), ("same_lower", (1, 0, 1, 0))])
def test_an_odd_padding_lies_where_the_pad_type_says(pad_type: str, widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 2, 8, 8), torch.randn(2, 2, 3, 3)
    (output,) = interpret(lambda given: mb.conv(x=given, weight=weight.numpy(), strides=[2, 2], pad_type=pad_type), x)
    torch.testing.assert_close(output, functional.conv2d(functional.pad(x, widths), weight, stride=2))


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"pad_type": "valid"}, {}),
        ({"pad_type": "custom", "pad": [1, 1, 1, 1], "strides": [2, 2]}, {"padding": 1, "stride": 2}),
        (
            {"pad_type": "custom", "pad": [1, 1, 1, 1], "strides": [2, 2], "output_shape": [1, 6, 10, 10]},
            {"padding": 1, "stride": 2, "output_padding": 1},
        ),
        ({"pad_type": "valid", "dilations": [2, 2]}, {"dilation": 2}),
        ({"pad_type": "same", "strides": [2, 2]}, {"stride": 2, "cut": (0, -1, 0, -1)}),
    ],
    ids=["valid", "custom", "lengthened", "dilated", "same"],
)
def test_conv_transpose_is_torchs(settings: dict[str, Any], theirs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 4, 5, 5), torch.randn(4, 6, 3, 3), torch.randn(6)
    (output,) = interpret(
        lambda given: mb.conv_transpose(x=given, weight=weight.numpy(), bias=bias.numpy(), **settings), x
    )
    cut = theirs.pop("cut", (0, 0, 0, 0))
    torch.testing.assert_close(
        output, functional.pad(functional.conv_transpose2d(x, weight, bias, **theirs), cut), rtol=1e-5, atol=1e-5
    )


POOLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "valid": ({"pad_type": "valid", "strides": [2, 2]}, {"stride": 2}),
    "custom": ({"pad_type": "custom", "pad": [1, 1, 1, 1], "strides": [2, 2]}, {"stride": 2, "padding": 1}),
    "ceil": (
        {"pad_type": "custom", "pad": [1, 1, 1, 1], "strides": [2, 2], "ceil_mode": True},
        {"stride": 2, "padding": 1, "ceil_mode": True},
    ),
    "ceil without padding": (
        {"pad_type": "valid", "strides": [2, 2], "ceil_mode": True},
        {"stride": 2, "ceil_mode": True},
    ),
}


@pytest.mark.parametrize(("settings", "theirs"), POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("size", [7, 8])
def test_max_pool_is_torchs(settings: dict[str, Any], theirs: dict[str, Any], size: int) -> None:
    x = torch.randn(1, 2, size, size) - 5
    (output,) = interpret(lambda given: mb.max_pool(x=given, kernel_sizes=[3, 3], **settings), x)
    torch.testing.assert_close(output, functional.max_pool2d(x, 3, **theirs))


@pytest.mark.parametrize(("settings", "theirs"), POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("excluded", [False, True], ids=["padding counted", "padding excluded"])
@pytest.mark.parametrize("size", [7, 8])
def test_avg_pool_is_torchs(settings: dict[str, Any], theirs: dict[str, Any], excluded: bool, size: int) -> None:
    x = torch.randn(1, 2, size, size) + 5
    (output,) = interpret(
        lambda given: mb.avg_pool(x=given, kernel_sizes=[3, 3], exclude_padding_from_average=excluded, **settings), x
    )
    torch.testing.assert_close(output, functional.avg_pool2d(x, 3, count_include_pad=not excluded, **theirs))


LAYERS: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "batch_norm": (
        lambda x: mb.batch_norm(
            x=x, mean=ROW[:3], variance=POSITIVE[0, 0, 0, :3], gamma=ROW[3:], beta=ROW[:3], epsilon=1e-3
        ),
        lambda x: functional.batch_norm(
            x, *(torch.tensor(v) for v in (ROW[:3], POSITIVE[0, 0, 0, :3], ROW[3:], ROW[:3])), eps=1e-3
        ),
    ),
    "instance_norm": (lambda x: mb.instance_norm(x=x, epsilon=1e-3), lambda x: functional.instance_norm(x, eps=1e-3)),
    "clamped_relu": (
        lambda x: mb.clamped_relu(x=x, alpha=0.5, beta=1.0),
        lambda x: functional.leaky_relu(x, 0.5).clamp(max=1.0),
    ),
    "concat interleaved": (
        lambda x: mb.concat(values=[x, mb.relu(x=x)], axis=1, interleave=True),
        lambda x: torch.stack([x, x.relu()], 2).view(2, 6, 4, 6),
    ),
    "cumsum exclusive in reverse": (
        lambda x: mb.cumsum(x=x, axis=2, exclusive=True, reverse=True),
        lambda x: x.flip(2).cumsum(2).flip(2) - x,
    ),
    "silu": (lambda x: mb.silu(x=x), functional.silu),
    "pad constant": (
        lambda x: mb.pad(x=x, pad=[0, 1, 2, 3], constant_val=0.5),
        lambda x: functional.pad(x, (2, 3, 0, 1), value=0.5),
    ),
    "pad reflected": (
        lambda x: mb.pad(x=x, pad=[1, 2, 3, 1], mode="reflect"),
        lambda x: functional.pad(x, (3, 1, 1, 2), mode="reflect"),
    ),
    "pad replicated": (
        lambda x: mb.pad(x=x, pad=[1, 2, 3, 1], mode="replicate"),
        lambda x: functional.pad(x, (3, 1, 1, 2), mode="replicate"),
    ),
    "pixel_unshuffle": (
        lambda x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
        lambda x: functional.pixel_unshuffle(x, 2),
    ),
    "pixel_shuffle": (
        lambda x: mb.pixel_shuffle(x=mb.concat(values=[x] * 4, axis=1), upscale_factor=2),
        lambda x: functional.pixel_shuffle(torch.cat([x] * 4, 1), 2),
    ),
    "upsample_nearest_neighbor": (
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        lambda x: functional.interpolate(x, scale_factor=(2.0, 3.0)),
    ),
    "resize_nearest_neighbor": (
        lambda x: mb.resize_nearest_neighbor(x=x, target_size_height=7, target_size_width=5),
        lambda x: functional.interpolate(x, size=(7, 5)),
    ),
    "upsample_bilinear": (
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3, align_corners=False),
        lambda x: functional.interpolate(x, size=(8, 18), mode="bilinear"),
    ),
    "upsample_bilinear on corners": (
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3, align_corners=True),
        lambda x: functional.interpolate(x, size=(8, 18), mode="bilinear", align_corners=True),
    ),
    "resize_bilinear": (
        lambda x: mb.resize_bilinear(x=x, target_size_height=7, target_size_width=3, sampling_mode="UNALIGN_CORNERS"),
        lambda x: functional.interpolate(x, size=(7, 3), mode="bilinear"),
    ),
    "gather_nd": (
        lambda x: mb.gather_nd(x=x, indices=[[1, 0], [0, 2], [-1, -2]]),
        lambda x: torch.stack([x[1, 0], x[0, 2], x[-1, -2]]),
    ),
    "gather_nd by batch": (
        lambda x: mb.gather_nd(x=x, indices=[[[2, 3]], [[0, 1]]], batch_dims=1),
        lambda x: torch.stack([x[0, 2, 3], x[1, 0, 1]])[:, None],
    ),
    "einsum": (
        lambda x: mb.einsum(values=(x, mb.transpose(x=x, perm=[0, 3, 2, 1])), equation="nchw,nwhu->nchu"),
        lambda x: torch.einsum("nchw,nwhu->nchu", x, x.permute(0, 3, 2, 1)),
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), LAYERS.values(), ids=LAYERS)
def test_a_layer_is_torchs(ours: Callable[[Any], Any], theirs: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6)
    (output,) = interpret(ours, x)
    torch.testing.assert_close(output, theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [None, "float", "bool"])
def test_attention_is_torchs(mask: str | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 3)
    given = {None: None, "float": torch.randn(5, 7), "bool": torch.rand(5, 7) > 0.3}[mask]
    extra = {} if given is None else {"attn_mask": given.numpy()}
    (output,) = interpret(
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v, **extra), query, key, value, ios=18
    )
    torch.testing.assert_close(output, functional.scaled_dot_product_attention(query, key, value, given))


def test_every_half_precision_result_is_rounded_to_half() -> None:
    factor = np.float16(1.0009765625)
    x = torch.linspace(0.1, 3.0, 64)

    def function(given: Any) -> Any:
        half = mb.cast(x=given, dtype="fp16")
        return mb.cast(x=mb.mul(x=mb.mul(x=half, y=factor), y=factor), dtype="fp32")

    (output,) = interpret(function, x)
    once = (x.half().float() * float(factor)).half()
    assert torch.equal(output, (once.float() * float(factor)).half().float())
    assert not torch.equal(output, (x.half().float() * float(factor) ** 2).half().float())


def test_a_value_that_is_read_late_is_kept_until_then() -> None:
    def function(x: Any) -> Any:
        first = mb.mul(x=x, y=2.0)
        second = mb.add(x=first, y=1.0)
        return mb.sub(x=mb.mul(x=second, y=second), y=first), first

    x = torch.randn(3)
    interpreter = Interpreter(plain(build(function, (3,))))
    for _ in range(2):
        late, early = interpreter([x])
        torch.testing.assert_close(late, (2 * x + 1) ** 2 - 2 * x)
        torch.testing.assert_close(early, 2 * x)


def test_an_unknown_operation_is_named_beside_those_that_are_known() -> None:
    with pytest.raises(RunnerError, match=r"does not know: non_zero\. It knows: .*conv, conv_transpose.*softmax"):
        Interpreter(plain(build(lambda x: mb.non_zero(x=x), (3,))))


def test_supported_ops_is_a_sorted_list_with_what_int8_networks_are_made_of() -> None:
    assert {"const", "conv", "quantize", "dequantize", "constexpr_affine_dequantize", "softmax"} <= set(SUPPORTED_OPS)
    assert list(SUPPORTED_OPS) == sorted(SUPPORTED_OPS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.zeros(1, 3)], r"takes 2 inputs \(a, b\), 1 given"),
        ([torch.zeros(1, 3), torch.zeros(2, 3)], r"'b' has shape \[1, 3\], a tensor of \[2, 3\]"),
    ],
    ids=["too few", "another shape"],
)
def test_inputs_that_do_not_fit_are_refused(given: list[Tensor], message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        Interpreter(plain(build(lambda x, y: mb.add(x=x, y=y), (1, 3), (1, 3))))(given)


def _relu(shape: tuple[int, ...], dtype: str = "fp32") -> Program:
    x, y = Variable("x", "fp32", (2, 3)), Variable("y", dtype, shape)
    return Program((x,), (Operation("relu", "y", {"x": x}, (y,)),), (y,))


@pytest.mark.parametrize("program", [_relu((3, 2)), _relu((2, 3), "int32")], ids=["shape", "type"])
def test_a_result_unlike_the_programs_declaration_is_an_error(program: Program) -> None:
    with pytest.raises(RunnerError, match=r"'relu' \('y'\) gave torch.float32 \[2, 3\], but the program declares"):
        Interpreter(program)([torch.zeros(2, 3)])


def test_an_operation_that_torch_refuses_is_named() -> None:
    x, y = Variable("x", "fp32", (2, 3)), Variable("y", "fp32", (2, 3))
    shape = Constant(np.array([4, 4], np.int32), "int32")
    program = Program((x,), (Operation("reshape", "y", {"x": x, "shape": shape}, (y,)),), (y,))
    with pytest.raises(RunnerError, match=r"cannot run 'reshape' \('y'\): shape"):
        Interpreter(program)([torch.zeros(2, 3)])
