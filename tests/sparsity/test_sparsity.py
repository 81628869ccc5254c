"""Sparsify without a Trainer: which weights go, when, what holds them at zero, rewinding, resume, int8."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.quantization import attach, calibrate, convert
from lightning_edge.schedule import Change, Clock
from lightning_edge.sparsity import Sparsify
from lightning_edge.sparsity.masks import Weight, n_of_m, pack, unpack, unstructured
from lightning_edge.succession import follow


class Network(nn.Module):
    """Convolutions, one grouped, and two linear layers; the stem has three inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.features = nn.Sequential(
            nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Dropout(0.1)
        )
        self.head = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 6))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(self.stem(images)).mean((2, 3)))
        return logits


class NoBatch:
    """A `Batch` that must not be looked at: magnitudes need no data."""

    def inputs(self) -> Any:
        raise AssertionError

    def gradients(self, *, per_sample: bool = False) -> Iterator[dict[str, Any]]:
        raise AssertionError


class Training:
    """A training of ten epochs of two steps, as the callback would run it."""

    def __init__(self, phase: Sparsify, network: nn.Module | None = None, adam: bool = False) -> None:
        self.phase = phase
        self.network = Network() if network is None else network
        parameters = self.network.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
            if adam
            else torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True)
        )
        self.changes: list[Change] = []
        self.batches = 0

    def clock(self) -> Clock:
        return Clock(self.batches // 2, self.batches / 20)

    def change(self) -> list[Change]:
        """Make what is due."""
        made = []
        while (change := self.phase.plan(self.network, self.clock(), self.changes, NoBatch())) is not None:
            follow(self.optimizer, self.phase.perform(self.network, change))
            kept = [c for c in self.changes if not (change.get("replaces") and c["kind"] == change["kind"])]
            self.changes = [*kept, change]
            made.append(change)
        return made

    def step(self) -> None:
        self.change()
        torch.manual_seed(self.batches)
        self.optimizer.zero_grad()
        self.network(torch.randn(4, 3, 8, 8)).square().mean().backward()
        self.optimizer.step()
        self.phase.after_step(self.network, self.changes)
        self.batches += 1

    def run(self, until: int = 20) -> Training:
        while self.batches < until:
            self.step()
        return self

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        state = {
            "weights": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "changes": self.changes,
            "batches": self.batches,
        }
        torch.save(state, file)
        file.seek(0)
        return file

    def resumed(self, file: io.BytesIO) -> Training:
        """Go on from a checkpoint: structure first, then weights."""
        state = torch.load(file, weights_only=True)
        self.changes, self.batches = state["changes"], state["batches"]
        for change in self.changes:
            self.phase.perform(self.network, change)
        self.network.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        return self

    def masks(self) -> dict[str, Tensor]:
        (change,) = (change for change in self.changes if change["kind"] == "mask")
        return {name: unpack(bits, torch.Size(change["shapes"][name])) for name, bits in change["masks"].items()}

    def zeros(self) -> float:
        weights = [self.network.get_parameter(name) for name in self.masks()]
        return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_a_packed_mask_is_the_mask_in_an_eighth(size: int) -> None:
    mask = torch.rand(size) > 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-size // 8)
    assert torch.equal(unpack(packed, mask.shape), mask)


def test_the_smallest_go_within_each_layer_or_over_all() -> None:
    small, large = torch.tensor([[0.1, -0.2], [0.3, -0.4]]), torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    weights = {"small": Weight(small, 1, 2), "large": Weight(large, 1, 4)}
    by_layer = unstructured(weights, 0.5, over_all=False)
    assert by_layer["small"].tolist() == [[False, False], [True, True]]
    assert by_layer["large"].tolist() == [[False, False, True, True]]
    over_all = unstructured(weights, 0.625, over_all=True)
    assert not over_all["small"].any()
    assert over_all["large"].tolist() == [[False, True, True, True]]


def test_counts_are_exact_and_equal_weights_keep_their_order() -> None:
    masks = unstructured({"w": Weight(torch.ones(10, 10), 1, 10)}, 0.29, over_all=False)
    assert masks["w"].flatten().tolist() == [False] * 29 + [True] * 71


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(8, 6),
        nn.Conv2d(8, 4, 3),
        nn.Conv2d(16, 4, (1, 3), groups=2),
        nn.Conv1d(4, 5, 3),
        nn.ConvTranspose2d(8, 6, 3, groups=2),
    ],
    ids=str,
)
def test_two_of_four_consecutive_inputs_stay(layer: nn.Module) -> None:
    network = nn.Sequential(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    change = Sparsify(pattern="2:4", start=0).plan(network, Clock(0, None), [], NoBatch())
    assert change is not None
    before = weight.detach().clone()
    Sparsify.perform(network, change)
    inputs_last = (0 if isinstance(layer, nn.ConvTranspose2d) else 1, -1)
    groups, originals = (tensor.detach().movedim(*inputs_last).reshape(-1, 4) for tensor in (weight, before))
    assert ((groups != 0).sum(1) == 2).all()
    # What stays is the larger half of each group.
    assert torch.equal(groups.abs().sort(1).values[:, 2:], originals.abs().sort(1).values[:, 2:])


def test_a_partial_pattern_drops_the_smallest_of_what_will_go_and_only_tightens() -> None:
    data = torch.randn(16, 8)
    half = n_of_m({"w": Weight(data, 1, 8)}, 2, 4, 0.5)["w"]
    whole = n_of_m({"w": Weight(torch.randn(16, 8), 1, 8, half)}, 2, 4, 1.0)["w"]
    assert int((~half).sum()) == 32
    assert int((~whole).sum()) == 64
    assert not (whole & ~half).any()


def test_all_at_once_without_end() -> None:
    training = Training(Sparsify(0.75, start=0.3)).run()
    (change,) = training.changes
    assert (change["epoch"], change["final"]) == (3, True)
    assert training.zeros() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"start": 2, "end": 6, "schedule": "linear"}, {4: 0, 6: 0.2, 8: 0.4, 10: 0.6, 12: 0.8}),
        ({"start": 0.2, "end": 0.6, "schedule": "linear"}, {4: 0, 6: 0.2, 8: 0.4, 10: 0.6, 12: 0.8}),
        ({"start": 2, "end": 6}, {4: 0, 6: 0.4625, 8: 0.7, 10: 0.7875, 12: 0.8}),
        ({"start": 2, "end": 7, "every": 2, "schedule": "linear"}, {4: 0, 8: 0.32, 12: 0.64, 14: 0.8}),
        ({"start": 0.1, "end": 0.3, "every": 0.1, "schedule": "linear"}, {2: 0, 4: 0.4, 6: 0.8}),
        ({"start": 0.25, "end": 0.5, "schedule": "linear"}, {5: 0, 6: 0.16, 8: 0.48, 10: 0.8}),
    ],
    ids=str,
)
def test_zeros_follow_the_schedule(settings: dict[str, Any], expected: dict[int, float]) -> None:
    training = Training(Sparsify(0.8, **settings))
    seen, masks = {}, {}
    while training.batches < 20:
        changes = training.change()
        if changes:
            (change,) = changes
            seen[training.batches] = change["zeros"] / change["weights"]
            assert not any((masks[name] < mask).any() for name, mask in training.masks().items() if name in masks)
            masks = training.masks()
            assert all(torch.equal(training.network.get_parameter(name) != 0, mask) for name, mask in masks.items())
        training.step()
    assert seen == pytest.approx(expected, abs=0.01)
    assert [change["final"] for change in training.changes] == [True]


