"""Sums over the graphs of a ``.pte`` file, for every delegate."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_edge.contents import Place
from lightning_edge.errors import require

# Operations that only move or convert values. They are no computation, whatever the dtype.
MOVES = re.compile(
    r"aten::(view|permute|transpose|t|clone|copy|slice|select|cat|expand|squeeze|unsqueeze|_to_copy|to|split|unbind|stack|"
    r"alias|as_strided|full|full_like|arange|constant_pad_nd|detach|empty)(_copy)?\b"
    r"|dim_order_ops::|quantized_decomposed::|executorch_prim::"
)


@dataclass
class Tally:
    """Sums over the graphs of one file. Weights are counted by the name of their constant, since graphs may share one.

    Attributes:
        ops: Operations by kind.
        int8_weights: Bytes of weights stored as 8-bit integers, by name.
        int4_weights: As 4-bit ones.
        half_weights: In a 16-bit float type; also counted in ``float_weights``.
        float_weights: In any float type.
        float_compute: Convolution, linear and matmul operations that compute in float.
        float_other: Other operations that compute in float.
        delegated: Number of operations in delegates.
        undelegated: Names of the operations that ExecuTorch's portable kernels run.
        places: Kind, place and multiply-accumulates of each operation.
    """

    ops: Counter[str] = field(default_factory=Counter)
    int8_weights: dict[str, int] = field(default_factory=dict)
    int4_weights: dict[str, int] = field(default_factory=dict)
    half_weights: dict[str, int] = field(default_factory=dict)
    float_weights: dict[str, int] = field(default_factory=dict)
    float_compute: list[str] = field(default_factory=list)
    float_other: list[str] = field(default_factory=list)
    delegated: int = 0
    undelegated: list[str] = field(default_factory=list)
    places: list[tuple[str, Place, int]] = field(default_factory=list)


def decode(schema: bytes, binary: bytes) -> dict[str, Any]:
    """Decode a flatbuffer by its schema, with the flatc that ExecuTorch ships."""
    flatbuffer = require("executorch.exir._serialize._flatbuffer", "executorch")
    with tempfile.TemporaryDirectory() as folder:
        written, data = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        written.write_bytes(schema)
        data.write_bytes(binary)
        flatbuffer._flatc_decompile(folder, str(written), str(data), ["--raw-binary"])
        text = Path(folder, "graph.json").read_text(encoding="utf-8", errors="replace")
    # flatc writes inf and nan; Python's json reads Infinity and NaN.
    text = re.sub(r"(:|\[|,)(\s*)(-?)inf\b", r"\1\2\3Infinity", text)
    graph = json.loads(re.sub(r"(:|\[|,)(\s*)-?nan\b", r"\1\2NaN", text))
    assert isinstance(graph, dict)
    return graph
