"""A student, its teacher, and the losses between them: what `Distill` does in a training step. Knows torch only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_edge.distillation.adapters import Adapters
from lightning_edge.distillation.losses import DistillationLoss, loss_names
from lightning_edge.distillation.outputs import select_output
from lightning_edge.distillation.phase import Distill, goes_through_all
from lightning_edge.distillation.shapes import channel_axis
from lightning_edge.distillation.teacher import build_teacher, frozen
from lightning_edge.distillation.watch import Recorder, Seen, Watch, hook_layer, layer_of
from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.schedule import Clock
from lightning_edge.succession import Succession
from lightning_edge.surgery import accepts


class Distillation:
    """Sees each training call of a student, asks the teacher the same, and gives the losses between the two.

    Neither teacher nor adapters are part of the student's module tree.

    Args:
        settings: The phase.
        network: The student.

    Raises:
        CompressionError: If the teacher cannot be built, or a layer that a loss names is not there.
    """

    def __init__(self, settings: Distill, network: nn.Module) -> None:
        self.settings = settings
        losses = settings.resolved_losses()
        self.losses: dict[str, DistillationLoss] = dict(zip(loss_names(losses), losses, strict=True))
        self.adapters = Adapters(network)
        self.teacher: nn.Module | None = None
        self._teacher_features = Recorder()
        self._student_layers = sorted({layer for loss in losses for layer in loss.pairs})
        self._teacher_layers = sorted({layer for loss in losses for layer in loss.pairs.values()})
        self._calls: list[tuple[Seen, Seen]] = []
        self._batch_size = 1
        self.called = False
        self._watch = Watch(network, self._student_layers, self._ask_teacher, self._remember)
        if not settings.from_self:
            self.set_teacher(build_teacher(settings.teacher))

    def set_teacher(self, teacher: nn.Module) -> None:
        """Freeze a teacher and learn from it; it becomes this object's.

        Raises:
            CompressionError: If it has not the layers that the losses name.
        """
        self.teacher = frozen(teacher, self._watch.network)
        for name in self._teacher_layers:
            hook_layer(self.teacher, name, self._teacher_features)

    def set_network(self, network: nn.Module, succession: Succession | None = None) -> None:
        """Follow a change of the student's structure.

        Args:
            network: The student as it is now.
            succession: What became of its parameters: adapters keep the channels that their layers kept.
        """
        self._calls.clear()
        if succession is not None:
            for name, loss in self.losses.items():
                for layer in loss.pairs if loss.adapts else ():
                    kept = _kept_channels(layer_of(network, layer), succession)
                    if kept is not None:
                        self.adapters.cut(_adapter_name(name, layer), kept)
        self._watch = Watch(network, self._student_layers, self._ask_teacher, self._remember)

    def remove(self) -> None:
        """Leave the student as it was; adapters stay, for a checkpoint to come."""
        self._calls.clear()
        self._watch.remove()

    def active(self, clock: Clock) -> dict[str, DistillationLoss]:
        """Give the losses that count now, by name; none as long as there is no teacher."""
        if self.teacher is None or not self.settings.open(clock):
            return {}
        everything = goes_through_all(clock)
        return {name: loss for name, loss in self.losses.items() if everything or loss.counts(clock)}

    def trained(self, clock: Clock) -> Iterator[nn.Parameter]:
        """Give the adapters' parameters that the losses of now have gradients for."""
        return self.adapters.parameters([_adapter_name(name, "") for name in self.active(clock)])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the student's training calls, those with gradients, while the context lasts."""
        self._calls.clear()
        self.called = False
        try:
            with self._watch.watching():
                yield
        finally:
            self._calls.clear()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """See nothing while the context lasts."""
        with self._watch.suspended():
            yield

    @property
    def pending(self) -> bool:
        """Whether the student was called since the losses were last computed."""
        return bool(self._calls)

    @property
    def batch_size(self) -> int:
        """Samples in the last call."""
        return self._batch_size

    def compute(self, clock: Clock) -> dict[str, Tensor]:
        """Compute each loss that counts now, without its weight, summed over the calls since it was last asked.

        Raises:
            CompressionError: If outputs or features of student and teacher cannot be compared.
        """
        calls, self._calls = self._calls, []
        computed: dict[str, Tensor] = {}
        for student, teacher in calls:
            for name, loss in self.active(clock).items():
                value = self._between(name, loss, student, teacher)
                computed[name] = computed[name] + value if name in computed else value
        return computed

    def total(self, task_loss: Tensor, computed: dict[str, Tensor]) -> Tensor:
        """Add the weighted losses to the task's."""
        weight = self.settings.task_weight
        total = task_loss if weight == 1 else task_loss * weight
        for name, value in computed.items():
            total = total + self.losses[name].weight * value
        return total

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps: the adapters' weights, as plain tensors."""
        return {"adapters": self.adapters.state()}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from a checkpoint; before `Adapters.join`, so that the optimizer's state finds its parameters."""
        self.adapters.load((state or {}).get("adapters", {}))

    def _ask_teacher(self, inputs: Inputs) -> Seen:
        assert self.teacher is not None
        if not accepts(self.teacher, inputs):
            given = [*(type(value).__name__ for value in inputs.args), *inputs.kwargs]
            raise CompressionError(
                f"the teacher {type(self.teacher).__name__} does not take what training_step gives "
                f"{type(self._watch.network).__name__} ({', '.join(given)}); give a teacher with the same forward()"
            )
        self._teacher_features.open()
        try:
            with torch.no_grad():
                output = self.teacher(*inputs.args, **inputs.kwargs)
        finally:
            features = self._teacher_features.close()
        carries_batch = any(tensor.dim() for tensor in inputs.tensors)
        self._batch_size = inputs.batch_size if carries_batch else 1
        return Seen(output, features or {})

    def _remember(self, student: Seen, teacher: Seen) -> None:
        self.called = True
        self._calls.append((student, teacher))

    def _between(self, name: str, loss: DistillationLoss, student: Seen, teacher: Seen) -> Tensor:
        if not loss.pairs:
            ours = select_output(student.output, loss.output, f"the student {type(self._watch.network).__name__}")
            theirs = select_output(teacher.output, loss.output, f"the teacher {type(self.teacher).__name__}", lone=True)
            return loss.compare(ours, theirs)
        values = []
        for layer, teacher_layer in loss.pairs.items():
            ours_all, theirs_all = student.features.get(layer, []), teacher.features.get(teacher_layer, [])
            if not ours_all or len(ours_all) != len(theirs_all):
                raise CompressionError(
                    f"{type(loss).__name__} compares the student's layer {layer!r}, called {len(ours_all)} times, with "
                    f"the teacher's {teacher_layer!r}, called {len(theirs_all)} times in one call of the network; name "
                    "layers that are called, and equally often"
                )
            for ours, theirs in zip(ours_all, theirs_all, strict=True):
                values.append(loss.compare(self._adapted(name, loss, layer, ours, theirs), theirs))
        return torch.stack(values).sum() if len(values) > 1 else values[0]

    def _adapted(self, name: str, loss: DistillationLoss, layer: str, ours: Tensor, theirs: Tensor) -> Tensor:
        if not loss.adapts or ours.dim() != theirs.dim():
            return ours  # features with other dimensions are for the loss to refuse
        axis = channel_axis(ours, loss.channel_dim)
        return self.adapters.adapt(_adapter_name(name, layer), ours, axis, theirs.shape[axis])


def _adapter_name(loss: str, layer: str) -> str:
    return f"{loss}/{layer}"


def _kept_channels(layer: nn.Module, succession: Succession) -> Tensor | None:
    """Which of its output channels a layer kept, as far as its last part with a weight tells."""
    parts = [part for part in layer.modules() if isinstance(getattr(part, "weight", None), nn.Parameter)]
    if not parts or parts[-1].weight not in succession.cut:
        return None
    transposed = isinstance(parts[-1], nn.modules.conv._ConvTransposeNd)
    return dict(succession.cut[parts[-1].weight]).get(1 if transposed else 0)  # type: ignore[index]
