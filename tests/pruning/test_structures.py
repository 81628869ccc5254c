"""Structures of networks whose code knows of channels: splits, selective kernels, heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pruned import SomeBatch
from torch import Tensor, nn
from torch.nn import functional

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.pruning import Prune
from lightning_edge.pruning.cutting import make_cut, undo_cut
from lightning_edge.pruning.traced import trace
from lightning_edge.record_check import check_record
from lightning_edge.schedule import Change, Clock


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Halves(nn.Module):
    """C2f of YOLO: one half gets a residual and is read three times, and the halves are joined in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(48, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def parts(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.chunk(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, passed = self.parts(self.first(x))
        return self.head(self.last(torch.cat([passed + self.middle(passed), passed, kept], 1)).relu())


class CountedHalves(Halves):
    """The halves are of a size that the module keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16

    def parts(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.split((self.width, self.width), 1)


class FixedHalves(Halves):
    """The size of the halves is written into the code."""

    def parts(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.split((16, 16), 1)


class OneHalf(Halves):
    """Only the second part of a split is read."""

    def parts(self, y: Tensor) -> tuple[Tensor, ...]:
        _, passed = y.chunk(2, 1)
        return passed, passed


class SelectiveKernels(nn.Module):
    """Two branches, weighed for each channel by one layer with a row for each branch (Li et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.small, self.large = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 5, padding=2)
        self.reduce, self.select = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 32, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        branches = torch.stack([self.small(x).relu(), self.large(x).relu()], 1)
        weights = self.select(self.reduce(branches.sum(1).mean((2, 3), keepdim=True)).relu())
        batch, channels, height, width = weights.shape
        weights = weights.view(batch, 2, channels // 2, height, width).softmax(1)
        return self.head((branches * weights).sum(1).mean((2, 3)))


class Attention(nn.Module):
    """Heads of a width that is written into the module, and as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.out = nn.Linear(32, 32)
        self.num_heads, self.head_dim = 4, 8

    def shape(self, x: Tensor) -> tuple[int, ...]:
        return *x.shape[:-1], -1, self.head_dim

    def forward(self, x: Tensor) -> Tensor:
        shape = self.shape(x)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return x + self.out(attended.flatten(2))


class CountedAttention(Attention):
    """Both are written into the module."""

    def shape(self, x: Tensor) -> tuple[int, ...]:
        return *x.shape[:-1], self.num_heads, self.head_dim


class FusedAttention(nn.Module):
    """Query, key and value by one layer, as timm has it; the widths of what comes out are counted, too."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.attn_dim = 32
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key

    def width(self, x: Tensor) -> int:
        return self.attn_dim

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*self.normed(query, key), value)
        return x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, self.width(x)))


class OwnNorm(nn.Module):
    """An RMSNorm of the network's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class NormedAttention(FusedAttention):
    """Queries and keys are normalized, by one norm for all heads (timm's ``qk_norm=True``)."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.q_norm, self.k_norm = norm(8), norm(8)

    def normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(query), self.k_norm(key)


class SizedAttention(NormedAttention):
    """What comes out has the size of what came in."""

    def width(self, x: Tensor) -> int:
        return x.shape[-1]


class ChunkedAttention(NormedAttention):
    """Query, key and value are chunks of what one layer gives (nanoGPT)."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        attended = functional.scaled_dot_product_attention(*self.normed(query, key), value)
        return x + self.proj(attended.transpose(1, 2).flatten(2))


class SplitHeads(nn.Module):
    """LeViT: each head is split into its query, its key, and a value twice as wide, and has biases of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim, self.val_attn_dim = 4, 4, 8, 32
        self.qkv, self.proj = nn.Linear(32, 64), nn.Linear(32, 32)
        self.biases = nn.Parameter(torch.randn(4, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).view(*x.shape[:2], self.num_heads, -1)
        query, key, value = heads.split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        scores = query.permute(0, 2, 1, 3) @ key.permute(0, 2, 3, 1) + self.biases
        attended = (scores.softmax(-1) @ value.permute(0, 2, 1, 3)).transpose(1, 2)
        return x + self.proj(attended.reshape(*x.shape[:2], self.val_attn_dim))


class GatedLinear(nn.Module):
    """One half weighs the other, and the halves are of the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(32, 48), nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        gate, passed = self.both(x).chunk(2, -1)
        return x + self.out(gate.sigmoid() * passed)


def cut(network: nn.Module, inputs: Inputs, phase: Prune) -> Change:
    """Plan a cut, make it, and see that it goes back."""
    change = phase.plan(network, Clock(0, 0.0), [], SomeBatch(network, inputs))
    assert change is not None
    shapes = {name: tensor.shape for name, tensor in network.named_parameters()}
    make_cut(network, change)
    network(*inputs.args)
    undo_cut(network, change)
    assert {name: tensor.shape for name, tensor in network.named_parameters()} == shapes
    make_cut(network, change)
    return change


@pytest.mark.parametrize("kind", [Halves, CountedHalves, OneHalf])
def test_halves_stay_equal_whoever_reads_them(kind: type[Halves]) -> None:
    network = kind()
    cut(network, Inputs((torch.randn(2, 3, 8, 8),)), Prune(macs=0.5, round_to=1))
    assert network.first.out_channels == 2 * network.middle.out_channels < 32
    assert network.middle.in_channels == network.middle.out_channels
    if isinstance(network, CountedHalves):
        assert network.width == network.middle.out_channels


def test_sizes_written_into_the_code_are_the_reason_told() -> None:
    network = FixedHalves()
    with pytest.raises(CompressionError, match=r"'first': cutting .* split_sizes=\[16, 16\]"):
        cut(network, Inputs((torch.randn(2, 3, 8, 8),)), Prune(macs=0.5, round_to=1))


def test_a_network_of_fixed_sizes_alone_trains_on_whole() -> None:
    network = FixedHalves()
    network.head = nn.Identity()
    network.last = nn.Conv2d(48, 4, 1)
    batch = SomeBatch(network, Inputs((torch.randn(2, 3, 8, 8),)))
    phase = Prune(macs=0.5, start=1)
    with pytest.warns(UserWarning, match=r"will cut nothing of FixedHalves.*\(test_structures\.py, line \d+\)"):
        trial = phase.plan(network, Clock(0, 0.0), [], batch)
    assert trial is not None
    with pytest.warns(UserWarning, match=r"asked for macs=0\.5.*split_sizes"):
        change = phase.plan(network, Clock(1, 0.5), [trial], batch)
    assert change is not None
    assert change["kept"] == {}
    assert phase.finished([trial, change])
    check_record({"changes": [{"phase": phase.name, **entry} for entry in (trial, change)]})


def test_selective_kernels_lose_the_channel_in_every_branch() -> None:
    network = SelectiveKernels()
    change = cut(network, Inputs((torch.randn(2, 3, 8, 8),)), Prune(layers={"small": 0.5}, round_to=1))
    ((_, kept, _),) = change["kept"]["small.bias"]
    ((_, rows, _),) = change["kept"]["select.bias"]
    assert rows.tolist() == [*kept.tolist(), *(16 + kept).tolist()]
    assert network.large.out_channels == 8


@pytest.mark.parametrize("kind", [Attention, CountedAttention])
def test_attention_loses_whole_heads(kind: type[Attention]) -> None:
    network = nn.Sequential(nn.Linear(6, 32), kind(), nn.Linear(32, 4))
    attention = network[1]
    assert isinstance(attention, Attention)
    inputs = Inputs((torch.randn(2, 5, 6),))
    phase = Prune(layers={"1.value": 0.5}, round_to=1)
    change = cut(network, inputs, phase)
    ((_, kept, before),) = change["kept"]["1.query.bias"]
    assert before == 32
    heads = kept.view(-1, 8)
    assert len(heads) == 2
    assert torch.equal(heads, heads[:, :1] // 8 * 8 + torch.arange(8))
    assert attention.head_dim == 8
    assert attention.num_heads == (2 if kind is CountedAttention else 4)
    check_record({"changes": [{"phase": phase.name, **change}]})  # a checkpoint with it loads


@pytest.mark.parametrize(
    "build",
    [
        FusedAttention,
        lambda: NormedAttention(nn.LayerNorm),
        lambda: NormedAttention(nn.RMSNorm),
        lambda: NormedAttention(OwnNorm),
        lambda: ChunkedAttention(nn.Identity),
        lambda: ChunkedAttention(nn.LayerNorm),
    ],
    ids=["plain", "layer-norm", "rms-norm", "own-norm", "chunks", "chunks-layer-norm"],
)
def test_attention_with_one_layer_for_all_three_loses_whole_heads(build: Callable[[], FusedAttention]) -> None:
    network = nn.Sequential(nn.Linear(6, 32), build(), nn.Linear(32, 4))
    attention = network[1]
    assert isinstance(attention, FusedAttention)
    phase = Prune(layers={"1.qkv": 0.5}, round_to=1)
    change = cut(network, Inputs((torch.randn(2, 5, 6),)), phase)
    ((_, kept, before),) = change["kept"]["1.qkv.bias"]
    assert before == 96
    heads = kept.view(3, 2, 8)
    assert torch.equal(heads, heads[:1, :, :1] // 8 * 8 + torch.arange(8) + torch.tensor([0, 32, 64]).view(3, 1, 1))
    assert (attention.num_heads, attention.head_dim) == (2, 8)
    assert isinstance(attention, ChunkedAttention) or attention.attn_dim == 16
    assert attention.proj.in_features == 16
    assert not any("norm" in name for name in change["kept"])  # one norm for all heads, however many
    check_record({"changes": [{"phase": phase.name, **change}]})


def test_heads_that_are_split_unequally_are_left_alone_and_the_rest_is_cut() -> None:
    network = nn.Sequential(nn.Linear(6, 32), SplitHeads(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
    inputs = Inputs((torch.randn(2, 5, 6),))
    with pytest.raises(CompressionError, match=r"'1\.qkv' names only layers that keep .* because its channels do not"):
        cut(network, inputs, Prune(layers={"1.qkv": 0.5}, round_to=1))
    cut(network, inputs, Prune(macs=0.6, round_to=1))
    assert network[1].qkv.out_features == 64
    assert network[1].qkv.in_features < 32
    assert network[2].out_features < 24


def test_gates_in_the_last_dimension_go_with_what_they_weigh() -> None:
    network = nn.Sequential(nn.Linear(6, 32), GatedLinear(), nn.Linear(32, 4))
    change = cut(network, Inputs((torch.randn(2, 5, 6),)), Prune(layers={"1.both": 0.5}, round_to=1))
    ((_, kept, _),) = change["kept"]["1.both.bias"]
    gates, passed = kept.chunk(2)
    assert torch.equal(gates + 24, passed)
    assert network[1].out.in_features == len(gates) == 12


def test_attention_whose_code_keeps_its_size_is_left_alone_and_the_rest_is_cut() -> None:
    network = nn.Sequential(nn.Linear(6, 32), SizedAttention(nn.LayerNorm), nn.Linear(32, 24), nn.Linear(24, 4))
    inputs = Inputs((torch.randn(2, 5, 6),))
    with pytest.raises(CompressionError, match=r"cutting it was tried .*invalid for input of size"):
        Prune(layers={"1.qkv": 0.5}, round_to=1).plan(network, Clock(0, 0.0), [], SomeBatch(network, inputs))
    change = cut(network, inputs, Prune(params=0.9, round_to=1))
    assert any("invalid for input of size" in reason for reason in change["faulty"].values())
    assert network[1].qkv.out_features == 96
    assert network[1].proj.in_features == network[1].num_heads * network[1].head_dim == 32
    assert network[2].out_features < 24


@torch.jit.script
def halves(y: Tensor) -> Tensor:
    """A split that is not seen as one, and one part of it read twice."""
    first, second = y.split([8, 8], 1)
    return torch.cat([first, second, first + second], 1)


class Scripted(nn.Module):
    """A part that calls TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 16), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(halves(self.wide(x)))


def test_only_the_part_that_cannot_be_traced_is_left_alone() -> None:
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(3)])
    blocks[1].append(Scripted())

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = blocks, nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    network, inputs = Blocks(), Inputs((torch.randn(2, 16),))
    types = [type(module) for module in network.modules()]
    structure = trace(network.eval(), inputs)
    assert [type(module) for module in network.modules()] == types
    reasons = {group.name: group.reason for group in structure.groups}
    assert {name for name, reason in reasons.items() if not reason} == {
        "blocks.0.0",
        "blocks.0.2",
        "blocks.1.0",
        "blocks.2.0",
        "blocks.2.2",
    }
    assert "blocks.1.3" in reasons["blocks.1.2"]
    assert "cannot trace that" in reasons["blocks.1.2"]


