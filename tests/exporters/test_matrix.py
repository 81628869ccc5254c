"""Every architecture through everything: pruned, trained in int8, resumed, and exported to each target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import ARCHITECTURES, Model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_edge import EdgeCompressionCallback, Prune, Quantize, export, exporters, load_compressed
from lightning_edge.network import Inputs, flatten_outputs

pytestmark = pytest.mark.filterwarnings("ignore")

EPOCHS, BATCH = 4, 4


class Task(L.LightningModule):
    """Pulls every output of any network towards one."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network = model.build()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        outputs = flatten_outputs(self.network(*batch["args"], **batch["kwargs"]))
        return torch.stack([(output - 1).square().mean() for output in outputs]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def batches(model: Model) -> list[Inputs]:
    torch.manual_seed(1)
    return [model.inputs(BATCH) for _ in range(3)]


def loader(model: Model) -> DataLoader[Any]:
    data = [{"args": list(inputs.args), "kwargs": dict(inputs.kwargs)} for inputs in batches(model)]
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def task(model: Model) -> Task:
    torch.manual_seed(0)
    made = Task(model)
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # checkpoints hold no random state, with or without compression
    return made


def fit(model: Model, folder: Path, resume: Path | None = None) -> Task:
    trained = task(model)
    phases = [Prune(macs=0.6, start=1, end=2, round_to=2), Quantize(start=3)]
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        callbacks=[EdgeCompressionCallback(phases), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        deterministic=True,
    )
    trainer.fit(trained, loader(model), ckpt_path=resume)
    return trained


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Of each kind of architecture one, and every one that is captured in a way of its own.
QUICK = {"attention", "depthwise", "residual"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in sorted(ARCHITECTURES)],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Task, Path]:
    """An architecture's name, what a training made of it, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, fit(ARCHITECTURES[request.param], folder), folder


def outputs(module: Task, model: Model) -> list[Tensor]:
    inputs = batches(model)[0]
    with torch.no_grad():
        return flatten_outputs(module.eval().network(*inputs.args, **inputs.kwargs))


# In the middle of pruning, and between pruning and quantization.
@pytest.mark.parametrize("epoch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_is_smaller_and_the_same_after_resume(trained: tuple[str, Task, Path], epoch: int, tmp_path: Path) -> None:
    name, whole, folder = trained
    model = ARCHITECTURES[name]
    assert parameters(whole) < parameters(task(model))
    resumed = fit(model, tmp_path / str(epoch), folder / f"epoch={epoch}.ckpt")
    expected = whole.state_dict()
    found = resumed.state_dict()
    assert list(found) == list(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    loaded = load_compressed(folder / f"epoch={EPOCHS - 1}.ckpt", task(model))
    assert isinstance(loaded, Task)
    assert all(torch.equal(*pair) for pair in zip(outputs(loaded, model), outputs(whole, model), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(exporters.TARGETS))
def test_it_runs_on_every_target(trained: tuple[str, Task, Path], target: str, tmp_path: Path) -> None:
    name, whole, _ = trained
    path = tmp_path / f"model{exporters.target(target).suffix}"
    network, inputs = whole.network.eval(), batches(ARCHITECTURES[name])
    artifact = export(network, target, path, batches=inputs)
    assert artifact.contents.int8_weight_bytes > 0
