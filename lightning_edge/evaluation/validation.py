"""The user's own validation or test loop, run with the network's calls answered by something else."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, final, get_args

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torchmetrics import Metric

from lightning_edge.errors import EdgeError
from lightning_edge.evaluation.class_changes import Labels
from lightning_edge.network import Inputs
from lightning_edge.surgery import capture_inputs, find_network, redirected
from lightning_edge.user_warnings import warn

Split = Literal["validate", "test"]

_CPU = torch.device("cpu")
_BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@final
@dataclass(frozen=True)
class Validation:
    """A validation or test loop that can be run as often as there are candidates, on the CPU.

    The loop is the LightningModule's own: its step, its hooks and what it logs, on a copy in a Trainer of its own
    without callbacks. Where ``metrics`` are given, or the module has no such step, the loop is ours: batches are
    ``(inputs, target, ...)`` or a tensor of inputs, the network is called with the inputs (a tensor, or a list of
    positional or dict of keyword arguments) and every metric is updated with ``(outputs, target)``.

    Attributes:
        pl_module: The user's module; it is copied, never changed.
        dataloaders: What ``Trainer.validate`` takes.
        module: Name of the network in it, see `surgery.find_network`.
        split: Which of the two loops.
        limit_batches: As ``Trainer(limit_val_batches=...)``.
        datamodule: Where the batch transfer hooks are, if it has some.
        metrics: Metrics by name, in place of the module's step.

    Raises:
        ValueError: If ``split`` is not one of the two, or ``limit_batches`` leaves nothing.
    """

    pl_module: LightningModule
    dataloaders: Any
    module: str | None = None
    split: Split = "validate"
    limit_batches: int | float = 1.0
    datamodule: LightningDataModule | None = None
    metrics: Mapping[str, Metric] | None = None

    def __post_init__(self) -> None:
        check_split(self.split)
        if not self.limit_batches > 0:
            raise ValueError(f"limit_batches={self.limit_batches!r} leaves nothing to evaluate on; give more than 0")

    @classmethod
    def after_fit(
        cls,
        trainer: Trainer,
        pl_module: LightningModule,
        module: str | None,
        split: Split,
        metrics: Mapping[str, Metric] | None,
    ) -> Validation:
        """Take data, limits and hooks from a Trainer that has fitted ``pl_module``.

        Raises:
            ValueError: If it has no data for ``split``, or is told to use none of it.
        """
        check_split(split)
        datamodule: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
        limit = trainer.limit_val_batches if split == "validate" else trainer.limit_test_batches
        check_data(trainer, split)
        source = _source(trainer, split)
        loaders = trainer.val_dataloaders if split == "validate" and trainer.world_size == 1 else None
        if loaders is None:
            if split == "test" and datamodule is not None:
                datamodule.setup("test")
            # The user's own loaders: those that training used hold this process's share only.
            loaders = source.dataloader()
        return cls(pl_module, loaders, module, split, limit, datamodule, metrics)

    @classmethod
    def of_datamodule(
        cls,
        pl_module: LightningModule,
        datamodule: LightningDataModule,
        module: str | None = None,
        split: Split = "validate",
        limit_batches: int | float = 1.0,
        metrics: Mapping[str, Metric] | None = None,
    ) -> Validation:
        """Prepare and set up a data module and take its loaders, without a Trainer that has run."""
        check_split(split)
        datamodule.prepare_data()
        datamodule.setup(split)
        loaders = datamodule.val_dataloader() if split == "validate" else datamodule.test_dataloader()
        return cls(pl_module, loaders, module, split, limit_batches, datamodule, metrics)

    @property
    def step(self) -> str:
        """Name of the module's step for this split."""
        return "validation_step" if self.split == "validate" else "test_step"

    @property
    def own_step(self) -> bool:
        """Whether the metrics are those of the module's own step."""
        return self.metrics is None and is_overridden(self.step, self.pl_module)

    def run(self, answer: Callable[..., Any], labels: Labels | None = None) -> dict[str, float]:
        """Run the loop once and return what it logged.

        Args:
            answer: Called in the network's place, with its arguments on the CPU; returns what the network would.
            labels: Takes each batch before ``answer`` is called for it.

        Raises:
            EdgeError: If the loop did not call the network, so that its metrics say nothing about it.
        """
        with quiet():
            module, trainer = self._copy(), self._trainer()
        if labels is not None:
            _note_batches(module, labels)
        calls = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return answer(*args, **kwargs)

        network = find_network(module, self.module)
        with torch.inference_mode(), quiet(), self._lent(trainer), redirected(network, counted):
            metrics = self._run_step(module, trainer) if self.own_step else self._run_batches(module, counted)
        if not calls:
            loop = self.step if self.own_step else "The evaluation"
            raise EdgeError(
                f"{loop} of {type(module).__name__} did not call the network {self.module or 'found in it'!r}: there "
                "was no batch, or it calls something else. Name the submodule it calls with module=..., or give "
                "metrics=... to have it called here."
            )
        return metrics

    def _copy(self) -> LightningModule:
        module = copy.deepcopy(self.pl_module).cpu()
        # Lightning's map from metric objects to names, which are other objects in a copy.
        module._metric_attributes = None
        for metric in module.modules():
            if isinstance(metric, Metric):
                # Other processes of the training take no part in this, and waiting for them would be forever.
                metric.distributed_available_fn = _alone
                metric.reset()
        for name in _BATCH_HOOKS:
            if self.datamodule is not None and is_overridden(name, self.datamodule):
                setattr(module, name, getattr(self.datamodule, name))
        for name in ("prepare_data", "setup", "teardown", "configure_model"):
            # The module is set up; doing it twice may put a new network in the place of the trained one. The base
            # class's own methods count as not overridden, so that Lightning does not wait for other processes either.
            if name != "setup" or self.split == "validate":
                setattr(module, name, MethodType(getattr(LightningModule, name), module))
        return module.eval()

    def _run_step(self, module: LightningModule, trainer: Trainer) -> dict[str, float]:
        run = trainer.validate if self.split == "validate" else trainer.test
        run(module, dataloaders=self.dataloaders, verbose=False)
        return {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if torch.as_tensor(value).numel() == 1
        }

    @contextmanager
    def _lent(self, trainer: Trainer) -> Iterator[None]:
        """Let the data module see this loop's Trainer: a hook of its that augments asks whether that is training."""
        if self.datamodule is None:
            yield
            return
        before = self.datamodule.trainer
        self.datamodule.trainer = trainer
        try:
            yield
        finally:
            self.datamodule.trainer = before

    def _trainer(self) -> Trainer:
        return Trainer(
            accelerator="cpu",
            devices=1,
            num_nodes=1,
            logger=DummyLogger(),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=self.limit_batches,
            limit_test_batches=self.limit_batches,
            use_distributed_sampler=False,
        )

    def _run_batches(self, module: LightningModule, network: Callable[..., Any]) -> dict[str, float]:
        metrics = copy.deepcopy(dict(self.metrics or {}))
        for metric in metrics.values():
            metric.reset()
        for batch in self._batches(module):
            inputs, target = _inputs_and_target(batch)
            outputs = network(*inputs.args, **inputs.kwargs)
            for metric in metrics.values():
                if target is None:
                    raise EdgeError(
                        f"metrics={list(metrics)} need a target, and the batches are of {type(batch).__name__}; "
                        "let the dataloader give (inputs, target)"
                    )
                metric.update(outputs, target)
        return dict(_scalars({name: metric.compute() for name, metric in metrics.items()}))

    def _batches(self, module: LightningModule) -> Iterator[Any]:
        loaders = CombinedLoader(self.dataloaders, "sequential")
        limits = []
        for loader in loaders.flattened:
            whole = self.limit_batches == 1.0 and isinstance(self.limit_batches, float)
            share = isinstance(self.limit_batches, float) and not whole
            limits.append(
                int(len(loader) * self.limit_batches) if share else None if whole else int(self.limit_batches)
            )
        for loader, limit in zip(loaders.flattened, limits, strict=True):
            for index, batch in enumerate(loader):
                if limit is not None and index >= limit:
                    break
                yield transfer(module, batch)


