"""A training with every phase, run by test_processes.py in one process or in two; writes what each process ended with.

python tests/callbacks/ddp_training.py FOLDER PROCESSES [RANK]

Goes on from the last checkpoint in the folder. With a rank, the process of that one is killed in the fifth epoch.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_edge import Distill, EdgeCompressionCallback, Prune, Quantize, Sparsify
from lightning_edge.distillation import FeatureMatching, KLDivergence

EPOCHS, GLOBAL_BATCH = 6, 16


class Network(nn.Module):
    """Without BatchNorm, whose statistics are each process's own: two processes are to compute what one does."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))
        self.head = nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        logits: Tensor = self.head(torch.relu(features + self.block(features)).mean((2, 3)))
        return logits


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


class Killed(L.Callback):
    """Says which process each rank is, and ends one of them as the system does where memory is short."""

    def __init__(self, folder: Path, rank: int | None) -> None:
        self.folder, self.rank = folder, rank

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (self.folder / f"rank_{trainer.global_rank}.pid").write_text(str(os.getpid()))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == self.rank and trainer.current_epoch == 4 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, processes: int, killed: int | None = None) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(0, 4, (64,)))
    teacher = Network(width=24)
    task = Task()
    phases = [
        Prune(macs=0.5, start=1, end=2, criterion="taylor", round_to=2),
        Sparsify(sparsity=0.25, start=3),
        Distill(teacher, losses=[KLDivergence(temperature=2.0), FeatureMatching({"block": "block"})]),
        Quantize(start=4, freeze_observers=5, averaging=0.1),
    ]
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        callbacks=[
            EdgeCompressionCallback(phases),
            ModelCheckpoint(folder, filename="last", enable_version_counter=False),
            Killed(folder, killed),
        ],
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        deterministic=True,
        use_distributed_sampler=False,
    )
    # Every process takes its share of each global batch, so that one process and two see the same batches.
    share = Subset(data, range(trainer.global_rank, len(data), processes))
    last = folder / "last.ckpt"
    loader = DataLoader(share, batch_size=GLOBAL_BATCH // processes)
    trainer.fit(task, loader, ckpt_path=last if last.is_file() else None)
    state = {"network": task.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
    torch.save(state, folder / f"{processes}_processes_rank_{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
