"""The training batch at hand, as phases look at it: what the network is fed, and the gradients of the loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_edge.callbacks import processes
from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.surgery import candidates, capture_inputs, in_mode


class _Lost(BaseException):
    """Carries the loss out of a training_step that calls manual_backward; not an Exception, see `surgery`."""

    def __init__(self, loss: Tensor) -> None:
        super().__init__()
        self.loss = loss


class SkippedBatchError(Exception):
    """``training_step`` skips this batch: it returns ``None`` and does not call the network."""


class BatchAtHand:
    """One batch of a training, before its step: a `Batch` for phases.

    Args:
        trainer: Whose fit this is.
        pl_module: Its module.
        network: The network inside it.
        batch: What ``training_step`` is about to be given.
        batch_idx: Its number.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, network: nn.Module, batch: Any, batch_idx: int
    ) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.network = network
        self.batch = batch
        self.batch_idx = batch_idx
        self._inputs: Inputs | None = None

    def inputs(self) -> Inputs:
        """Give what ``training_step`` feeds the network, by running it up to that call, once.

        Raises:
            CompressionError: If it does not call the network as a whole.
            SkippedBatchError: If it skips this batch.
        """
        if self._inputs is None:
            self._inputs = self._captured()
        return self._inputs

    def _captured(self) -> Inputs:
        step, outputs = self._step(self.batch), []
        with isolate_rng(), _silent(self.pl_module), _training_nothing(self.trainer, self.pl_module, _nothing):
            inputs = capture_inputs(self.network, lambda: outputs.append(step()))
        # With manual optimization, and on several processes, None says nothing of skipping.
        may_skip = self.pl_module.automatic_optimization and self.trainer.world_size == 1
        if inputs is None and outputs == [None] and may_skip:
            raise SkippedBatchError
        if inputs is None:
            names = ", ".join(repr(name) for name in candidates(self.pl_module))
            raise CompressionError(
                f"training_step does not call {type(self.network).__name__} as a whole, so there is nothing to "
                "compress. Name the submodule that it calls with EdgeCompressionCallback(module=...); candidates: "
                f"{names}."
            )
        return inputs

    def gradients(self, *, per_sample: bool = False) -> Iterator[dict[str, Tensor]]:
        """Give the gradient of the training loss for each parameter of the network that has one, by name.

        The whole module runs in eval mode; accumulated gradients, buffers, random state and logs stay as they are. What
        ``training_step`` counts in plain Python objects, it counts once more.

        Args:
            per_sample: One dict for each sample of this process's batch, instead of one for the whole batch, averaged
                over all processes.

        Raises:
            CompressionError: If ``training_step`` gives no loss.
        """
        processes.synchronize_buffers(self.trainer)
        batches = _samples(self.batch, self.inputs().batch_size) if per_sample else [self.batch]
        for batch in batches:
            gradients = self._gradients(batch)
            if not per_sample:
                reduce: Any = self.trainer.strategy.reduce
                gradients = {name: reduce(value, reduce_op="mean") for name, value in gradients.items()}
            yield gradients

    def _gradients(self, batch: Any) -> dict[str, Tensor]:
        named = dict(self.network.named_parameters())
        with isolate_rng(), _silent(self.pl_module), in_mode(self.pl_module, training=False), torch.enable_grad():
            with self.trainer.precision_plugin.train_step_context():
                loss = self._loss(batch)
            # As training_step left them: with several optimizers it may toggle which parameters require gradients.
            trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return {name: value for name, value in zip(trained, found, strict=True) if value is not None}

    def _loss(self, batch: Any) -> Tensor:
        """The loss that trains the network: what is returned, or given to the first backward that reaches it."""

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
            if not (loss.requires_grad and trained):
                return
            found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
            if any(gradient is not None for gradient in found):
                raise _Lost(loss)

        with _training_nothing(self.trainer, self.pl_module, backward):
            try:
                output = self._step(batch)()
            except _Lost as lost:
                return lost.loss
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise CompressionError(
                f"training_step gave no loss for batch {self.batch_idx} ({type(output).__name__}), and this criterion "
                "asks for the loss's gradients. Return the loss, or choose a criterion of weights alone, such as 'l2'."
            )
        return loss

    def _step(self, batch: Any) -> Callable[[], Any]:
        users_step = self.pl_module.training_step
        if "dataloader_iter" in inspect.signature(users_step).parameters:
            raise CompressionError(
                f"{type(self.pl_module).__name__}.training_step takes dataloader_iter, so that no batch is known "
                "before it runs. Give it the arguments batch and batch_idx."
            )
        takes_index = is_param_in_hook_signature(users_step, "batch_idx", min_args=2)
        arguments = (batch, self.batch_idx) if takes_index else (batch,)
        return lambda: self.pl_module.training_step(*arguments)


def _samples(batch: Any, size: int) -> Iterator[Any]:
    """Cut a batch into samples: every tensor of the batch's size along its first dimension."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not any(tensor.dim() and tensor.shape[0] == size for tensor in tensors):
        raise CompressionError(
            f"this criterion asks for the gradient of each sample, and no tensor of the batch holds the {size} samples "
            "that the network is called with. Choose a criterion of the whole batch ('taylor') or of weights ('l2')."
        )

    def cut(tensor: Tensor, index: int) -> Tensor:
        return tensor[index : index + 1] if tensor.dim() and tensor.shape[0] == size else tensor

    for index in range(size):
        yield pytree.tree_map_only(Tensor, functools.partial(cut, index=index), batch)


@contextmanager
def _training_nothing(trainer: Trainer, pl_module: LightningModule, backward: Callable[..., None]) -> Iterator[None]:
    """Let manual optimization train nothing: optimizers stand still, and ``backward`` is in manual_backward's place."""
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [(pl_module, "manual_backward", backward)]
    for optimizer in (*trainer.strategy._lightning_optimizers, *trainer.optimizers):
        replaced += [(optimizer, "step", _nothing), (optimizer, "zero_grad", _nothing)]
    before = [(holder, name, holder.__dict__.get(name)) for holder, name, _ in replaced]
    for holder, name, function in replaced:
        holder.__dict__[name] = function
    try:
        yield
    finally:
        for holder, name, own in before:
            if own is None:
                del holder.__dict__[name]
            else:
                holder.__dict__[name] = own


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of what would train."""


@contextmanager
def _silent(pl_module: LightningModule) -> Iterator[None]:
    """Log nothing, and put back buffers (one may count) and which parameters require gradients (one may toggle)."""
    buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
    flags = [(parameter, parameter.requires_grad) for parameter in pl_module.parameters()]
    before: dict[str, Any] = {
        name: pl_module.__dict__[name] for name in ("log", "log_dict") if name in pl_module.__dict__
    }
    pl_module.log = pl_module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del pl_module.__dict__["log"], pl_module.__dict__["log_dict"]
        pl_module.__dict__.update(before)
        for buffer, value in buffers:
            buffer.copy_(value)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