def _scalars(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Give every result that is one number by its name, those of a collection by both names."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}_")
        elif torch.as_tensor(value).numel() == 1:
            yield prefix + name, float(value)
        else:
            warn(
                f"metrics={prefix + name!r} gives {torch.as_tensor(value).numel()} values, and a report holds one "
                "number for each metric; it is left out. Average it, for example by average='macro'"
            )


def check_split(split: str) -> None:
    """Refuse anything but the two splits.

    Raises:
        ValueError: If it is not one of the two.
    """
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} is not one of {get_args(Split)}")


def check_data(trainer: Trainer, split: Split) -> None:
    """See before a training whether there will be anything to evaluate on after it.

    Raises:
        ValueError: If the Trainer has no data for ``split``, or is told to use none of it.
    """
    prefix = "val" if split == "validate" else "test"
    limit = getattr(trainer, f"limit_{prefix}_batches")
    if not limit > 0:
        raise ValueError(
            f"split={split!r} with Trainer(limit_{prefix}_batches={limit:g}) leaves nothing to evaluate on; "
            "give more than 0"
        )
    if not _source(trainer, split).is_defined():
        raise ValueError(
            f"split={split!r} but the Trainer was given no {prefix}_dataloader; give one to fit(), the data module or "
            "the LightningModule, or use the other split"
        )


