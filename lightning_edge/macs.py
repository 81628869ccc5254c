"""How many multiply-accumulates an operation is, from the shapes of what it reads and gives. Knows no torch.

One multiply-accumulate is one product that is added to a sum; biases, activations and corrections of zero points are
not counted. Padding is: kernels multiply by it, and the published figures of networks count it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod


def convolution(output: Sequence[int], weight: Sequence[int], output_channels: int) -> int:
    """Count those of a convolution, grouped and depthwise too: each output value is a sum over one filter.

    Args:
        output: Shape of the output, in any layout.
        weight: Shape of the weights, in any layout.
        output_channels: How many filters the weights are.
    """
    return prod(output) * prod(weight) // max(1, output_channels)


def transposed_convolution(data: Sequence[int], weight: Sequence[int], input_channels: int) -> int:
    """Count those of a transposed convolution: each input value is multiplied by all that its channel is spread over.

    Args:
        data: Shape of the input, in any layout.
        weight: Shape of the weights, in any layout.
        input_channels: How many channels the input has.
    """
    return prod(data) * prod(weight) // max(1, input_channels)


def product(output: Sequence[int], shared: int) -> int:
    """Count those of a matrix product or linear layer: each output value is a sum over the shared dimension.

    Args:
        output: Shape of the output.
        shared: Length of the dimension that both factors have.
    """
    return prod(output) * shared


def attention(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Count those of attention: the scores, and the values weighted by them.

    Args:
        query: Shape (..., queries, features).
        key: Shape (..., keys, features).
        value: Shape (..., keys, value features).
    """
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
