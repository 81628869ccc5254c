"""What a student is compared with its teacher by: one abstract class, and the losses of the literature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from lightning_edge.distillation.shapes import channel_axis, same_places, same_shape
from lightning_edge.errors import CompressionError
from lightning_edge.schedule import Clock, Moment, check_moment, check_order


class DistillationLoss(ABC):
    """A distance between what the student and what the teacher computed from the same inputs.

    For one of your own, inherit, give it a ``name`` and a `compare`, and name it in YAML by its class path.

    Moments are epochs (whole numbers from 0) or fractions of training (0.0 to 1.0).

    Args:
        weight: What the loss is multiplied by before it is added to the task's; above 0.
        start: When it begins; ``None``: with the phase.
        end: When it ends; ``None``: with the phase.
        output: Which of the network's outputs it compares, by key or index (nested ones joined with a dot,
            ``"heads.0"``); ``None`` where there is only one.

    Attributes:
        name: What it is called in logs, ``edge/distill/<name>``.
        layers: Student layers and the teacher layers they are compared with, by name; empty for a loss on outputs.
        adapts: Whether a student feature goes through a trained 1x1 adapter where its width differs from the teacher's.
        channel_dim: Dimension of the channels of a feature; ``None``: dimension 1, and the last of a feature with
            three dimensions.

    Raises:
        ValueError: If the weight or a moment is out of range.
    """

    name: ClassVar[str]
    adapts: ClassVar[bool] = False
    layers: Any = None
    channel_dim: int | None = None

    def __init__(
        self,
        weight: float = 1.0,
        start: int | float | None = None,
        end: int | float | None = None,
        output: str | int | None = None,
    ) -> None:
        if not weight > 0:
            raise ValueError(f"weight={weight!r} must be above 0; leave a loss that should not count out")
        for key, moment in (("start", start), ("end", end)):
            if moment is not None:
                check_moment(key, moment)
        if start is not None and end is not None:
            check_order("start", start, "end", end)
        self.weight = weight
        self.start = start
        self.end = end
        self.output = output

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss, a scalar, without its weight.

        Args:
            student: An output or feature of the student, batch first.
            teacher: The teacher's, without gradient.
        """

    @property
    def pairs(self) -> dict[str, str]:
        """Student layers and the teacher layers they are compared with; empty for a loss on outputs."""
        if isinstance(self.layers, Mapping):
            return {str(student): str(teacher) for student, teacher in self.layers.items()}
        return {str(layer): str(layer) for layer in self.layers or ()}

    def counts(self, clock: Clock) -> bool:
        """Whether the loss's own window is open; the phase's is another question."""
        begun = self.start is None or clock.reached(self.start)
        return begun and (self.end is None or not clock.reached(self.end))

    def settings(self) -> dict[str, Any]:
        """Give class and settings as plain values."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **vars(self)}


class KLDivergence(DistillationLoss):
    """KL(teacher || student) of softened class probabilities, times the temperature squared.

    Averaged over the batch; over all positions where the logits have some (segmentation). Hinton et al. 2015,
    arXiv:1503.02531.

    Args:
        temperature: What logits are divided by; above 0.
        class_dim: Dimension of the classes.
        weight: See `DistillationLoss`.
        start: See `DistillationLoss`.
        end: See `DistillationLoss`.
        output: See `DistillationLoss`.

    Raises:
        ValueError: If the temperature, weight or a moment is out of range.
    """

    name = "kl"

    def __init__(
        self,
        temperature: float = 4.0,
        class_dim: int = 1,
        weight: float = 1.0,
        start: int | float | None = None,
        end: int | float | None = None,
        output: str | int | None = None,
    ) -> None:
        super().__init__(weight, start, end, output)
        self.temperature = check_positive("temperature", temperature)
        self.class_dim = class_dim

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare logits of shape (N, C), or with positions in further dimensions."""
        student, teacher = _by_sample(self, student, teacher, self.class_dim)
        predicted = F.log_softmax(student / self.temperature, dim=1)
        wanted = F.softmax(teacher / self.temperature, dim=1)
        return F.kl_div(predicted, wanted, reduction="batchmean") * self.temperature**2


