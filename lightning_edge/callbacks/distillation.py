"""Distillation in a Trainer: around the user's training_step and manual_backward, which stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_edge.distillation.phase import Distill
from lightning_edge.distillation.runtime import Distillation
from lightning_edge.errors import CompressionError
from lightning_edge.schedule import Clock, Phase
from lightning_edge.succession import Succession


class DistillationWiring:
    """Adds the distillation losses to what a LightningModule trains with, and logs them apart from its own.

    With automatic optimization they are added to the loss that ``training_step`` returns, before Lightning scales it
    for accumulation or mixed precision. With manual optimization they are added to the loss given to the first
    ``manual_backward`` after the student's call; a later one gets those of the calls made since, if there are any.

    Args:
        settings: The phase.
        phases: All phases of the training.

    Raises:
        ValueError: If the teacher is the network itself before quantization, and nothing quantizes.
    """

    def __init__(self, settings: Distill, phases: Sequence[Phase]) -> None:
        settings.check_beside(phases)
        self.settings = settings
        self._distillation: Distillation | None = None
        self._trainer: Trainer | None = None
        self._clock: Clock | None = None
        self._inside = False
        self._seen = False
        self._warned = False

    def attach(
        self, trainer: Trainer, pl_module: LightningModule, network: nn.Module, saved_state: dict[str, Any] | None
    ) -> None:
        """Begin a fit: build the teacher, and be around ``training_step``; call it in ``on_fit_start``.

        Args:
            trainer: Whose optimizers exist, their state not restored yet.
            pl_module: The user's module.
            network: The student inside it, with the structure it goes on with.
            saved_state: What `state` gave in the checkpoint that is resumed.

        Raises:
            CompressionError: If the teacher cannot be built, or a layer is not there.
        """
        self.detach(pl_module)
        with isolate_rng():
            distillation = Distillation(self.settings, network)
        distillation.load_state(saved_state)
        distillation.adapters.join(trainer.optimizers[0] if trainer.optimizers else None)
        self._distillation, self._trainer, self._clock = distillation, trainer, None
        self._seen = self._warned = False
        _replace(pl_module, "training_step", self._around_training_step(pl_module))
        if not pl_module.automatic_optimization:
            _replace(pl_module, "manual_backward", self._around_manual_backward(pl_module))

    def detach(self, pl_module: LightningModule) -> None:
        """Leave the LightningModule as it was, also after a training that ended in an error."""
        for name in ("training_step", "manual_backward"):
            _put_back(pl_module, name)
        if self._distillation is not None:
            self._distillation.remove()
        self._inside, self._clock = False, None

    def set_baseline(self, network: nn.Module) -> None:
        """Take the float network that quantization began with, the teacher of a self-distillation.

        Args:
            network: A copy, which becomes this object's.
        """
        if self.settings.from_self and self._distillation is not None:
            self._distillation.set_teacher(network)

    def network_changed(self, network: nn.Module, succession: Succession) -> None:
        """Follow a change of the student's structure."""
        if self._distillation is not None:
            self._distillation.set_network(network, succession)

    def begin_step(self, clock: Clock) -> None:
        """Say where training stands; call it in ``on_train_batch_start``, when every phase has done its part."""
        self._clock = clock

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Average the adapters' gradients over all processes: DistributedDataParallel does not know them."""
        if self._trainer is None or self._distillation is None or self._clock is None or self._trainer.world_size == 1:
            return
        if self._distillation.adapters.trained_by(optimizer):
            for parameter in self._distillation.trained(self._clock):
                # A process without a gradient takes part, as the others would wait for it.
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._trainer.strategy.reduce(gradient, reduce_op="mean")

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps, plain values and tensors only."""
        return {"adapters": {}} if self._distillation is None else self._distillation.state()

    def _active(self) -> bool:
        return (
            self._distillation is not None and self._clock is not None and bool(self._distillation.active(self._clock))
        )

    def _around_training_step(self, pl_module: LightningModule) -> Any:
        users_step = pl_module.training_step

        @functools.wraps(users_step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            distillation, clock = self._distillation, self._clock
            # In eval mode, phases look at gradients of the task's loss.
            if distillation is None or clock is None or not self._active() or not pl_module.training:
                return users_step(*args, **kwargs)
            if self._inside:  # a phase looks at the batch from within a step of manual optimization
                with distillation.suspended():
                    return users_step(*args, **kwargs)
            self._inside = True
            try:
                with distillation.watching():
                    output = users_step(*args, **kwargs)
                    self._check_called(pl_module, output)
                    if pl_module.automatic_optimization:
                        return self._added(pl_module, output)
                    if distillation.pending:
                        self._warn_of_no_backward(pl_module)
                    return output
            finally:
                self._inside = False

        return training_step

    def _around_manual_backward(self, pl_module: LightningModule) -> Any:
        users_backward = pl_module.manual_backward

        @functools.wraps(users_backward)
        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            users_backward(self._with_distillation(pl_module, loss), *args, **kwargs)

        return manual_backward

    def _added(self, pl_module: LightningModule, output: Any) -> Any:
        """What training_step returned, with the losses added: a tensor, or a mapping with ``loss``; ``None`` skips."""
        if isinstance(output, Tensor):
            return self._with_distillation(pl_module, output)
        if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": self._with_distillation(pl_module, output["loss"])}
        return output  # what else is wrong with it, Lightning says

    def _with_distillation(self, pl_module: LightningModule, loss: Tensor) -> Tensor:
        distillation, clock = self._distillation, self._clock
        if distillation is None or clock is None or not distillation.pending:
            return loss
        computed = distillation.compute(clock)
        for name, value in (("task_loss", loss), *((f"distill/{name}", value) for name, value in computed.items())):
            pl_module.log(f"edge/{name}", value.detach(), on_step=True, batch_size=distillation.batch_size)
        return distillation.total(loss, computed)

    def _check_called(self, pl_module: LightningModule, output: Any) -> None:
        assert self._distillation is not None
        if self._distillation.called or self._seen or (output is None and pl_module.automatic_optimization):
            self._seen = self._seen or self._distillation.called
            return
        raise CompressionError(
            f"training_step of {type(pl_module).__name__} does not call the network as a whole in training mode and "
            "with gradients, so there is nothing to compare with the teacher. Name the submodule that it calls with "
            "EdgeCompressionCallback(module=...), and leave it in training mode (freeze BatchNorm layers one by one)."
        )

    def _warn_of_no_backward(self, pl_module: LightningModule) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"training_step of {type(pl_module).__name__} called the network and not manual_backward after it, so "
                "that no distillation loss was added. Call self.manual_backward(loss) instead of loss.backward()."
            )


def _replace(pl_module: LightningModule, name: str, function: Any) -> None:
    function.original = pl_module.__dict__.get(name)
    function.by_distillation = True
    setattr(pl_module, name, function)


def _put_back(pl_module: LightningModule, name: str) -> None:
    ours: Any = pl_module.__dict__.get(name)
    if not getattr(ours, "by_distillation", False):
        return
    if ours.original is None:
        del pl_module.__dict__[name]
    else:  # the user's own function, set on the instance
        setattr(pl_module, name, ours.original)
