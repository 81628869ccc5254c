"""Kills a training at random moments and resumes it from its last checkpoint: how many end as if nothing had happened.

    python benchmarks/kill_and_resume.py [--kills 20] [--phases prune+distill+quantize] [--seed 0]

Each round starts a fit in a process of its own, with a checkpoint at every epoch's end, sends it SIGKILL at a random
moment, starts it again from the last checkpoint, and compares parameters, buffers, ranges, optimizer and scheduler
state bit by bit with those of a training that was left alone. Deterministic algorithms, one thread, CPU.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import Distill, EdgeCompressionCallback, Factorize, Prune, Quantize, Sparsify
from lightning_edge.distillation import AttentionTransfer, FeatureMatching, KLDivergence
from lightning_edge.schedule import Phase

EPOCHS = 8


class Network(nn.Module):
    """A residual block, BatchNorm and a hidden linear layer: something for every phase.

    No dropout: Lightning's checkpoints do not hold the random state, with or without compression.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.head = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to logits (N, 10)."""
        features = self.stem(images)
        features = torch.relu(features + self.block(features))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class Task(L.LightningModule):
    """A classification with momentum, weight decay and a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """AdamW on a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3, amsgrad=True)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def phases(names: str) -> list[Phase]:
    """Make the phases named in ``names``, joined by plus signs, on a schedule that lets them go together."""
    torch.manual_seed(7)  # the teacher is the same in every process
    teacher = Network(width=40)
    made: dict[str, Phase] = {
        "factorize": Factorize(energy=0.5, start=1, include=["head.0"], round_to=8),
        "prune": Prune(macs=0.5, start=2, end=4, criterion="taylor"),
        "sparsify": Sparsify(sparsity=0.5, start=4, end=5),
        "distill": Distill(
            teacher=teacher,
            losses=[
                KLDivergence(temperature=4.0),
                FeatureMatching({"block": "block"}),
                AttentionTransfer({"stem": "stem"}),
            ],
        ),
        "quantize": Quantize(start=5, freeze_observers=7, fold_batch_norm=6),
    }
    return [made[name] for name in names.split("+")]


def train(folder: Path, names: str, resume: Path | None) -> None:
    """Train, writing the final state as ``final.pt``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(160, 1, 8, 8), torch.randint(0, 10, (160,)))
    task = Task()
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        callbacks=[EdgeCompressionCallback(phases(names)), ModelCheckpoint(folder, "{epoch:02d}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        deterministic=True,
    )
    trainer.fit(task, DataLoader(data, batch_size=16), ckpt_path=resume)
    state = {
        "network": task.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
    }
    torch.save(state, folder / "final.pt")


def equal(one: Any, other: Any) -> bool:
    """Whether two nested states are the same bit by bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def start(folder: Path, names: str) -> subprocess.Popen[bytes]:
    """Start a training in a process of its own, from the last checkpoint in ``folder`` if there is one."""
    written = checkpoints(folder)
    command = [sys.executable, __file__, "--train", str(folder), "--phases", names]
    return subprocess.Popen([*command, *(["--resume", str(written[-1])] if written else [])])


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a training to end.

    Raises:
        SystemExit: If it failed.
    """
    if process.wait() != 0:
        raise SystemExit(f"the training ended with status {process.returncode}")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written so far, oldest first."""
    return sorted(folder.glob("epoch=*.ckpt"))


def killed(folder: Path, names: str, longest_s: float, chance: random.Random) -> str | None:
    """Start a training and kill it at a random moment; say where it was, ``None`` if it had come to its end."""
    process = start(folder, names)
    # Where nothing is written yet there is nothing to resume; the moment is random from then on.
    while process.poll() is None and not checkpoints(folder):
        time.sleep(0.005)
    time.sleep(chance.uniform(0, longest_s))
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = len(checkpoints(folder))
    return None if written == EPOCHS else f"killed in epoch {written} of {EPOCHS}"


def main() -> None:
    """Print one line per kill and the sum."""
    parser = argparse.ArgumentParser(description="Kill a training at random moments, resume it, compare the ends")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--phases", default="factorize+prune+distill+quantize")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train is not None:
        train(arguments.train, arguments.phases, arguments.resume)
        return
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as base:
        whole = Path(base) / "whole"
        whole.mkdir()
        finish(start(whole, arguments.phases))
        times = [path.stat().st_mtime for path in checkpoints(whole)]
        longest_s = times[-1] - times[0]
        expected = torch.load(whole / "final.pt", weights_only=True)
        same = 0
        for number in range(arguments.kills):
            said = None
            while said is None:
                folder = Path(tempfile.mkdtemp(dir=base))
                said = killed(folder, arguments.phases, longest_s, chance)
            finish(start(folder, arguments.phases))
            found = equal(torch.load(folder / "final.pt", weights_only=True), expected)
            same += found
            print(f"{number + 1:3}: {said}: {'equal' if found else 'DIFFERENT'}", flush=True)
    print(f"{arguments.phases}: {same} of {arguments.kills} killed and resumed trainings ended bitwise equal")
    raise SystemExit(same != arguments.kills)


if __name__ == "__main__":
    main()