class LogitsMSE(DistillationLoss):
    """Mean squared error between outputs: logits (Ba & Caruana 2014, arXiv:1312.6184) or values of a regression."""

    name = "mse"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare outputs of one shape, whatever it is."""
        same_shape(type(self).__name__, student, teacher)
        return F.mse_loss(student, teacher)


class DIST(DistillationLoss):
    """One minus Pearson's correlation of class probabilities, within samples and within classes over the batch.

    It asks the student for the teacher's relations and not for its values, which a much larger teacher's student cannot
    reach. Huang et al. 2022, arXiv:2205.10536, where beta and gamma are 2 for CIFAR-100 with a temperature of 4, and 1
    for ImageNet with 1.

    Args:
        beta: Weight of the relation between the classes of a sample (inter-class).
        gamma: Weight of the relation between the samples of a class (intra-class).
        temperature: What logits are divided by; above 0.
        class_dim: Dimension of the classes.
        weight: See `DistillationLoss`.
        start: See `DistillationLoss`.
        end: See `DistillationLoss`.
        output: See `DistillationLoss`.

    Raises:
        ValueError: If the temperature, a weight or a moment is out of range.
    """

    name = "dist"

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        class_dim: int = 1,
        weight: float = 1.0,
        start: int | float | None = None,
        end: int | float | None = None,
        output: str | int | None = None,
    ) -> None:
        super().__init__(weight, start, end, output)
        if beta < 0 or gamma < 0 or beta + gamma == 0:
            raise ValueError(f"beta={beta!r} and gamma={gamma!r} must not be negative, and not both 0")
        self.beta = beta
        self.gamma = gamma
        self.temperature = check_positive("temperature", temperature)
        self.class_dim = class_dim

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare logits of shape (N, C), or with positions in further dimensions."""
        student, teacher = _by_sample(self, student, teacher, self.class_dim)
        predicted = F.softmax(student / self.temperature, dim=1)
        wanted = F.softmax(teacher / self.temperature, dim=1)
        inter = 1 - _correlation(predicted, wanted, dim=1).mean()
        intra = 1 - _correlation(predicted, wanted, dim=0).mean()
        return (self.beta * inter + self.gamma * intra) * self.temperature**2


class FeatureMatching(DistillationLoss):
    """Mean squared error between features of layers, summed over the pairs (Romero et al. 2015, arXiv:1412.6550).

    Where the student's is narrower or wider, it goes through a linear map of its channels (a 1x1 convolution), trained
    with the first optimizer and thrown away. Where spatial sizes differ, the larger is averaged to the smaller.

    Args:
        layers: Student layers and the teacher layers they should match, by name; a list where the names are the same.
        channel_dim: Dimension of the channels; ``None``: 1, and the last of features with three dimensions (N, T, C).
        weight: See `DistillationLoss`.
        start: See `DistillationLoss`.
        end: See `DistillationLoss`.

    Raises:
        ValueError: If no layers are named, or the weight or a moment is out of range.
    """

    name = "features"
    adapts = True

    def __init__(
        self,
        layers: dict[str, str] | list[str],
        channel_dim: int | None = None,
        weight: float = 1.0,
        start: int | float | None = None,
        end: int | float | None = None,
    ) -> None:
        super().__init__(weight, start, end)
        self.layers = _checked_layers(layers)
        self.channel_dim = channel_dim

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare features with as many channels: (N, C), (N, T, C), or (N, C, ...) with positions behind."""
        student, teacher = same_places(type(self).__name__, student, teacher, self.channel_dim)
        same_shape(type(self).__name__, student, teacher)
        return F.mse_loss(student, teacher)


class AttentionTransfer(DistillationLoss):
    """Mean squared difference of attention maps, summed over the pairs of layers.

    The map of a feature is the mean over channels of its values' squares, divided by its norm, so that widths need not
    agree; where spatial sizes differ, the larger feature is averaged to the smaller. Zagoruyko & Komodakis 2017,
    arXiv:1612.03928; their weight is 1000.

    Args:
        layers: Student layers and the teacher layers they should match, by name; a list where the names are the same.
        channel_dim: Dimension of the channels; ``None``: 1, and the last of features with three dimensions (N, T, C).
        weight: See `DistillationLoss`.
        start: See `DistillationLoss`.
        end: See `DistillationLoss`.

    Raises:
        ValueError: If no layers are named, or the weight or a moment is out of range.
    """

    name = "attention"

    def __init__(
        self,
        layers: dict[str, str] | list[str],
        channel_dim: int | None = None,
        weight: float = 1000.0,
        start: int | float | None = None,
        end: int | float | None = None,
    ) -> None:
        super().__init__(weight, start, end)
        self.layers = _checked_layers(layers)
        self.channel_dim = channel_dim

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare features with positions: (N, T, C), or (N, C, ...) with positions behind."""
        if student.dim() < 3:
            raise CompressionError(
                f"AttentionTransfer compares where a layer looks, and its output of shape {tuple(student.shape)} has "
                "no positions; name layers with features of shape (N, C, H, W) or (N, T, C), or use FeatureMatching"
            )
        student, teacher = same_places(type(self).__name__, student, teacher, self.channel_dim)
        return F.mse_loss(self._map(student), self._map(teacher))

    def _map(self, feature: Tensor) -> Tensor:
        energy = feature.square().mean(channel_axis(feature, self.channel_dim)).flatten(1)
        return F.normalize(energy, dim=1)


