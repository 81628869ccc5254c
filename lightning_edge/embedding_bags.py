"""Embedding bags of equal length, looked up row by row while a network is captured. Knows torch only.

``embedding_bag`` is an operation of offsets into one long list, which targets lack (Core ML, LiteRT, ExecuTorch) or
loop over (ONNX). Of a matrix of indices, which has as many in each bag, it is an embedding and a sum.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding


def looked_up(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    """Compute ``embedding_bag`` by ``embedding``; ``None`` for bags of different lengths and the like.

    Args:
        input: Indices (bags, length).
        weight: Rows (count, width).
        offsets: Not given for a matrix.
        max_norm: Not given: rows would be scaled in place.
        norm_type: Of ``max_norm``.
        scale_grad_by_freq: Of gradients, which a program has none of.
        mode: ``sum`` or ``mean``; ``max`` without ``padding_idx``.
        sparse: Of gradients, too.
        per_sample_weights: A factor for each index, (bags, length).
        include_last_offset: Of ``offsets``.
        padding_idx: The index that stands for nothing.
    """
    if input.dim() != 2 or offsets is not None or max_norm is not None:
        return None
    rows = embedding(input, weight)
    if mode == "max":
        return rows.amax(1) if padding_idx is None else None
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if padding_idx is None:
        return rows.sum(1) if mode == "sum" else rows.mean(1)
    held = (input != padding_idx % weight.shape[0]).to(rows.dtype).unsqueeze(-1)
    total: Tensor = (rows * held).sum(1)
    return total if mode == "sum" else total / held.sum(1).clamp(min=1)