class ImageNorm(nn.LayerNorm):
    """A LayerNorm over the channels of images, as timm and torchvision have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    """Divides each channel's size by the mean of all (ConvNeXt V2, Woo et al. 2023)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(2, 3), keepdim=True)
        shares = size / (size.mean(1, keepdim=True) + 1e-6)
        return x + self.weight.view(1, -1, 1, 1) * (x * shares) + self.bias.view(1, -1, 1, 1)


class LastNorm(nn.Module):
    """A norm over the last dimension, in front of which channels go there and back."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scale(nn.Module):
    """A factor for each channel, as ConvNeXt has it: a parameter of one dimension that is viewed with more."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(16))
        self.inner = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) * self.gamma.reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: ImageNorm(16),
        lambda: ResponseNorm(16),
        lambda: LastNorm(nn.RMSNorm(16)),
        lambda: LastNorm(nn.LayerNorm(16, elementwise_affine=False)),
        Scale,
    ],
    ids=["images", "response", "rms", "plain", "scale"],
)
def test_norms_over_channels_follow_whoever_wrote_them(norm: Callable[[], nn.Module]) -> None:
    # Images as wide as there are channels: the norm alone says which dimension it looks at.
    network = nn.Sequential(nn.Conv2d(3, 16, 1), norm(), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    change = cut(network, Inputs((torch.randn(2, 3, 5, 16),)), Prune(layers={"0": 0.5}, round_to=1))
    assert network[2].in_channels == 8
    check_record({"changes": [{"phase": "prune", **change}]})


def test_a_norm_that_mixes_channels_is_left_alone() -> None:
    class Neighbours(ResponseNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.roll(1, 1)

    network = nn.Sequential(nn.Conv2d(3, 16, 1), Neighbours(16), nn.Conv2d(16, 4, 1))
    phase, inputs = Prune(layers={"0": 0.5}, round_to=1), Inputs((torch.randn(2, 3, 5, 5),))
    with pytest.warns(UserWarning, match="cuts nothing"):
        change = phase.plan(network, Clock(0, 0.0), [], SomeBatch(network, inputs))
    assert change is not None
    assert not change["kept"]
    assert "something else" in next(iter(change["faulty"].values()))


class TalkingHeads(nn.Module):
    """Attention over images whose heads are mixed by convolutions (EfficientFormerV2, Li et al. 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(16, 32, 1), nn.Conv2d(16, 32, 1), nn.Conv2d(16, 64, 1)
        self.before, self.after, self.proj = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(64, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(x).reshape(batch, 4, -1, height * width) for layer in layers)
        attention = self.after(self.before(query.transpose(2, 3) @ key).softmax(-1))
        attended = (attention @ value.transpose(2, 3)).transpose(2, 3)
        return x + self.proj(attended.reshape(batch, 64, height, width))


def test_a_search_without_an_end_is_stopped_and_the_rest_is_cut() -> None:
    blocks = (TalkingHeads() for _ in range(2))
    network = nn.Sequential(nn.Conv2d(3, 16, 1), *blocks, nn.Conv2d(16, 32, 1), nn.Conv2d(32, 4, 1))
    inputs = Inputs((torch.randn(2, 3, 4, 4),))
    reasons = {group.name: group.reason for group in trace(network.eval(), inputs).groups}
    assert "no end" in reasons["1.query"]
    cut(network, inputs, Prune(layers={"0": 0.5, "3": 0.5}, round_to=1))
    assert (network[0].out_channels, network[3].out_channels) == (8, 16)
