"""Activations written out in the operations that every target has in int8. Knows torch only.

Hard-swish and hard-sigmoid (Howard et al. 2019, arXiv:1905.02244) are whole operations on no target but some, and then
mostly in float. Written out before quantizers are placed they are additions, products and clips, which are int8
everywhere, and what is trained is what ships:

- hard-sigmoid(x) = clip(x / 6 + 1/2, 0, 1). Behind a layer the division and the sum go into its weights, and the clip
  is the layer's quantizer, which saturates at 0 and 1: it costs nothing.
- hard-swish(x) = u * clip(u + 3 / sqrt(6), 0, sqrt(6)) with u = x / sqrt(6). Behind a layer u comes from its weights:
  an addition that saturates, and a product.
- SiLU(x) = x * sigmoid(x), so that the sigmoid has its own, known range, and GLU likewise of the halves of x.
- CELU and SELU are ELUs of a scaled value, scaled again, so that targets need the one operation.
- A number in a sum or product is a constant with a quantizer of its own. A number minus x is -x and a sum, of which the
  weights of a layer take both.
- A mean over height and width keeps them, and a reshape behind it drops them: the form that has kernels.
- Attention is softmax(q k^T / sqrt(d)) v: two products of matrices and a softmax, each with a range of its own, where
  the one operation has none inside. The division goes into the weights that q comes from, if they give nothing else. A
  mask that is the same for every input is a constant added in front of the softmax, see `masks`.
- A product with a constant matrix is a linear layer, whose weights have a scale for each output.
- A pool that averages a whole image is that mean. Means lie closer together than what they are means of, and kernels of
  means rescale, where those of pools do not: in a range of its own a mean has finer steps, of which less is amplified.
- A pool that averages windows is a convolution of each channel by itself with equal weights, for the same reason, and
  because XNNPACK has none in int8 and ONNX Runtime's rounds halves now up, now down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lightning_edge.quantization.capture.einsums import permutation
from lightning_edge.quantization.capture.masks import added_mask, causal_mask, is_learnt_bias
from lightning_edge.quantization.capture.nodes import DROPS, FIXED_RANGE, POOLS, REARRANGES, SCALED, call, constant

aten = torch.ops.aten

_STEPS = 255
_LEVELS = 127
_ROOT = math.sqrt(6.0)
# As torch.nn.SELU has them.
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805

# Layers whose weights may be scaled.
_LAYERS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.linear.default,
}
# Of aten.scaled_dot_product_attention, behind query, key and value.
_ATTENTION_ARGUMENTS = ("attn_mask", "dropout_p", "is_causal")
# Of aten.addmm: factors of what is added and of the product.
_SHARES = ("beta", "alpha")
# Of aten.avg_pool1d and avg_pool2d, behind their input and the size of its window.
_POOL_ARGUMENTS = ("stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
# XNNPACK's fast kernels for depthwise convolutions end there: at 7x7 the pool itself took a quarter of the time.
_MOST_TAPS = 25
_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default}
_CHANNELS_FIRST = {aten.conv_transpose1d.default, aten.conv_transpose2d.input}


def decompose(graph: GraphModule) -> None:
    """Write activations, and sums and products with numbers, in operations that every target has in int8.

    Args:
        graph: A captured graph, BatchNorm still in it; changed in place.
    """
    for node in list(graph.graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite is None or not node.meta["val"].is_floating_point():
            continue
        with graph.graph.inserting_before(node):
            result = rewrite(graph, node)
        if result is not node:
            node.replace_all_uses_with(result)
            graph.graph.erase_node(node)


def _hard_sigmoid(graph: GraphModule, node: Node) -> Node:
    x = _scaled(graph, node, node.args[0], 1 / 6, 0.5)
    return _saturated(graph, node, x, 1.0)


def _hard_swish(graph: GraphModule, node: Node) -> Node:
    u = _scaled(graph, node, node.args[0], 1 / _ROOT)
    shifted = _with_number(graph, node, aten.add.Tensor, u, 3 / _ROOT, "shift")
    return call(graph, aten.mul.Tensor, u, _saturated(graph, node, shifted, _ROOT), instead_of=node)


def _silu(graph: GraphModule, node: Node) -> Node:
    x = node.args[0]
    weight = call(graph, aten.sigmoid.default, x, instead_of=node)
    return call(graph, aten.mul.Tensor, x, weight, instead_of=node)


def _celu(graph: GraphModule, node: Node) -> Node:
    """CELU(x) = alpha * ELU(x / alpha)."""
    alpha = node.args[1] if len(node.args) > 1 else node.kwargs.get("alpha", 1.0)
    assert isinstance(alpha, int | float)
    x = _scaled(graph, node, node.args[0], 1 / alpha) if alpha != 1 else node.args[0]
    activated = call(graph, aten.elu.default, x, 1.0, instead_of=node)
    return activated if alpha == 1 else _with_number(graph, node, aten.mul.Tensor, activated, alpha, "alpha")


def _selu(graph: GraphModule, node: Node) -> Node:
    """SELU(x) = scale * ELU(x, alpha), with the two constants of Klambauer et al. 2017 (arXiv:1706.02515)."""
    activated = call(graph, aten.elu.default, node.args[0], _SELU_ALPHA, instead_of=node)
    return _with_number(graph, node, aten.mul.Tensor, activated, _SELU_SCALE, "scale")


def _glu(graph: GraphModule, node: Node) -> Node:
    x = node.args[0]
    assert isinstance(x, Node)
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
    assert isinstance(dim, int)
    half = x.meta["val"].shape[dim] // 2
    first, second = (call(graph, aten.slice.Tensor, x, dim, at, at + half, instead_of=node) for at in (0, half))
    weight = call(graph, aten.sigmoid.default, second, instead_of=node)
    return call(graph, aten.mul.Tensor, first, weight, instead_of=node)


def _sum_or_product(graph: GraphModule, node: Node) -> Node:
    """A number as an operand becomes a constant, and a division a product; what changes nothing goes."""
    x, number = node.args[:2]
    if isinstance(number, bool) or not isinstance(number, int | float) or not isinstance(x, Node):
        return node
    if not math.isfinite(number) or _is_constant(x) or not _is_tensor_like(x, node):
        return node
    # Such as out = 0; out = out + branch(x). With a quantizer of its own it would round once more.
    if number == (1 if node.target in (aten.mul.Tensor, aten.div.Tensor) else 0):
        return x
    if not number:
        return node
    alpha = node.kwargs.get("alpha", 1)
    assert isinstance(alpha, int | float)
    number = float(number) * alpha
    target, number = (aten.mul.Tensor, 1 / number) if node.target is aten.div.Tensor else (node.target, number)
    return _with_number(graph, node, target, x, number, "number")


def _number_minus(graph: GraphModule, node: Node) -> Node:
    x, number = node.args[:2]
    factor = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
    assert isinstance(factor, int | float)
    assert isinstance(number, int | float)
    if not factor or not math.isfinite(number) or _is_constant(x) or not _is_tensor_like(x, node):
        return node
    return _scaled(graph, node, x, -float(factor), float(number))


def _mean(graph: GraphModule, node: Node) -> Node:
    """An average over height and width that drops them becomes one that keeps them, and a reshape behind it."""
    x, dims = node.args[:2]
    assert isinstance(x, Node)
    value = x.meta["val"]
    keeps = len(node.args) > 2 and node.args[2]
    if keeps or node.kwargs or value.dim() != 4 or not isinstance(dims, list | tuple):
        return node
    if sorted(int(str(dim)) % 4 for dim in dims) != [2, 3]:
        return node
    kept = call(graph, aten.mean.dim, x, [2, 3], True, instead_of=node)
    return call(graph, aten.flatten.using_ints, kept, 1, instead_of=node)


def _linear(graph: GraphModule, node: Node) -> Node:
    """A product with a constant matrix, and a constant row that is added to it, is a linear layer."""
    bias, x, matrix = node.args if node.target is aten.addmm.default else (None, *node.args[:2])
    if not isinstance(x, Node) or not isinstance(matrix, Node):
        return node
    if any(node.kwargs.get(name, 1) != 1 for name in _SHARES):
        return node
    if _is_constant(x) or not _is_constant(matrix) or matrix.meta["val"].dim() != 2 or x.meta["val"].dim() < 2:
        return node
    if isinstance(bias, Node) and (not _is_constant(bias) or bias.meta["val"].dim() != 1):
        return node
    weight = call(graph, aten.transpose.int, matrix, 0, 1)
    return call(graph, aten.linear.default, x, weight, *([] if bias is None else [bias]), instead_of=node)


def _attention(graph: GraphModule, node: Node) -> Node:
    """Attention of as many keys' heads as queries', under no mask, a constant or a learnt one, in its parts."""
    query, key, value, *others = node.args
    given = dict(zip(_ATTENTION_ARGUMENTS, others, strict=False)) | node.kwargs
    scale, mask, causal = given.pop("scale", None), given.pop("attn_mask", None), given.pop("is_causal", False)
    if any(given.values()) or not isinstance(query, Node) or not isinstance(key, Node):
        return node  # something else than softmax(q k^T + mask) v
    assert isinstance(scale, int | float | None)
    added = None
    if isinstance(mask, Node):
        added = added_mask(graph, mask)
    elif causal:
        added = causal_mask(query.meta["val"].shape[-2], key.meta["val"].shape[-2])
    is_learnt = added is None and isinstance(mask, Node) and is_learnt_bias(mask)
    if added is None and not is_learnt and (mask is not None or causal):
        return node
    query = _scaled(graph, node, query, query.meta["val"].shape[-1] ** -0.5 if scale is None else scale)
    keys = call(graph, aten.transpose.int, key, -2, -1, instead_of=node)
    scores = call(graph, aten.matmul.default, query, keys, instead_of=node)
    if added is not None:
        like = scores.meta["val"]
        # Of as many dimensions: LiteRT's converter transposes around any other.
        added = added.view([1] * (like.dim() - added.dim()) + list(added.shape))
        operand = constant(graph, f"mask_of_{node.name}", added, like)
        scores = call(graph, aten.add.Tensor, scores, operand, instead_of=node)
    elif isinstance(mask, Node):
        for _ in range(scores.meta["val"].dim() - mask.meta["val"].dim()):
            mask = call(graph, aten.unsqueeze.default, mask, 0, instead_of=node)
        scores = call(graph, aten.add.Tensor, scores, mask, instead_of=node)
    weights = call(graph, aten.softmax.int, scores, -1, instead_of=node)
    if node.meta.get(DROPS):
        weights = call(graph, aten.dropout.default, weights, node.meta[DROPS], False, instead_of=node)
    return call(graph, aten.matmul.default, weights, value, instead_of=node)


def _adaptive_pool(graph: GraphModule, node: Node) -> Node:
    """A pool to one value is the mean over height and width, one to a divisor of the size a pool of even windows."""
    x = node.args[0]
    assert isinstance(x, Node)
    if _gives_one_value(node):
        return _mean_of_all(graph, node, x)
    if x.meta["val"].dim() != _dimensions(node) + 2:  # one image without a batch
        return node
    sizes, counts = x.meta["val"].shape[2:], node.meta["val"].shape[2:]
    window = [size // count for size, count in zip(sizes, counts, strict=True)]
    even = all(size == step * count for size, step, count in zip(sizes, window, counts, strict=True))
    return _windows(graph, node, x, window, window, [0] * len(window), math.prod(window)) if even else node


def _pool(graph: GraphModule, node: Node) -> Node:
    """A pool with room for one window is the mean of what the window covers, others are convolutions."""
    x, size, *others = node.args
    assert isinstance(x, Node)
    dims = _dimensions(node)
    given = dict(zip(_POOL_ARGUMENTS, others, strict=False))
    window = _of_each_dimension(size, dims)
    stride = _of_each_dimension(given.get("stride") or size, dims)
    padding = _of_each_dimension(given.get("padding") or 0, dims)
    divisor = given.get("divisor_override")
    if not any(padding) and divisor is None and _gives_one_value(node):
        for dim, length in zip((2, 3), window, strict=True):
            if x.meta["val"].shape[dim] > length:
                x = call(graph, aten.slice.Tensor, x, dim, 0, length, instead_of=node)
        return _mean_of_all(graph, node, x)
    if given.get("ceil_mode") or (any(padding) and not given.get("count_include_pad", True)):
        return node
    assert isinstance(divisor, int | None)
    return _windows(graph, node, x, window, stride, padding, divisor or math.prod(window))


def _windows(
    graph: GraphModule, node: Node, x: Node, window: list[int], stride: list[int], padding: list[int], divisor: int
) -> Node:
    """Sum each window and divide: a convolution of each channel by itself."""
    value = x.meta["val"]
    if value.dim() != len(window) + 2 or math.prod(window) > _MOST_TAPS:
        return node
    weights = torch.full((value.shape[1], 1, *window), 1 / divisor)
    weight = constant(graph, f"window_of_{node.name}", weights, value)
    arguments = (x, weight, None, stride, padding, [1] * len(window), value.shape[1])
    pool = call(graph, _CONVOLUTIONS[len(window)], *arguments, instead_of=node)
    pool.meta[POOLS] = True
    return pool


def _dimensions(node: Node) -> int:
    """How many dimensions a pool averages over."""
    return 1 if node.target in (aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default) else 2


def _of_each_dimension(sizes: Any, dims: int) -> list[int]:
    """One number stands for all dimensions."""
    given = [sizes] if isinstance(sizes, int) else list(sizes)
    return given * dims if len(given) == 1 else given


def _gives_one_value(node: Node) -> bool:
    """Whether a pool leaves one value of each channel."""
    shape = node.meta["val"].shape
    return len(shape) == 4 and tuple(shape[2:]) == (1, 1)


def _mean_of_all(graph: GraphModule, node: Node, x: Node) -> Node:
    if tuple(x.meta["val"].shape[2:]) == (1, 1):
        return x
    return call(graph, aten.mean.dim, x, [2, 3], True, instead_of=node)


def _is_tensor_like(x: Any, node: Node) -> bool:
    value = x.meta["val"] if isinstance(x, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == node.meta["val"].dtype


_REWRITES: dict[Any, Callable[[GraphModule, Node], Node]] = {
    aten.hardsigmoid.default: _hard_sigmoid,
    aten.hardswish.default: _hard_swish,
    aten.silu.default: _silu,
    aten.glu.default: _glu,
    aten.celu.default: _celu,
    aten.selu.default: _selu,
    aten.scaled_dot_product_attention.default: _attention,
    aten.matmul.default: _linear,
    aten.mm.default: _linear,
    aten.addmm.default: _linear,
    aten.einsum.default: permutation,
    aten.mean.dim: _mean,
    aten.adaptive_avg_pool2d.default: _adaptive_pool,
    aten.adaptive_avg_pool1d.default: _adaptive_pool,
    aten.avg_pool2d.default: _pool,
    aten.avg_pool1d.default: _pool,
    aten.add.Tensor: _sum_or_product,
    aten.sub.Tensor: _sum_or_product,
    aten.mul.Tensor: _sum_or_product,
    aten.div.Tensor: _sum_or_product,
    aten.rsub.Scalar: _number_minus,
}


def _saturated(graph: GraphModule, node: Node, x: Node, top: float) -> Node:
    """Clip to [0, ``top``], which is the range of the quantizer behind it."""
    clipped = call(graph, aten.hardtanh.default, x, 0.0, top, instead_of=node)
    clipped.meta[FIXED_RANGE] = (top / _STEPS, -128)
    return clipped


def _with_number(graph: GraphModule, node: Node, target: Any, x: Node, number: float, role: str) -> Node:
    """Write a sum or product of a value and a number, the number as a constant with an exact level."""
    value = x.meta["val"]
    # Of as many dimensions: LiteRT's converter transposes around any other to bring channels last.
    operand = constant(graph, f"{role}_of_{node.name}", torch.full([1] * value.dim(), number), value)
    operand.meta[FIXED_RANGE] = (abs(number) / _LEVELS, 0)
    return call(graph, target, x, operand, instead_of=node)


def _scaled(graph: GraphModule, node: Node, x: Any, factor: float, shift: float = 0.0) -> Node:
    """Give ``factor`` * x + ``shift``: by the weights of the layer that x comes from if ``node`` alone reads it."""
    assert isinstance(x, Node)
    trail = [x]
    while trail[-1].target in REARRANGES and len(trail[-1].users) == 1:
        source = trail[-1].args[0]
        assert isinstance(source, Node)
        trail.append(source)
    if len(trail[-1].users) == 1 and _scale_layer(graph, trail[-1], factor, shift):
        for scaled in trail:
            before = scaled.meta.get(SCALED, (1.0, 0.0))
            scaled.meta[SCALED] = (factor * before[0], factor * before[1] + shift)
        return x
    x = _with_number(graph, node, aten.mul.Tensor, x, factor, "factor")
    return _with_number(graph, node, aten.add.Tensor, x, shift, "shift") if shift else x


def _scale_layer(graph: GraphModule, layer: Node, factor: float, shift: float) -> bool:
    """Let a layer give ``factor`` times what it gave, plus ``shift``; False if it is none with weights of its own."""
    if layer.target is aten.batch_norm.default:
        _, gamma, beta, mean, *_ = layer.args
        if isinstance(mean, Node):
            _scale(graph, layer, gamma, beta, mean.meta["val"], factor, shift)
        return isinstance(mean, Node)
    if layer.target not in _LAYERS or not _is_constant(layer.args[1]):
        return False
    weight: Any = layer.args[1]
    bias = layer.args[2] if len(layer.args) > 2 else None
    size = weight.meta["val"].shape
    groups: Any = layer.args[6] if layer.target in _CHANNELS_FIRST and len(layer.args) > 6 else 1
    channels = size[1] * groups if layer.target in _CHANNELS_FIRST else size[0]
    _scale(graph, layer, weight, bias, weight.meta["val"].new_empty(channels), factor, shift)
    return True


def _scale(graph: GraphModule, layer: Node, weight: Any, bias: Any, channels: Any, factor: float, shift: float) -> None:
    """Scale the weight of a layer or BatchNorm by ``factor``, its bias too, and add ``shift`` to that."""
    # BatchNorm's own are read where it is folded, which is in front of the layer before it.
    first = layer.args[0] if layer.target is aten.batch_norm.default else layer
    with graph.graph.inserting_before(first):  # type: ignore[arg-type]
        if weight is None:
            weight = constant(graph, f"weight_of_{layer.name}", torch.full(channels.shape, factor), channels)
        else:
            weight = call(graph, aten.mul.Tensor, weight, factor)
        if bias is not None:
            bias = call(graph, aten.mul.Tensor, bias, factor)
            bias = call(graph, aten.add.Tensor, bias, shift) if shift else bias
        elif shift:
            bias = constant(graph, f"bias_of_{layer.name}", torch.full(channels.shape, shift), channels)
    layer.args = (layer.args[0], weight, bias, *layer.args[3:])


def _is_constant(node: Any) -> bool:
    """Whether a value depends on parameters alone, and not on what the network is fed."""
    trail = [node]
    for value in trail:  # grows while it is walked
        if not isinstance(value, Node) or value.op == "placeholder":
            return False
        trail.extend(parent for parent in value.all_input_nodes if parent not in trail)
    return True
