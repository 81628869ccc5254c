"""What else holds the network while it changes: other processes, averaged copies, optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lightning_edge import record
from lightning_edge.errors import CompressionError
from lightning_edge.schedule import ORDER, Change, Phase


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies under which a network cannot change.

    Raises:
        CompressionError: If the strategy is neither a single device nor DDP.
    """
    strategy = trainer.strategy
    # DeepSpeed's strategy inherits from DDP's.
    if isinstance(strategy, SingleDeviceStrategy) or type(strategy) is DDPStrategy:
        return
    raise CompressionError(
        f"the Trainer's strategy is {type(strategy).__name__}, which splits or copies parameters on its own, so that "
        "the network cannot change under it. Train with strategy='ddp' or on one device."
    )


def check_company(callbacks: Sequence[Callback], pl_module: LightningModule, phases: Sequence[Phase]) -> None:
    """Refuse what else holds parameters and cannot follow the phases.

    Raises:
        CompressionError: If a callback averages weights while a phase quantizes, the module averages them itself, or a
            callback keeps the names of parameters that a factorization replaces.
    """
    names = {phase.name for phase in phases}
    for name, module in pl_module.named_modules():
        if isinstance(module, AveragedModel) and names & set(ORDER):
            raise CompressionError(
                f"{name!r} is an AveragedModel inside the LightningModule, which would not follow a change of the "
                "network. Average with Lightning's WeightAveraging or EMAWeightAveraging callback (lightning 2.6)."
            )
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in pl_module.modules())
    for callback in callbacks:
        kind = type(callback).__name__
        if isinstance(callback, BaseFinetuning) and "factorize" in names:
            raise CompressionError(
                f"{kind} keeps parameters by name, and a factorization gives them others. Unfreeze in "
                "configure_optimizers or a hook of your own, or factorize in a fit of its own."
            )
        # By its name: lightning 2.5 has no such callback.
        if "quantize" in names and any(base.__name__ == "WeightAveraging" for base in type(callback).__mro__):
            raise CompressionError(
                f"{kind} averages every buffer, and the average of int8 ranges and zero points fits no weights. Train "
                "with it in float first (pruning and distillation go along), then with Quantize in a fit of its own."
            )
        if isinstance(callback, StochasticWeightAveraging) and norms and "quantize" in names:
            raise CompressionError(
                f"{kind} learns BatchNorm's statistics anew at the end of training, when they are part of the int8 "
                "weights. Train with it in float first, then with Quantize in a fit of its own."
            )


def averaged_copies(trainer: Trainer) -> Iterator[nn.Module]:
    """Every copy of the LightningModule that a callback averages."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if average is not None:
            # StochasticWeightAveraging keeps the copy itself, WeightAveraging torch's AveragedModel around it.
            yield average.module if isinstance(average, AveragedModel) else average


def repeat(copied: nn.Module, network: nn.Module, change: Change) -> None:
    """Make on an averaged copy the change that was made on the network.

    Parameters that are new begin with the network's values: factors of other weights cannot be averaged with them.
    """
    succession = record.perform(copied, change)
    new = {parameter for successors in succession.replaced.values() for parameter in successors}
    with torch.no_grad():
        for ours, theirs in zip(copied.parameters(), network.parameters(), strict=True):
            if ours in new:
                ours.copy_(theirs)


def synchronize_buffers(trainer: Trainer) -> None:
    """Give every process the first one's buffers, as DistributedDataParallel does before each forward, and not sooner.

    What is observed with them is then the same after a resume, when every process begins with the first one's.
    """
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel) and model.broadcast_buffers:
        for buffer in model.module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def rebuild_buckets(trainer: Trainer) -> None:
    """Let DistributedDataParallel learn the parameters anew: it keeps their shapes and buffers from when it began."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


def shapes(module: nn.Module) -> dict[str, tuple[int, torch.Size]]:
    """Which tensors a module holds, and of which shapes: what DistributedDataParallel must know."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: (id(tensor), tensor.shape) for name, tensor in tensors}
