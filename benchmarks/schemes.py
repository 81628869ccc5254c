"""Print what each target takes of each scheme for float networks: bytes of the file and agreement, from the file.

    .venv/bin/python benchmarks/schemes.py

Three small networks with fresh weights: an MLP, a CNN and a transformer block; for ``sparse`` the smaller half of each
matrix and kernel is zero. Nothing is trained, so that equal top classes say little; the largest difference over the
largest output is the figure to read.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from lightning_edge.comparison import Comparison
from lightning_edge.errors import EdgeError
from lightning_edge.exporters import TARGETS, export, target
from lightning_edge.exporters.schemes import Scheme

SAMPLES = 32


class TransformerBlock(nn.Module):
    """Layer norm, attention and a linear layer over five tokens of 32 values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.heads = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.classify = nn.Linear(32, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Give scores of 10 classes, ``(batch, 10)``, for ``(batch, 5, 32)``."""
        query, key, value = self.heads(self.norm(tokens)).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        scores: Tensor = self.classify((tokens + self.out(attended.transpose(1, 2).flatten(2)))[:, 0])
        return scores


def mlp() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    """A convolution, a depthwise one, a 1x1 one and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (64,)),
    "CNN": (cnn, (3, 8, 8)),
    "transformer": (TransformerBlock, (5, 32)),
}


def cell(name: str, scheme: Scheme | None, build: Callable[[], nn.Module], shape: tuple[int, ...], folder: Path) -> str:
    """Export one network and give its bytes and largest relative difference, or a dash where it is refused."""
    torch.manual_seed(0)
    network, inputs = build().eval(), torch.randn(SAMPLES, *shape)
    if scheme == "sparse":
        with torch.no_grad():
            for weight in (parameter for parameter in network.parameters() if parameter.dim() > 1):
                weight[weight.abs() < weight.abs().median()] = 0.0
    options: dict[str, object] = {} if scheme is None else {"scheme": scheme}
    if (name, scheme) == ("coreml", "int4_weight_only"):
        options["minimum_ios"] = 18
    try:
        path = folder / f"net{target(name).SUFFIX}"
        artifact = export(network, name, path, inputs=inputs[:1], batches=[inputs], **options)  # type: ignore[arg-type]
    except (EdgeError, ValueError):
        return "-"
    comparison = Comparison()
    with torch.no_grad():
        comparison.update([network(inputs)], artifact(inputs))
    contents = artifact.contents
    stored = (contents.float_weight_bytes, contents.int8_weight_bytes, contents.int4_weight_bytes)
    weights = sum((*stored, contents.palette_weight_bytes, contents.sparse_weight_bytes))
    return f"{artifact.size_bytes} ({weights}), {comparison.result().max_relative:.1g}"


def main() -> None:
    """Print one table a network, in Markdown."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    columns: list[Scheme | None] = [None, *get_args(Scheme)]
    with tempfile.TemporaryDirectory() as folder:
        for title, (build, shape) in NETWORKS.items():
            print(f"\n{title}: bytes of the file (of its weights), largest difference over the largest output\n")
            print(f"| target | {' | '.join(str(scheme or 'fp32') for scheme in columns)} |")
            print(f"| --- |{' ---: |' * len(columns)}")
            for name in TARGETS:
                row = [cell(name, scheme, build, shape, Path(folder)) for scheme in columns]
                print(f"| {name} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
