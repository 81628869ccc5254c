"""Networks ready for export, made once per run: a float and an int8 form of each entry of `models.MODELS` and more."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from models import MODELS, Model
from torch import Tensor, nn
from torch.nn import functional

from lightning_edge.exporters import Artifact, ExportWarning, deployable, export
from lightning_edge.measure import Agreement
from lightning_edge.network import Deployable, Inputs, Precision
from lightning_edge.quantization import quantize


class Attention(nn.Module):
    """A transformer block: products of two activations, layer norm, softmax and GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.heads = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.classify = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.heads(self.norm(tokens)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        tokens = tokens + self.out(
            functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        )
        logits: Tensor = self.classify(functional.gelu(tokens)[:, 0])
        return logits


class Difference(nn.Module):
    """Two inputs of one shape that must not be swapped, given by keyword, and outputs whose names are not sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.plus = nn.Linear(6, 4)
        self.minus = nn.Linear(6, 4)

    def forward(self, zebra: Tensor, ape: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.plus(zebra)) - torch.relu(self.minus(ape))
        return {"whole": hidden, "first": torch.relu(hidden[:, :1])}


class Pooled(nn.Module):
    """A pool that leaves out the last row, as DS-CNN's does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(functional.avg_pool2d(torch.relu(self.layer(images)), (4, 4)).flatten(1))
        return logits


class Tokens(nn.Module):
    """Integers in, an embedding, and a mask of truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.where(mask.unsqueeze(2), self.embed(ids), 0.0).sum(1))
        return logits


NETWORKS = {
    **MODELS,
    "attention": Model(Attention, lambda batch: Inputs((torch.randn(batch, 5, 16),))),
    "difference": Model(
        Difference, lambda batch: Inputs(kwargs={"zebra": torch.randn(batch, 6), "ape": torch.randn(batch, 6)})
    ),
    "pooled": Model(Pooled, lambda batch: Inputs((torch.randn(batch, 2, 5, 4),))),
    "tokens": Model(Tokens, lambda batch: Inputs((torch.randint(0, 11, (batch, 4)), torch.rand(batch, 4) > 0.5))),
}


@cache
def module(name: str) -> nn.Module:
    """The float network, in eval mode, the same at every call: copy it before changing it."""
    torch.manual_seed(0)
    network = NETWORKS[name].build()
    with torch.no_grad():
        for _ in range(3):  # running statistics that are not 0 and 1
            inputs = NETWORKS[name].inputs(8)
            network(*inputs.args, **inputs.kwargs)
    return network.eval()


@cache
def batches(name: str) -> tuple[Inputs, ...]:
    """What it is calibrated and compared on."""
    torch.manual_seed(1)
    return tuple(NETWORKS[name].inputs(8) for _ in range(2))


@cache
def network(name: str, precision: Precision) -> Deployable:
    """The network as an exporter takes it."""
    if precision == "int8":
        return deployable(quantize(module(name), batches(name)))
    return deployable(module(name), batches(name)[0])


def weight_count(name: str) -> int:
    """Values in the weights of its convolution and linear layers."""
    return sum(layer.weight.numel() for layer in module(name).modules() if isinstance(layer, nn.Linear | nn.Conv2d))


def int8_weight_count(name: str) -> int:
    """Those of its int8 form, where a pool of windows is a convolution: 2x2 on 8 channels in one of the networks."""
    return weight_count(name) + (8 * 2 * 2 if name == "plain" else 0)


def exported(model: nn.Module, target: str, path: Path, **options: Any) -> tuple[Artifact, list[str]]:
    """The file, and what the export warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExportWarning)
        artifact = export(model, target, path, **options)
    return artifact, [str(warning.message) for warning in caught if issubclass(warning.category, ExportWarning)]


class Branches(nn.Module):
    """Networks of the same inputs side by side, by name: one file shows what each of them becomes."""

    def __init__(self, branches: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = list(branches)
        self.branches = nn.ModuleList(branches.values())

    def forward(self, *inputs: Tensor) -> list[Any]:
        return [branch(*inputs) for branch in self.branches]


def beyond(
    names: list[str], agreement: Agreement | None, *, steps: float | None = None, relative: float | None = None
) -> dict[str, str]:
    """Name the outputs that lie further from the network's than allowed, in steps of their scale or relatively."""
    assert agreement is not None
    found = {}
    for name, output in zip(names, agreement.outputs, strict=True):
        far = relative is not None and output.max_relative >= relative
        if far or (steps is not None and (output.max_steps is None or output.max_steps > steps)):
            found[name] = f"{output.max_steps} steps, {output.max_relative:.2g} of the largest output"
    return found
