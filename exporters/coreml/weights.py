"""Compress the weights of a Core ML package: fewer bits, blocks, palettes, or zeros left out."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import nn

from lightning_edge.errors import ExportError
from lightning_edge.exporters.artifact import size_bytes
from lightning_edge.exporters.coreml.package import compact, quiet
from lightning_edge.exporters.verify.contents import warn_uneven_groups
from lightning_edge.network import Deployable

Scheme = Literal["fp16", "int8_weight_only", "int4_weight_only", "palette8", "palette6", "palette4", "sparse"]

# A float weight is stored sparse from this share of zeros on: below, the bits that say where they are outweigh them.
_SPARSE_FROM = 0.1
# Of an int8 one, which has eight bits to the one that says where it is.
_SPARSE_INT8_FROM = 0.15
# With fewer weights to a scale of four bytes, four bits a weight are no smaller than eight.
_LEAST_BLOCK = 16
_FIRST_IOS = 18


def check(minimum_ios: int, scheme: Scheme | None, block_size: int | None, sparse_weights: bool, is_int8: bool) -> None:
    """Refuse options that do not go together, or that the oldest iOS does not have.

    Raises:
        ValueError: Naming what was given and what is allowed.
    """
    if scheme == "int4_weight_only" and minimum_ios < _FIRST_IOS:
        raise ValueError(f"minimum_ios={minimum_ios!r}: scheme='int4_weight_only' needs minimum_ios=18 or later")
    if block_size is not None:
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < _LEAST_BLOCK:
            raise ValueError(
                f"coreml: block_size={block_size!r} is not allowed: give a whole number of {_LEAST_BLOCK} or more, or "
                "None for one scale a channel. In smaller blocks the scales make the file as large as int8"
            )
        if scheme != "int4_weight_only":
            raise ValueError(
                f"coreml: block_size={block_size!r} says something of scheme='int4_weight_only' only, and this is "
                f"scheme={scheme!r}; leave one out"
            )
    if not sparse_weights:
        return
    if not is_int8:
        raise ValueError("coreml: sparse_weights is for int8 networks; for a float one give scheme='sparse'")
    if minimum_ios < _FIRST_IOS:
        raise ValueError(f"minimum_ios={minimum_ios!r}: sparse_weights of int8 networks need minimum_ios=18 or later")


def in_scheme(model: Any, scheme: Scheme, block_size: int | None = None) -> Any:
    """Store each weight as the scheme says, however small it is; where blocks do not fit, with one scale a channel."""
    from coremltools.optimize import coreml

    if scheme == "sparse":
        return _without_zeros(model, _SPARSE_FROM, joint=False)
    if scheme.startswith("palette"):
        bits = int(scheme.removeprefix("palette"))
        palette = coreml.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=0)
        return coreml.palettize_weights(model, coreml.OptimizationConfig(global_config=palette))
    common: dict[str, Any] = {"mode": "linear_symmetric", "dtype": scheme.split("_")[0], "weight_threshold": 0}
    blocks: list[dict[str, Any]] = []
    if block_size is not None:
        blocks.append({"granularity": "per_block", "block_size": block_size})
    # What the blocks did not fit is left by the first for the second.
    for granularity in (*blocks, {"granularity": "per_channel"}):
        config = coreml.OpLinearQuantizerConfig(**common, **granularity)
        model = coreml.linear_quantize_weights(model, coreml.OptimizationConfig(global_config=config))
    return model


def tell_uneven(network: nn.Module, block_size: int) -> None:
    """Warn of the layers whose inputs are no whole number of blocks."""
    warn_uneven_groups("coreml", network, _inputs, block_size, "have one scale a channel")


def save_without_zeros(model: Any, path: Path, network: Deployable) -> None:
    """Save an int8 model without the zeros of its weights: one bit for each place, and the integers that are not zero.

    Args:
        model: The model.
        path: Where to write, a folder that does not exist yet.
        network: What the model was made of; `mlpackage.compact` is done by it.

    Raises:
        ExportError: If that makes the package no smaller.
    """
    with TemporaryDirectory() as folder, quiet():
        dense = Path(folder, path.name)
        # Both the same way, which by itself leaves out some bytes: only weights of nothing but zeros are sparse in one.
        for share, place in ((1.0, dense), (_SPARSE_INT8_FROM, path)):
            _without_zeros(model, share, joint=True).save(str(place))
            compact(place, network.output_names(), network.interface)
        before, after = size_bytes(dense), size_bytes(path)
    if after >= before:
        raise ExportError(
            f"coreml: sparse_weights=True makes the package no smaller ({after} bytes against {before}): too few "
            "weights are zero for the bits that say where. Train with Sparsify first, or leave it out."
        )


def _without_zeros(model: Any, from_share: float, *, joint: bool) -> Any:
    """Store weights without their zeros; ``joint`` for those that are stored as integers already, and no others."""
    from coremltools.optimize import coreml

    config = coreml.OpThresholdPrunerConfig(threshold=0.0, minimum_sparsity_percentile=from_share, weight_threshold=0)
    return coreml.prune_weights(model, coreml.OptimizationConfig(global_config=config), joint_compression=joint)


def _inputs(module: nn.Module) -> int:
    """Length of the dimension of a layer's weights that blocks lie along, 0 where it has none."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.weight.shape[1]
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return module.weight.shape[0]
    return 0