def test_fractions_of_a_training_of_unknown_length_never_come() -> None:
    assert Sparsify(start=0.3).plan(Network(), Clock(1000, None), [], NoBatch()) is None


@pytest.mark.parametrize("adam", [False, True])
def test_zeros_stay_zero_under_momentum_and_weight_decay(adam: bool) -> None:
    training = Training(Sparsify(0.6, start=0.2), adam=adam).run(4)
    training.step()
    masks = training.masks()
    moved = {name: training.network.get_parameter(name).detach().clone() for name in masks}
    training.run()
    for name, mask in masks.items():
        weight = training.network.get_parameter(name).detach()
        assert not weight[~mask].any()
        assert (weight != moved[name])[mask].float().mean() > 0.9
        state = training.optimizer.state[training.network.get_parameter(name)]
        # The optimizer would have moved them: its momentum of the masked weights is not zero.
        assert state["exp_avg" if adam else "momentum_buffer"][~mask].any()


@pytest.mark.parametrize("stop", [3, 5, 8, 9, 14])
@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.5, "start": 0.2, "end": 0.6},
        {"pattern": "2:4", "start": 1, "end": 6, "every": 2},
        {"sparsity": 0.9, "start": 2, "ranking": "global", "ignore": ["stem"]},
        {"sparsity": 0.5, "start": 0.2, "end": 0.4, "rewind_to": 0.1},
    ],
    ids=str,
)
def test_resume_is_bitwise_exact(settings: dict[str, Any], stop: int) -> None:
    torch.manual_seed(1)
    straight = Training(Sparsify(**settings), adam=True).run(stop)
    file = straight.saved()
    straight.run()
    torch.manual_seed(2)  # other fresh weights
    resumed = Training(Sparsify(**settings), adam=True).resumed(file).run()
    assert same(resumed.network, straight.network)
    assert all(torch.equal(mask, straight.masks()[name]) for name, mask in resumed.masks().items())
    assert resumed.zeros() == straight.zeros() > 0.3


