"""Two fits in two threads of one process: their captures take turns, and each network is its own."""

from __future__ import annotations

import threading

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import EdgeCompressionCallback, Prune, Quantize, convert
from lightning_edge.quantization import is_quantized


class Task(L.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.network(batch[0]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_fits_in_two_threads_do_not_disturb_each_other() -> None:
    errors: list[BaseException] = []
    widths: dict[int, int] = {}
    together = threading.Barrier(3)

    def fit(width: int) -> None:
        try:
            task = Task(width)
            phases = [Prune(layers={"0": 0.5}, start=0, round_to=4), Quantize(start=0)]
            trainer = L.Trainer(
                max_epochs=1,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[EdgeCompressionCallback(phases)],
            )
            data = DataLoader(TensorDataset(torch.randn(16, 6)), batch_size=4)
            together.wait(60)
            trainer.fit(task, data)
            assert is_quantized(task.network)
            assert convert(task.network).precision == "int8"
            widths[width] = task.network[0].out_features
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=fit, args=(width,)) for width in (16, 24, 32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(left == width // 2 for width, left in widths.items())
    assert len(widths) == 3
