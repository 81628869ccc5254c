"""EdgeCompressionCallback: asks each phase at every batch, and keeps the record in checkpoints."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_edge import record
from lightning_edge.errors import CompressionError, RecordError
from lightning_edge.network import Inputs
from lightning_edge.quantization import float_copy, is_quantized, quantized_forward
from lightning_edge.schedule import Change, Clock, Phase
from lightning_edge.surgery import candidates, capture_inputs, find_network


class EdgeCompressionCallback(Callback):
    """Compress the network while it trains: each phase does its part when its time comes.

    The LightningModule, its optimizers and schedulers go on unchanged across every phase. Checkpoints carry what was
    done, so that resuming, ``validate`` and ``test`` with ``ckpt_path`` rebuild it before weights load, whether the
    checkpoint is from before, during or after a phase.

    Args:
        phases: What to do, in the order in which it happens.
        module: Name of the submodule to compress, ``""`` for the LightningModule itself. ``None`` finds it: the only
            child with layers, or the LightningModule itself if it has a ``forward``.

    Raises:
        ValueError: If there is no phase, or two of the same kind.
    """

    def __init__(self, phases: list[Phase], module: str | None = None) -> None:
        if not phases:
            raise ValueError("phases is empty; give at least one, for example [Quantize(start=0.7)]")
        names = [phase.name for phase in phases]
        if len(set(names)) < len(names):
            raise ValueError(f"phases={names} names a kind twice; give each kind of phase once")
        self.phases = phases
        self.module = module
        self._changes: list[Change] = []
        self._float_state: dict[str, torch.Tensor] | None = None
        self._calls_before: int | None = None
        self._found: nn.Module | None = None

    def baseline(self, pl_module: LightningModule) -> nn.Module:
        """Copy the network with the float weights it had when quantization began; today's, if it did not begin."""
        network = float_copy(self._network(pl_module))
        if self._float_state is not None:
            network.load_state_dict(self._float_state)
        return network.eval()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the network, and be ready to rebuild it before a checkpoint's weights load."""
        others = [c for c in trainer.callbacks if isinstance(c, EdgeCompressionCallback)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise CompressionError(f"the Trainer has {len(others)} EdgeCompressionCallbacks; put all phases into one")
        if trainer.world_size > 1:
            raise CompressionError(
                f"the Trainer runs {trainer.world_size} processes, and compression is not synchronized between "
                "processes yet; train with devices=1, num_nodes=1"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            _refuse_averaging(callback, pl_module)
        self._hook_checkpoints(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the LightningModule's own hooks as they were."""
        _unhook_checkpoints(pl_module)
        self._found = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the network, and refuse a schedule that cannot begin."""
        self._found = self._network(pl_module)
        if not is_quantized(self._found):
            self._changes, self._float_state = [], None
        elif not self._changes:
            raise CompressionError(
                f"{type(self._found).__name__} was quantized before, and not by this callback, which has no record of "
                "it. Give the callback that quantized it, resume with ckpt_path=..., or begin anew from the float "
                "network: lightning_edge.quantization.detach(network)."
            )
        for phase in self.phases:
            if isinstance(phase.first_moment(), float) and _length_is_unknown(trainer):
                raise CompressionError(
                    f"{type(phase).__name__} begins at {phase.first_moment()!r} of a training whose length is not "
                    f"known (max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}). Give the Trainer one of "
                    "them, or the phase an epoch as a whole number."
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let every phase do what is due."""
        network, clock = self._found, _clock(trainer, batch_idx)
        assert network is not None

        def sample() -> Inputs:
            # Asked for once, right before the network changes: the last sight of the float network.
            self._float_state = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
            return _network_inputs(pl_module, network, batch, batch_idx)

        for phase in self.phases:
            while True:
                done = [change for change in self._changes if change["phase"] == phase.name]
                change = phase.apply(network, clock, done, sample)
                if change is None:
                    break
                if not done:
                    self._calls_before = quantized_forward(network)[1].calls
                self._changes.append({"phase": phase.name, **change})
                self._tell(trainer, phase, change)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a training that goes around the quantized network."""
        if self._calls_before is None:
            return
        assert self._found is not None
        network, child = quantized_forward(self._found)
        if child.calls == self._calls_before:
            names = ", ".join(repr(name) for name in candidates(pl_module))
            raise CompressionError(
                f"training_step does not call {type(network).__name__} as a whole, so nothing is trained quantized. "
                f"Name the submodule that it calls with EdgeCompressionCallback(module=...); candidates: {names}."
            )
        self._calls_before = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of a phase that never began."""
        for phase in self.phases:
            if not any(change["phase"] == phase.name for change in self._changes):
                rank_zero_warn(
                    f"{type(phase).__name__} never began: training ended in epoch {trainer.current_epoch} after "
                    f"{trainer.global_step} steps, and it begins at {phase.first_moment()!r}."
                )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the record into checkpoints that are saved after training, when our hooks are gone."""
        self._save(checkpoint)

    def _save(self, checkpoint: dict[str, Any]) -> None:
        # With the float network that the report compares with.
        checkpoint[record.KEY] = record.to_checkpoint(self._changes, self._float_state)

    def _network(self, pl_module: LightningModule) -> nn.Module:
        return find_network(pl_module, self.module)

    def _hook_checkpoints(self, pl_module: LightningModule) -> None:
        """Read and write the record in the LightningModule's own hooks.

        A callback's load hook comes after the weights, and its save hook not at all for checkpoints of weights only.
        """
        _unhook_checkpoints(pl_module)
        load, save = pl_module.on_load_checkpoint, pl_module.on_save_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            saved = checkpoint.get(record.KEY) or {"changes": [], "float_state": None}
            unknown = {change["phase"] for change in saved["changes"]} - {phase.name for phase in self.phases}
            if unknown:
                raise RecordError(
                    f"the checkpoint was written by a training with {sorted(unknown)}, and this one has only "
                    f"{[phase.name for phase in self.phases]}; give the callback the same phases."
                )
            record.restore(self._network(pl_module), saved["changes"])
            self._changes, self._float_state = list(saved["changes"]), saved["float_state"]
            load(checkpoint)

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._save(checkpoint)
            save(checkpoint)

        for hook, original in ((on_load_checkpoint, load), (on_save_checkpoint, save)):
            hook.original = original  # type: ignore[attr-defined]
            setattr(pl_module, hook.__name__, hook)

    def _tell(self, trainer: Trainer, phase: Phase, change: Change) -> None:
        when = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        rank_zero_info(f"{type(phase).__name__}, {when}: {phase.describe(change)}")
        for logger in trainer.loggers:
            logger.log_metrics({f"edge/{phase.name}/{change['kind']}": 1.0}, step=trainer.global_step)


def _unhook_checkpoints(pl_module: LightningModule) -> None:
    """Take our hooks away, also those that a training which ended in an error left behind."""
    for name in ("on_load_checkpoint", "on_save_checkpoint"):
        original = getattr(pl_module.__dict__.get(name), "original", None)
        if original is None:
            continue
        if getattr(original, "__func__", None) is getattr(type(pl_module), name):
            del pl_module.__dict__[name]
        else:  # the user's own hook, set on the instance
            setattr(pl_module, name, original)


def _refuse_averaging(callback: Callback, pl_module: LightningModule) -> None:
    """Refuse to train beside a callback whose copy of the network stays float."""
    name = type(callback).__name__
    if isinstance(callback, WeightAveraging):
        raise CompressionError(
            f"{name} keeps a float copy of the LightningModule, made before quantization, and writes checkpoints of it "
            "without ranges. Train with it in float first, then with EdgeCompressionCallback in a fit of its own."
        )
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in pl_module.modules())
    if isinstance(callback, StochasticWeightAveraging) and norms:
        raise CompressionError(
            f"{name} learns BatchNorm's statistics anew at the end of training, when they are part of the int8 "
            "weights. Train with it in float first, then with EdgeCompressionCallback in a fit of its own."
        )


def _length_is_unknown(trainer: Trainer) -> bool:
    return trainer.max_epochs in (None, -1) and trainer.max_steps == -1


def _clock(trainer: Trainer, batch_idx: int) -> Clock:
    """Say how far training has come: by epochs or by steps, whichever limit is nearer."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return Clock(sys.maxsize, 1.0)  # every phase at once: such a run is there to go through all of it
    shares = []
    if trainer.max_epochs not in (None, -1):
        assert trainer.max_epochs is not None
        in_epoch = batch_idx / trainer.num_training_batches
        shares.append((trainer.current_epoch + in_epoch) / trainer.max_epochs)
    if trainer.max_steps != -1:
        shares.append(trainer.global_step / trainer.max_steps)
    return Clock(trainer.current_epoch, min(1.0, max(shares)) if shares else None)


def _network_inputs(pl_module: LightningModule, network: nn.Module, batch: Any, batch_idx: int) -> Inputs:
    """Say what training_step feeds the network for this batch, leaving no trace of having asked."""
    wanted = inspect.signature(pl_module.training_step).parameters
    if "dataloader_iter" in wanted:
        raise CompressionError(
            f"{type(pl_module).__name__}.training_step takes dataloader_iter, so that no batch is known before it "
            "runs. Give it the arguments batch and batch_idx."
        )
    arguments = (batch, batch_idx) if len(wanted) > 1 else (batch,)
    with isolate_rng(), _silent(pl_module):
        inputs = capture_inputs(network, lambda: pl_module.training_step(*arguments))
    if inputs is None:
        names = ", ".join(repr(name) for name in candidates(pl_module))
        raise CompressionError(
            f"training_step does not call {type(network).__name__} as a whole, so there is nothing to quantize. Name "
            f"the submodule that it calls with EdgeCompressionCallback(module=...); candidates: {names}."
        )
    return inputs


@contextmanager
def _silent(pl_module: LightningModule) -> Iterator[None]:
    """Log nothing, and put back which parameters require gradients (manual optimization toggles them)."""
    flags = [(parameter, parameter.requires_grad) for parameter in pl_module.parameters()]
    pl_module.log = pl_module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del pl_module.__dict__["log"], pl_module.__dict__["log_dict"]
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


__all__ = ["EdgeCompressionCallback"]