def test_a_resumed_training_keeps_exactly_the_recorded_zeros() -> None:
    training = Training(Sparsify(0.5, start=0.1)).run(8)
    masks = training.masks()
    resumed = Training(Sparsify(0.5, start=0.1)).resumed(training.saved())
    for _ in range(12):
        resumed.step()
        for name, mask in masks.items():
            assert torch.equal(resumed.network.get_parameter(name) != 0, mask)


def test_a_checkpoint_holds_one_bit_for_each_weight() -> None:
    network = nn.Sequential(nn.Linear(256, 256))
    training = Training(Sparsify(start=1, end=4), network)
    without = training.saved().getbuffer().nbytes
    for batches in (2, 4, 6, 8):
        training.batches = batches
        training.change()
    assert len(training.changes) == 1
    assert training.saved().getbuffer().nbytes - without < 256 * 256 / 8 + 4000


def test_rewinding_brings_back_the_remembered_weights_and_fresh_optimizer_state() -> None:
    training = Training(Sparsify(0.5, start=2, end=4, rewind_to=1), adam=True).run(2)
    before = copy.deepcopy(training.network.state_dict())
    training.run(8)
    remembered = [change["kind"] for change in training.changes]
    statistics = training.network.features[0].running_mean.clone()
    assert training.optimizer.state
    order = [id(parameter) for parameter in training.optimizer.param_groups[0]["params"]]
    made = training.change()
    assert remembered == ["remember", "mask"]
    assert [change["kind"] for change in made] == ["mask", "rewind"]
    assert [change["kind"] for change in training.changes] == ["remember", "mask", "rewind"]
    masks = training.masks()
    for name, parameter in training.network.named_parameters():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(parameter, expected)
    assert torch.equal(training.network.features[0].running_mean, statistics)
    assert not training.optimizer.state
    assert [id(parameter) for parameter in training.optimizer.param_groups[0]["params"]] == order
    training.run()
    assert all(torch.equal(training.network.get_parameter(name) != 0, mask) for name, mask in masks.items())