def check_positive(name: str, value: float) -> float:
    """Return ``value`` if it is above 0.

    Raises:
        ValueError: If it is not.
    """
    if not value > 0:
        raise ValueError(f"{name}={value!r} must be above 0")
    return value


def loss_names(losses: Sequence[DistillationLoss]) -> list[str]:
    """Name each loss for logs and checkpoints: its own name, that of its output, and a number where both repeat."""
    names: list[str] = []
    for loss in losses:
        name = loss.name if loss.output is None else f"{loss.name}_{loss.output}"
        repeats = sum(other == name or other.startswith(f"{name}#") for other in names)
        names.append(f"{name}#{repeats + 1}" if repeats else name)
    return names


def check_within(loss: DistillationLoss, start: Moment, end: Moment | None) -> None:
    """Refuse a loss whose window reaches out of the phase's, as far as they can be compared.

    Raises:
        ValueError: If it does.
    """
    name = type(loss).__name__
    if loss.start is not None:
        check_order("Distill's start", start, f"{name}'s start", loss.start)
    if end is not None:
        for key, moment in (("start", loss.start), ("end", loss.end)):
            if moment is not None:
                check_order(f"{name}'s {key}", moment, "Distill's end", end)
    if loss.end is not None and loss.start is None:
        check_order("Distill's start", start, f"{name}'s end", loss.end)


def _checked_layers(layers: Any) -> Any:
    if not isinstance(layers, Mapping | list | tuple) or not layers:
        raise ValueError(
            f"layers={layers!r} names no layers; give a list of names, or a dict of student layers and the teacher "
            "layers they should match, as in model.named_modules()"
        )
    return layers


def _by_sample(loss: DistillationLoss, student: Tensor, teacher: Tensor, class_dim: int) -> tuple[Tensor, Tensor]:
    """Bring logits into the shape (samples and positions, classes)."""
    same_shape(type(loss).__name__, student, teacher)
    if not -student.dim() <= class_dim < student.dim() or student.dim() < 2:
        raise CompressionError(
            f"{type(loss).__name__} compares class probabilities, and an output of shape {tuple(student.shape)} has no "
            f"dimension {class_dim} of classes; set class_dim, or use LogitsMSE for a regression"
        )
    if student.dim() == 2:
        return student, teacher
    classes = student.shape[class_dim]
    return student.movedim(class_dim, -1).reshape(-1, classes), teacher.movedim(class_dim, -1).reshape(-1, classes)


def _correlation(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along one dimension; 0 where one of the two is constant."""
    return F.cosine_similarity(x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True), dim=dim)
