"""EdgeCompressionCallback: asks each phase at every batch, and keeps the record in checkpoints."""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_edge import record
from lightning_edge.callbacks import checkpoints, processes
from lightning_edge.callbacks.batch import BatchAtHand, SkippedBatchError
from lightning_edge.callbacks.distillation import DistillationWiring
from lightning_edge.callbacks.logged_settings import log_settings
from lightning_edge.distillation.phase import Distill
from lightning_edge.errors import CompressionError
from lightning_edge.quantization import float_copy, is_quantized, quantized_forward
from lightning_edge.quiet import quiet_libraries
from lightning_edge.schedule import ORDER, Change, Clock, Phase, check_phases, comes, ranked
from lightning_edge.sparsity import Sparsify
from lightning_edge.succession import check_optimizer, follow_all
from lightning_edge.surgery import candidates, find_network


class EdgeCompressionCallback(Callback):
    """Compress the network while it trains: each phase does its part when its time comes.

    The LightningModule, its optimizers and schedulers go on across every phase. Checkpoints carry what was done, so
    that resuming, ``validate`` and ``test`` with ``ckpt_path`` rebuild it before weights load, whether the checkpoint
    is from before, during or after a phase.

    Args:
        phases: What to do. Phases that change the network follow each other: factorize, prune, sparsify, quantize.
        module: Name of the submodule to compress, ``""`` for the LightningModule itself. ``None`` finds it: the only
            child with layers, or the LightningModule itself if it has a ``forward``.

    Raises:
        ValueError: If there is no phase, two are of the same kind, or one begins before an earlier one has ended.
    """

    def __init__(self, phases: list[Phase], module: str | None = None) -> None:
        check_phases(phases)
        self.phases = phases
        self.module = module
        distill = next((phase for phase in phases if isinstance(phase, Distill)), None)
        self._distillation = None if distill is None else DistillationWiring(distill, phases)
        self._float_state: dict[str, torch.Tensor] | None = None
        self._calls_before: int | None = None
        self._found: nn.Module | None = None
        self._batch: BatchAtHand | None = None
        self._stepped = False
        self._trained = False
        self._handles: list[Any] = []
        self._never: list[Phase] = []
        # Changes that were made in an earlier fit, by another callback: they are in the record, and not of our phases.
        self._inherited: list[Change] = []
        self._earlier_masks: list[Change] = []
        self._keeper = Sparsify(sparsity=0.5)  # holds masks that are there; its own sparsity is not asked for
        self._ours: weakref.ref[nn.Module] | None = None
        self._distillation_state: dict[str, Any] | None = None

    def baseline(self, pl_module: LightningModule) -> nn.Module:
        """Copy the network with the float weights it had when quantization began; today's, if it did not begin."""
        network = float_copy(self._network(pl_module))
        if self._float_state is not None:
            network.load_state_dict(self._float_state)
        return network.eval()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the network, and be ready to rebuild it before a checkpoint's weights load."""
        quiet_libraries()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [callback for callback in callbacks if isinstance(callback, EdgeCompressionCallback)]
        if len(others) > 1:
            raise CompressionError(f"the Trainer has {len(others)} EdgeCompressionCallbacks; put all phases into one")
        processes.check_strategy(trainer)
        processes.check_company(callbacks, pl_module, self.phases)

        def load(checkpoint: dict[str, Any]) -> None:
            self._load(trainer, pl_module, checkpoint)

        checkpoints.hook(pl_module, load, lambda checkpoint: self._save(pl_module, checkpoint))
        if stage == "fit":
            log_settings(trainer, pl_module, self)

    def logged_settings(self) -> dict[str, Any]:
        """Give the settings of every phase, for loggers."""
        return {"phases": record.settings_of(self.phases)}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the LightningModule and its optimizers as they were, but for the network."""
        checkpoints.unhook(pl_module)
        if self._distillation is not None:
            self._distillation.detach(pl_module)
        for handle in self._handles:
            handle.remove()
        self._handles, self._found, self._batch, self._calls_before = [], None, None, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave everything as it was after an error too: Lightning does not call ``teardown`` then."""
        self.teardown(trainer, pl_module, "fit")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the network, and refuse a schedule that cannot begin."""
        network = self._found = self._network(pl_module)
        self._trained = False
        if not is_quantized(network):
            self._float_state = None
        if self._ours is None or self._ours() is not network:
            self._inherited = record.changes_of(network)
            if is_quantized(network):
                raise CompressionError(
                    f"{type(network).__name__} was quantized before, and not by this callback, which has no record of "
                    "it. Give the callback that quantized it, resume with ckpt_path=..., or begin anew from the float "
                    "network: lightning_edge.quantization.detach(network)."
                )
        self._ours = weakref.ref(network)
        self._hold_earlier_zeros()
        self._check_schedule(trainer)
        if any(phase.cuts_parameters for phase in self.phases):
            for optimizer in trainer.optimizers:
                check_optimizer(optimizer)
        self._handles = [
            optimizer.register_step_post_hook(lambda *_: self._after_step()) for optimizer in trainer.optimizers
        ]
        if self._distillation is not None:
            saved, self._distillation_state = self._distillation_state, None
            self._distillation.attach(trainer, pl_module, network, saved)
            if is_quantized(network):
                self._distillation.set_baseline(self.baseline(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let every phase do what is due."""
        assert self._found is not None
        clock = _clock(trainer, batch_idx)
        self._batch, self._stepped = BatchAtHand(trainer, pl_module, self._found, batch, batch_idx), False
        for phase in (*ranked(self.phases), *(phase for phase in self.phases if phase.name not in ORDER)):
            if self._waits(phase):
                continue
            with contextlib.suppress(SkippedBatchError):  # what is due is done with the next batch
                while (change := phase.plan(self._found, clock, self._done(phase), self._batch)) is not None:
                    self._perform(trainer, pl_module, phase, change)
        if self._distillation is not None:
            self._distillation.begin_step(clock)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let phases add to the gradients, once per batch, before the optimizer that trains the network."""
        assert self._found is not None
        assert self._batch is not None
        if self._distillation is not None:
            self._distillation.before_optimizer_step(optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self._stepped or not any(id(parameter) in held for parameter in self._found.parameters()):
            return
        self._stepped = True
        clock = _clock(trainer, self._batch.batch_idx)
        for phase in self.phases:
            phase.before_step(self._found, clock, self._done(phase), self._batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a training that goes around the quantized network."""
        self._batch = None
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
        """Tell of a phase that never began, or that did not come to its end."""
        self._trained = True
        for phase in self.phases:
            done = self._done(phase)
            name, begin = type(phase).__name__, phase.first_moment()
            ended = f"training ended in epoch {trainer.current_epoch} after {trainer.global_step} steps"
            if not phase.began(done):
                if phase in self._never:
                    continue  # it was told when the training began
                rank_zero_warn(f"{name} never began: {ended}, and it begins at {begin!r}.")
            elif not phase.finished(done):
                rank_zero_warn(
                    f"{name} did not finish: {ended}, before its last change at {phase.last_moment()!r}. "
                    f"So far: {phase.describe(done[-1])}. Let it end earlier."
                )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of phases that never began where the Trainer was given nothing to train."""
        idle = [type(phase).__name__ for phase in self.phases if not phase.began(self._done(phase))]
        if idle and not self._trained:
            rank_zero_warn(
                f"{', '.join(idle)} never began: no batch was trained (max_epochs={trainer.max_epochs}, "
                f"max_steps={trainer.max_steps}, limit_train_batches={trainer.limit_train_batches})."
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the record into checkpoints that are saved after training, when our hooks are gone."""
        self._save(pl_module, checkpoint)

    def _perform(self, trainer: Trainer, pl_module: LightningModule, phase: Phase, change: Change) -> None:
        """Make one change everywhere: on this network as on those of other processes, in what else holds it."""
        network = self._found
        assert network is not None
        assert self._batch is not None
        processes.synchronize_buffers(trainer)
        before = processes.shapes(pl_module)
        change = {"phase": phase.name, **trainer.strategy.broadcast(change)}
        begins_int8 = phase.ends_float_training(network)
        if begins_int8:
            self._float_state = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
        succession = record.perform(network, change)
        follow_all(trainer.optimizers, succession)
        for copied in processes.averaged_copies(trainer):
            processes.repeat(self._network(copied), network, change)
        phase.prime(network, change, self._batch)
        if begins_int8:
            self._calls_before = quantized_forward(network)[1].calls
        if self._distillation is not None:
            if begins_int8:
                self._distillation.set_baseline(self.baseline(pl_module))
            self._distillation.network_changed(network, succession)
        if processes.shapes(pl_module) != before:
            processes.rebuild_buckets(trainer)
        self._tell(trainer, phase, change)

    def _hold_earlier_zeros(self) -> None:
        """Keep the zeros of an earlier fit's masks where no phase of this one has masks of its own."""
        self._earlier_masks = [change for change in self._inherited if record.PHASES[change["phase"]].holds_zeros]
        if self._earlier_masks and any(phase.cuts_parameters for phase in self.phases):
            raise CompressionError(
                "the network has masks of an earlier Sparsify, which fit its weights as they are now: it cannot be "
                "pruned or factorized any more. Prune and factorize first, then sparsify."
            )
        if any(phase.holds_zeros for phase in self.phases):
            self._earlier_masks = []

    def _after_step(self) -> None:
        if self._found is None:
            return
        if self._earlier_masks:
            self._keeper.after_step(self._found, self._earlier_masks)
        for phase in self.phases:
            phase.after_step(self._found, self._done(phase))

    def _waits(self, phase: Phase) -> bool:
        """Whether a phase that this one waits for takes part and is not finished."""
        others = (other for other in self.phases if other.name in phase.waits_for)
        return any(not other.finished(self._done(other)) for other in others)

    def _done(self, phase: Phase) -> list[Change]:
        """What this phase has done in this training."""
        assert self._found is not None
        earlier = {id(change) for change in self._inherited}
        changes = record.changes_of(self._found)
        return [change for change in changes if change["phase"] == phase.name and id(change) not in earlier]

    def _network(self, pl_module: nn.Module) -> nn.Module:
        return find_network(pl_module, self.module)

    def _check_schedule(self, trainer: Trainer) -> None:
        unknown = trainer.max_epochs in (None, -1) and trainer.max_steps == -1
        for phase in self.phases:
            moment = next((m for m in (phase.first_moment(), phase.last_moment()) if isinstance(m, float)), None)
            if moment is not None and unknown:
                raise CompressionError(
                    f"{type(phase).__name__} begins or ends at {moment!r} of a training whose length is not known "
                    f"(max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}). Give the Trainer one of them, "
                    "or the phase epochs as whole numbers."
                )
        try:
            check_phases(self.phases, trainer.max_epochs if trainer.max_steps == -1 else None)
        except ValueError as error:
            raise CompressionError(f"{error} The Trainer has max_epochs={trainer.max_epochs}.") from error

        self._never = [] if trainer.fast_dev_run else self._that_never_begin(trainer)  # type: ignore[attr-defined]
        for phase in self._never:
            rank_zero_warn(
                f"{type(phase).__name__} will never begin: it begins at {phase.first_moment()!r}, and this training "
                f"ends before that (max_epochs={trainer.max_epochs}; 1.0 is the end). Let it begin earlier, or train "
                "longer."
            )

    def _that_never_begin(self, trainer: Trainer) -> list[Phase]:
        begun = (phase for phase in self.phases if not comes(phase.first_moment(), trainer.max_epochs))
        return [phase for phase in begun if not phase.began(self._done(phase))]

    def _load(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = record.checked(checkpoint.get(record.KEY), "the checkpoint")
        if saved and trainer.training:
            record.check_agreement(saved, self.phases)
        network, changes = self._network(pl_module), saved.get("changes", [])
        record.restore(network, changes)
        for copied in processes.averaged_copies(trainer):
            record.restore(self._network(copied), changes)
        self._float_state = saved.get("float_state")
        self._inherited = [changes[index] for index in saved.get("inherited", [])]
        self._distillation_state = saved.get("distillation")
        self._ours = weakref.ref(network)

    def _save(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        changes = record.changes_of(self._network(pl_module))
        earlier = {id(change) for change in self._inherited}
        checkpoint[record.KEY] = {
            "changes": changes,
            "inherited": [index for index, change in enumerate(changes) if id(change) in earlier],
            "settings": record.settings_of(self.phases),
            # The float network that the report compares with, and that can be the teacher.
            "float_state": self._float_state,
            "distillation": None if self._distillation is None else self._distillation.state(),
        }

    def _tell(self, trainer: Trainer, phase: Phase, change: Change) -> None:
        when = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        rank_zero_info(f"{type(phase).__name__}, {when}: {phase.describe(change)}")
        assert self._found is not None
        figures = {f"edge/{phase.name}/{name}": value for name, value in phase.figures(self._found, change).items()}
        for logger in trainer.loggers if figures else ():
            logger.log_metrics(figures, step=trainer.global_step)


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


__all__ = ["EdgeCompressionCallback"]
