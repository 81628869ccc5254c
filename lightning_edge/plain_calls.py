"""Functions of torch that targets lack, computed by others that all have, while a network is captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import embedding_bag, fold, unfold
from torch.overrides import TorchFunctionMode

from lightning_edge.embedding_bags import looked_up
from lightning_edge.windows import folded, unfolded

# Each gives None for arguments that it does not stand for.
_STAND_INS: dict[Any, Callable[..., Tensor | None]] = {unfold: unfolded, fold: folded, embedding_bag: looked_up}


class PlainCalls(TorchFunctionMode):
    """Computes ``unfold`` and ``fold`` of windows side by side, and ``embedding_bag`` of a matrix, by plainer calls."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, or what stands for it."""
        stand_in = _STAND_INS.get(func)
        result = None if stand_in is None else stand_in(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result
