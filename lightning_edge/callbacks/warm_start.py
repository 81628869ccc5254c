"""Begin a training with the weights of a checkpoint: a float network trained once, compressed many times."""

from __future__ import annotations

from pathlib import Path
from typing import final

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_edge.record import load_compressed


@final
class WarmStart(Callback):
    """Loads the weights of a checkpoint when `fit` begins; epochs, steps and optimizers begin anew.

    ``fit(ckpt_path=...)`` goes on with a training that was interrupted; its weights then take the place of these. A
    checkpoint of a network that was pruned gives the pruned network.

    Args:
        checkpoint: A checkpoint that Lightning wrote for the same LightningModule, of any number of phases but
            quantization. It is read with ``weights_only=True``.
        module: The submodule that was compressed, as given to ``EdgeCompressionCallback(module=...)``.

    Raises:
        RecordError: When `fit` begins, if the file is no checkpoint or its weights do not fit.
        FileNotFoundError: When `fit` begins, if there is no such file.
    """

    def __init__(self, checkpoint: str | Path, module: str | None = None) -> None:
        self.checkpoint = Path(checkpoint)
        self.module = module

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the weights, in every process."""
        if stage != "fit":
            return
        modes = [(part, part.training) for part in pl_module.modules()]
        load_compressed(self.checkpoint, pl_module, self.module)
        for part, training in modes:
            part.training = training
