"""Schemes for float networks that need no calibration: 16-bit floats, weights in few bits, activations on the fly.

What a target takes of them is in the type of its ``scheme`` option; what came of it is read from the file.
"""

from __future__ import annotations

from typing import Literal

from lightning_edge.contents import Contents
from lightning_edge.errors import ExportError
from lightning_edge.measure import Tolerance

Scheme = Literal[
    "fp16",
    "int8_weight_only",
    "int4_weight_only",
    "int8_dynamic",
    "int4_dynamic",
    "palette8",
    "palette6",
    "palette4",
    "sparse",
]

# Largest difference over the largest output, and share of equal top classes, from the float network. Measured
# (docs/models.md): fp16 0.001, 8 bits 0.01, 4 bits 0.1; on hardly trained MobileNetV2s, the same on all targets, 0.01,
# 0.1 and 0.8. What has a fault lies further, mostly by orders of magnitude. Zeros left out change nothing.
_TOLERANCES: dict[Scheme, Tolerance] = {
    "fp16": Tolerance(max_relative=0.02, top1=0.95),
    "int8_weight_only": Tolerance(max_relative=0.2, top1=0.9),
    "int8_dynamic": Tolerance(max_relative=0.2, top1=0.9),
    "int4_weight_only": Tolerance(max_relative=0.5, top1=None),
    "int4_dynamic": Tolerance(max_relative=0.5, top1=None),
    "palette8": Tolerance(max_relative=0.2, top1=0.9),
    "palette6": Tolerance(max_relative=0.2, top1=None),
    "palette4": Tolerance(max_relative=0.5, top1=None),
    "sparse": Tolerance(),
}
# Where `Contents` counts the weights of a scheme.
_STORED: dict[Scheme, str] = {
    "fp16": "half_weight_bytes",
    "int8_weight_only": "int8_weight_bytes",
    "int4_weight_only": "int4_weight_bytes",
    "int8_dynamic": "int8_weight_bytes",
    "int4_dynamic": "int4_weight_bytes",
    "palette8": "palette_weight_bytes",
    "palette6": "palette_weight_bytes",
    "palette4": "palette_weight_bytes",
    "sparse": "sparse_weight_bytes",
}
# How many times larger a weight is as 32-bit float; and by what share of all weights a file has to get smaller.
_TIMES_SMALLER: dict[Scheme, int] = {
    "fp16": 2,
    "int8_weight_only": 4,
    "int8_dynamic": 4,
    "int4_weight_only": 8,
    "int4_dynamic": 8,
}
_LEAST_GAIN = 0.05


def tolerance(scheme: Scheme) -> Tolerance:
    """Give how far a file of this scheme may lie from the float network, unless the user says otherwise."""
    return _TOLERANCES[scheme]


def check_scheme(contents: Contents, scheme: Scheme, target: str) -> str | None:
    """Make sure that a file holds weights of its scheme.

    Args:
        contents: What the file says of itself.
        scheme: What was asked for.
        target: Name of the target, for the message.

    Returns:
        What to warn of: how many bytes of weights are in 32-bit floats all the same; ``None`` if none are.

    Raises:
        ExportError: If it holds none, or so few that the file is next to no smaller for it.
    """
    stored = getattr(contents, _STORED[scheme])
    others = contents.float_weight_bytes - (contents.half_weight_bytes if scheme == "fp16" else 0)
    if not stored and scheme == "sparse":
        raise ExportError(
            f"{target}: scheme='sparse' found no weight with zeros enough to be smaller for it ({others} bytes are "
            "float). Train with Sparsify first, or leave scheme out."
        )
    if not stored:
        raise ExportError(
            f"{target}: scheme={scheme!r} left no weight in that form ({others} bytes are float): this target has it "
            "for other layers than the network's. docs/schemes.md says which; choose another scheme or target."
        )
    times = _TIMES_SMALLER.get(scheme)
    if times is not None and (times - 1) * stored < _LEAST_GAIN * (times * stored + others):
        raise ExportError(
            f"{target}: scheme={scheme!r} leaves {others} bytes of the weights float beside {stored} in that form, so "
            "that the file is no smaller or faster: this target has it for few of the network's layers. "
            "docs/schemes.md says for which; leave scheme out, or choose another scheme or target."
        )
    return f"scheme {scheme}: {others} bytes of the weights stay float beside {stored}" if others else None