def test_what_is_remembered_is_in_a_checkpoint_once() -> None:
    network = nn.Sequential(nn.Linear(256, 256))
    training = Training(Sparsify(0.5, start=2, rewind_to=1), network)
    without = training.saved().getbuffer().nbytes
    training.batches = 2
    training.change()
    training.batches = 4
    training.change()
    assert [change["kind"] for change in training.changes] == ["remember", "mask", "rewind"]
    assert training.saved().getbuffer().nbytes - without < (4 + 1 / 8) * (256 * 256 + 256) + 8000


@pytest.mark.parametrize("live_batch_norm", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_survive_int8_training_and_conversion(pattern: str, live_batch_norm: bool) -> None:
    training = Training(Sparsify(pattern=pattern, start=0)).run(2)
    inputs = Inputs((torch.randn(4, 3, 8, 8),))
    attach(training.network, inputs, live_batch_norm=live_batch_norm)
    calibrate(training.network, inputs)
    training.run(8)
    converted = convert(training.network)
    stored = [tensor for tensor in converted.graph.state_dict().values() if tensor.dtype == torch.int8]
    for name, mask in training.masks().items():
        assert torch.equal(training.network.get_parameter(name) != 0, mask)
        (weight,) = (tensor for tensor in stored if tensor.shape == mask.shape)
        assert not weight[~mask].any()
        assert (weight[mask] != 0).float().mean() > 0.9


def test_layers_that_are_ignored_or_do_not_fit_the_pattern_stay_dense() -> None:
    network = Network()
    phase = Sparsify(pattern="2:4", start=0, ignore=["head.*"])
    change = phase.plan(network, Clock(0, None), [], NoBatch())
    assert change is not None
    assert list(change["masks"]) == ["features.2.weight"]
    assert change["left_alone"] == {"stem": "its 3 inputs are not whole groups of 4"}
    assert phase.describe(change) == (
        "50.0% of 576 weights in 1 layer are zero (2:4); left dense: stem: its 3 inputs are not whole groups of 4"
    )


def test_a_shared_weight_is_masked_once_and_stays_dense_if_either_layer_is_ignored() -> None:
    network = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    network["b"].weight = network["a"].weight
    change = Sparsify(start=0).plan(network, Clock(0, None), [], NoBatch())
    assert change is not None
    assert (list(change["masks"]), change["weights"]) == (["a.weight", "c.weight"], 128)
    change = Sparsify(start=0, ignore=["b"]).plan(network, Clock(0, None), [], NoBatch())
    assert change is not None
    assert list(change["masks"]) == ["c.weight"]


def test_a_computed_weight_is_left_alone_with_the_reason() -> None:
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    change = Sparsify(start=0).plan(network, Clock(0, None), [], NoBatch())
    assert change is not None
    assert change["left_alone"] == {"0": "its weight is computed from other parameters"}


def test_what_cannot_be_is_refused() -> None:
    def plan(phase: Sparsify, network: nn.Module) -> Change | None:
        return phase.plan(network, Clock(0, None), [], NoBatch())

    with pytest.raises(CompressionError, match=r"ignore='tail' matches nothing.*stem, features\.2"):
        plan(Sparsify(start=0, ignore=["tail"]), Network())
    with pytest.raises(CompressionError, match="no weight to sparsify"):
        plan(Sparsify(start=0), nn.Sequential(nn.ReLU()))
    tiny = Network()
    with torch.no_grad():
        tiny.stem.weight.mul_(1e-6)
    with pytest.raises(CompressionError, match=r"every weight of stem\.weight would be zero.*ignore=\['stem'\]"):
        plan(Sparsify(0.5, start=0, ranking="global"), tiny)
    with torch.no_grad():
        tiny.stem.weight.fill_(float("nan"))
    with pytest.raises(CompressionError, match=r"stem\.weight is not finite"):
        plan(Sparsify(start=0), tiny)


def test_masks_of_another_structure_are_refused() -> None:
    training = Training(Sparsify(start=0)).run(1)
    (change,) = training.changes
    narrow = Network()
    narrow.head[0] = nn.Linear(16, 20)
    with pytest.raises(CompressionError, match=r"mask of head\.0\.weight is for .*\(24, 16\).*prune first"):
        Sparsify.perform(narrow, change)
    with pytest.raises(CompressionError, match=r"has no parameter 'stem\.weight'"):
        Sparsify.perform(nn.Sequential(nn.Linear(3, 3)), change)
    remember = Sparsify(start=0, rewind_to=0).plan(Network(), Clock(0, None), [], NoBatch())
    assert remember is not None
    with pytest.raises(CompressionError, match=r"head\.0\.weight was remembered with shape"):
        Sparsify.perform(narrow, {**change, "kind": "rewind", "weights": remember["weights"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": 0.0}, "sparsity=0.0"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "the pattern fixes it at 0.5"),
        ({"pattern": "4:2"}, "pattern='4:2'"),
        ({"pattern": "block"}, "pattern='block'"),
        ({"pattern": "2:4", "ranking": "global"}, "ranking='global' with pattern"),
        ({"ranking": "row"}, "ranking='row' is not one of"),
        ({"schedule": "cosine"}, "schedule='cosine' is not one of"),
        ({"start": -1}, "start=-1"),
        ({"start": 0.5, "end": 0.4}, "end=0.4 comes before"),
        ({"start": 1, "end": 0.4}, "both as epochs or both as fractions"),
        ({"start": 0.5, "rewind_to": 0.6}, "start=0.5 comes before rewind_to"),
        ({"start": 0.5, "rewind_to": 0}, "both as epochs or both as fractions"),
        ({"every": 1}, "without end"),
        ({"start": 0.1, "end": 0.5, "every": 0}, "every=0 is neither"),
        ({"start": 1, "end": 5, "every": 0.1}, "is a fraction of training"),
        ({"ignore": "head"}, "must be a list"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sparsify(**settings)


def test_settings_are_the_arguments_and_moments_are_told() -> None:
    given = {
        "sparsity": 0.5,
        "pattern": "unstructured",
        "start": 2,
        "end": 6,
        "every": 2,
        "schedule": "linear",
        "ranking": "global",
        "ignore": ["head"],
        "rewind_to": 1,
    }
    phase = Sparsify(**given)  # type: ignore[arg-type]
    assert phase.settings() == given
    assert (phase.first_moment(), phase.last_moment()) == (1, 6)
    assert (Sparsify(start=0.2).first_moment(), Sparsify(start=0.2).last_moment()) == (0.2, 0.2)


def test_undo_leaves_the_network_loadable() -> None:
    training = Training(Sparsify(start=0)).run(1)
    names = list(training.network.state_dict())
    Sparsify.undo(training.network, training.changes[0])
    assert list(training.network.state_dict()) == names
    training.network.load_state_dict(Network().state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_reaches_its_sparsity(name: str) -> None:
    network = MODELS[name].build()
    change = Sparsify(0.7, start=0).plan(network, Clock(0, None), [], NoBatch())
    assert change is not None
    Sparsify.perform(network, change)
    for parameter in change["masks"]:
        weight = network.get_parameter(parameter)
        assert int((weight == 0).sum()) == int(0.7 * weight.numel() + 1e-9)


def test_a_run_resumed_for_longer_keeps_the_zeros_that_are_there() -> None:
    torch.manual_seed(0)
    network, phase = Network(), Sparsify(sparsity=0.5, start=0.5, end=0.9)
    change = phase.plan(network, Clock(3, 0.75), [], NoBatch())
    assert change is not None
    zeros = change["zeros"]
    assert zeros > 0
    # The same epoch of a training that has become longer: before the start, and back in the ramp.
    shares = [phase.plan(network, Clock(4, progress), [change], NoBatch()) for progress in (0.2, 0.55)]
    assert shares == [None, None]
    later = phase.plan(network, Clock(17, 0.88), [change], NoBatch())
    assert later is not None
    assert later["zeros"] > zeros
