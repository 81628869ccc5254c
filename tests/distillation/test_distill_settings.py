"""Distill itself: teachers from files and import paths, settings, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distilled import Heads, Net, Saved, images, step
from torch import Tensor, nn

from lightning_edge.callbacks.distillation import DistillationWiring
from lightning_edge.distillation import (
    DIST,
    AttentionTransfer,
    Distill,
    Distillation,
    DistillationLoss,
    FeatureMatching,
    KLDivergence,
    LogitsMSE,
)
from lightning_edge.distillation.teacher import build_teacher
from lightning_edge.errors import CompressionError
from lightning_edge.quantization import Quantize
from lightning_edge.schedule import Clock, Phase

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("error:::lightning_edge", "error::lightning_edge.user_warnings.EdgeWarning"),
]


# Teachers from files and import paths.


def test_a_teacher_from_a_checkpoint(tmp_path: Path) -> None:
    saved = Saved(6)
    path = tmp_path / "teacher.ckpt"
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(saved)
    trainer.save_checkpoint(path)
    spec = {"checkpoint": str(path), "class_path": "distilled.Saved"}
    for teacher in (build_teacher(spec), build_teacher({**spec, "module": "net"}), build_teacher(saved)):
        assert isinstance(teacher, Net)
        assert torch.equal(teacher.head.weight, saved.net.head.weight)
    phase = Distill({**spec, "module": "net"})
    assert list(step(Distillation(phase, Net()), images())) == ["kl"]
    assert phase.settings()["teacher"]["checkpoint"] == "teacher.ckpt"
    with pytest.raises(CompressionError, match="no submodule 'nets'; its children: 'net'"):
        build_teacher({**spec, "module": "nets"})
    with pytest.raises(CompressionError, match=r"do not fit .*of another shape.*init_args"):
        build_teacher({**spec, "init_args": {"width": 5}})
    # Bare weights, with the arguments given.
    torch.save(Net(6).state_dict(), path)
    assert build_teacher({"checkpoint": path, "class_path": "distilled.Net", "init_args": {"width": 6}}) is not None
    torch.save({"state_dict": Net()}, path)
    with pytest.raises(CompressionError, match="cannot be read with weights_only=True"):
        build_teacher(spec)


def test_building_a_teacher_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    teacher = build_teacher({"class_path": "distilled.Net", "init_args": {"width": 5}})
    assert teacher.head.in_features == 5  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"class_path": "nowhere.Net"}, "cannot be imported"),
        ({"class_path": "torch.nn.Nothing"}, "cannot be imported"),
        ({"class_path": "Net"}, "cannot be imported"),
        ({"class_path": "distilled.NeedsArguments"}, "cannot be built"),
        ({"class_path": "builtins.dict"}, "is a dict; class_path must name an nn.Module"),
    ],
)
def test_a_teacher_that_cannot_be_built_is_refused(teacher: Any, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        build_teacher(teacher)


def test_builds_from_yaml() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--phases", type=list[Phase])
    here = "lightning_edge.distillation"
    config = f"""
    phases:
      - class_path: {here}.Distill
        init_args:
          teacher: {{class_path: distilled.Net, init_args: {{width: 6}}}}
          losses:
            - class_path: {here}.KLDivergence
              init_args: {{temperature: 2.0, weight: 0.5, end: 0.8}}
            - class_path: {here}.FeatureMatching
              init_args: {{layers: {{relu: conv}}, start: 2}}
          end: 0.9
      - class_path: {here}.Distill
        init_args: {{teacher: {{checkpoint: a.ckpt, class_path: distilled.Saved, module: net}}}}
      - class_path: {here}.Distill
        init_args: {{teacher: self, temperature: 2}}
    """
    built, from_file, from_self = parser.instantiate_classes(parser.parse_string(config)).phases
    assert isinstance(built.teacher, Net)
    assert built.teacher.head.in_features == 6
    assert [type(loss) for loss in built.losses] == [KLDivergence, FeatureMatching]
    assert (built.losses[0].temperature, built.losses[0].end, built.losses[1].start, built.end) == (2.0, 0.8, 2, 0.9)
    assert from_file.teacher == {"checkpoint": "a.ckpt", "class_path": "distilled.Saved", "module": "net"}
    assert from_self.from_self
    settings = built.settings()
    assert settings["losses"][0]["temperature"] == 2.0
    assert settings["losses"][1]["layers"] == {"relu": "conv"}
    assert settings["teacher"] == "distilled.Net"


# The phase, and what it refuses.


def test_the_phase_begins_and_ends() -> None:
    phase, net = Distill(Net(), start=0.25, end=0.5), Net()
    changes: list[Any] = []

    def due(clock: Clock) -> Any:
        change = phase.plan(net, clock, changes, None)  # type: ignore[arg-type]
        if change is not None:
            assert not phase.perform(net, change)
            phase.undo(net, change)
            changes.append(change)
        return change

    assert due(Clock(0, 0.2)) is None
    begin = due(Clock(1, 0.25))
    assert begin == {"kind": "begin", "epoch": 1, "progress": 0.25}
    assert phase.describe(begin) == "learning from Net by KLDivergence"
    assert due(Clock(1, 0.4)) is None
    end = due(Clock(2, 0.5))
    assert end["kind"] == "end"
    assert phase.describe(end) == "the teacher left"
    assert due(Clock(3, 0.9)) is None
    assert (phase.first_moment(), phase.last_moment()) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": "me"}, "'self'"),
        ({"teacher": None}, "is no teacher"),
        ({"teacher": {"checkpoint": "a.ckpt"}}, "no class_path"),
        ({"teacher": {"class_path": "a.B", "args": 1}}, r"unknown keys \['args'\]"),
        ({"start": -1}, "not a moment"),
        ({"start": 0.5, "end": 0.25}, "comes before"),
        ({"losses": []}, "compares nothing"),
        ({"losses": [nn.MSELoss()]}, "no DistillationLoss"),
        ({"losses": [LogitsMSE()], "temperature": 2.0}, "KLDivergence"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"task_weight": -1.0}, "must be 0 or more"),
        ({"losses": [LogitsMSE(start=0.1)], "start": 0.2}, "LogitsMSE's start"),
        ({"losses": [LogitsMSE(end=0.6)], "end": 0.5}, "LogitsMSE's end"),
        ({"losses": [LogitsMSE(end=0.1)], "start": 0.2}, "LogitsMSE's end"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distill(**{"teacher": Net(), **arguments})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KLDivergence(temperature=-1.0), "must be above 0"),
        (lambda: LogitsMSE(weight=0.0), "must be above 0"),
        (lambda: LogitsMSE(weight=float("nan")), "must be above 0"),
        (lambda: LogitsMSE(start=0.5, end=0.1), "comes before"),
        (lambda: LogitsMSE(start=1.5), "not a moment"),
        (lambda: DIST(beta=0.0, gamma=0.0), "not both 0"),
        (lambda: DIST(beta=-1.0), "not be negative"),
        (lambda: FeatureMatching([]), "names no layers"),
        (lambda: AttentionTransfer("conv"), "names no layers"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_of_losses_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_self_distillation_asks_for_a_quantization_before_its_end() -> None:
    with pytest.raises(ValueError, match="no Quantize among the phases"):
        DistillationWiring(Distill("self"), [Distill("self")])
    with pytest.raises(ValueError, match="Distill's end"):
        DistillationWiring(Distill("self", end=0.5), [Quantize(start=0.7)])
    DistillationWiring(Distill("self"), [Quantize(start=0.7)])
    DistillationWiring(Distill(Net()), [])


@pytest.mark.parametrize(
    ("student", "teacher", "losses", "x", "message"),
    [
        (Net(), nn.Linear(6, 3), [LogitsMSE()], images(), r"the student's \(8, 3\) with the teacher's \(8, 1, 6, 3\)"),
        (Net(), Net(), [FeatureMatching(["conv", "nope"])], images(), "Net has no layer 'nope'; it has: 'stem'"),
        (Net(), Net(), [FeatureMatching({"conv": "nope"})], images(), "Net has no layer 'nope'; it has: 'stem'"),
        (Net(), Net(), [FeatureMatching({"conv": "head"})], images(), "differ in more than channels"),
        (Net(), Net(6), [FeatureMatching(["conv"])], images(), "no optimizer to train the adapter"),
        (Heads(), Heads(), [LogitsMSE()], torch.ones(2, 6), "the loss names none; there is: 'label', 'value'"),
        (Heads(), Heads(), [LogitsMSE(output="labels")], torch.ones(2, 6), "no output 'labels'; there is: 'label'"),
        (nn.LSTM(6, 3), nn.LSTM(6, 3), [LogitsMSE(output=2)], torch.ones(2, 6), "no output 2"),
        (
            nn.Sequential(nn.LSTM(6, 3)),
            nn.Sequential(nn.LSTM(6, 3)),
            [FeatureMatching(["0"])],
            torch.ones(2, 6),
            "layer '0' returns 3 tensors",
        ),
        (nn.Linear(6, 3), nn.Bilinear(6, 6, 3), [LogitsMSE()], torch.ones(2, 6), "does not take what training_step"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    student: nn.Module, teacher: nn.Module, losses: list[DistillationLoss], x: Tensor, message: str
) -> None:
    with pytest.raises(CompressionError, match=message):
        step(Distillation(Distill(teacher, losses), student.train()), x)


def test_layers_that_are_called_unequally_often_are_refused() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.conv(self.relu(self.conv(self.stem(x)))))
            logits: Tensor = self.head(x.mean((2, 3)))
            return logits

    with pytest.raises(CompressionError, match=r"'relu', called 1 times, with the teacher's 'relu', called 2 times"):
        step(Distillation(Distill(Twice(), [FeatureMatching(["relu"])]), Net()), images())
    value = step(Distillation(Distill(Twice(), [FeatureMatching(["relu"])]), Twice()), images())["features"]
    assert torch.isfinite(value)


def test_shapes_without_classes_or_positions_are_refused() -> None:
    with pytest.raises(CompressionError, match="no dimension 1 of classes"):
        KLDivergence().compare(torch.zeros(4), torch.zeros(4))
    with pytest.raises(CompressionError, match="has no positions"):
        AttentionTransfer(["head"]).compare(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(CompressionError, match="no dimension 5 of channels"):
        FeatureMatching(["head"], channel_dim=5).compare(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(CompressionError, match="differ in more than channels"):
        FeatureMatching(["head"]).compare(torch.zeros(4, 5, 3), torch.zeros(4, 6, 3))