def calibration_inputs(
    pl_module: LightningModule,
    dataloaders: Any,
    batches: int,
    module: str | None = None,
    datamodule: LightningDataModule | None = None,
) -> list[Inputs]:
    """Collect what ``training_step`` feeds the network, or ``validation_step`` if that does not call it.

    Args:
        pl_module: The user's module; a copy is asked, on the CPU.
        dataloaders: Training data, as ``Trainer.fit`` takes it.
        batches: At most this many batches.
        module: Name of the network, see `surgery.find_network`.
        datamodule: Where the batch transfer hooks are, if it has some.

    Raises:
        EdgeError: If neither step calls the network.
    """
    with quiet():
        asked = Validation(pl_module, dataloaders, module, datamodule=datamodule)._copy()
    asked.trainer = pl_module._trainer
    asked.log = asked.log_dict = _nothing  # type: ignore[method-assign]
    network = find_network(asked, module)
    collected: list[Inputs] = []
    failure: Exception | None = None
    with quiet(), torch.no_grad():
        for index, (batch, *_) in enumerate(CombinedLoader(dataloaders, "max_size_cycle")):
            if index >= batches:
                break
            moved = transfer(asked, batch)
            for step in (asked.training_step, asked.validation_step):
                try:
                    inputs = capture_inputs(network, lambda step=step, moved=moved: _call(step, moved, index))  # type: ignore[misc]  # noqa: B023
                except Exception as error:
                    failure = error
                    continue
                if inputs is not None:
                    collected.append(inputs.map(lambda tensor: tensor.detach()))
                    break
    if not collected:
        raise EdgeError(
            f"no batch of the training data reached the network {module or 'found'!r} through training_step or "
            f"validation_step{f' ({failure})' if failure else ''}; name the submodule they call with module=..."
        ) from failure
    return collected


def transfer(pl_module: LightningModule, batch: Any) -> Any:
    """Pass a batch through the user's transfer hooks, to the CPU."""
    batch = pl_module.on_before_batch_transfer(batch, 0)
    batch = pl_module.transfer_batch_to_device(batch, _CPU, 0)
    return pl_module.on_after_batch_transfer(batch, 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's words about a Trainer of ours from the user, not those about a failure."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.filterwarnings("ignore", module=r"lightning\.|torchmetrics\.")
            warnings.filterwarnings("ignore", message=r".*LeafSpec", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _note_batches(module: LightningModule, labels: Labels) -> None:
    moved = module.on_after_batch_transfer

    def on_after_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
        batch = moved(batch, dataloader_idx)
        labels.note(batch)
        return batch

    module.on_after_batch_transfer = on_after_batch_transfer  # type: ignore[method-assign]


def _call(step: Callable[..., Any], batch: Any, index: int) -> Any:
    wanted = inspect.signature(step).parameters
    return step(batch, index) if len(wanted) > 1 else step(batch)


def _inputs_and_target(batch: Any) -> tuple[Inputs, Any]:
    if isinstance(batch, torch.Tensor):
        return Inputs.of(batch), None
    if isinstance(batch, list | tuple) and batch:
        return Inputs.of(batch[0]), batch[1] if len(batch) > 1 else None
    raise EdgeError(
        f"a batch of {type(batch).__name__} does not say which part the network takes; let the dataloader give "
        "(inputs, target), or give the LightningModule a validation_step"
    )


def _source(trainer: Trainer, split: Split) -> Any:
    loop: Any = trainer.fit_loop.epoch_loop.val_loop if split == "validate" else trainer.test_loop
    return loop._data_source


def _alone() -> bool:
    return False


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
