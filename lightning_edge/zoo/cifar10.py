"""CIFAR-10 as a data module: from a local folder, or downloaded with its checksum."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_edge.zoo.augmentation import mirror_and_shift
from lightning_edge.zoo.download import download
from lightning_edge.zoo.image_files import Split, find_files, read_images
from lightning_edge.zoo.tensors import Batch, ImageTensors, check_batch_size, loader

# The binary version of the official archive (MD5 c32a1d4ab5d03f1284b67883e8d87530): the Python version is pickles.
_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_SIZE_BYTES = 170_052_171
_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_MEMBERS = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
_SHIFT_PIXELS = 4


class CIFAR10DataModule(L.LightningDataModule):
    """CIFAR-10: a part of the training images to validate on, the test images untouched.

    Batches are images (B, 3, 32, 32) with values 0..255, as the MLPerf Tiny reference takes them, and labels (B,).

    Args:
        folder: Folder with ``train*.npz`` and ``test*.npz`` (uint8 images and labels), with CIFAR-10's binary files, or
            with `data_batch_*.npz` and `test_batch.npz`. Without it, the archive is downloaded into ``data/``.
        validation_size: Training images to validate on, chosen by ``seed``.
        batch_size: Images in a batch.
        augment: Whether training images are mirrored and shifted by up to 4 pixels, each by its own chance.
        seed: Seed of the validation split.

    Raises:
        ValueError: If ``folder`` does not exist, or ``validation_size`` or ``batch_size`` is not positive.
    """

    def __init__(
        self,
        folder: str | None = None,
        validation_size: int = 5000,
        batch_size: int = 128,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_batch_size(batch_size)
        if validation_size < 1:
            raise ValueError(
                f"validation_size={validation_size} must be at least 1: the report needs images to compare on"
            )
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(
                f"folder={folder!r} is no folder; give the one that holds the images, or none to download them"
            )
        self.folder = Path("data") if folder is None else Path(folder)
        self.downloads = folder is None
        self.validation_size = validation_size
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed
        self._sets: dict[str, ImageTensors] = {}

    def prepare_data(self) -> None:
        """Download the archive if no folder was given and ``data/`` does not hold it yet.

        Raises:
            OSError: If the download fails.
            ValueError: If the archive is not the published one.
        """
        if self.downloads and not all((self.folder / "cifar-10-batches-bin" / name).is_file() for name in _MEMBERS):
            fetch(self.folder)
        find_files(self.folder, "train")

    def setup(self, stage: str) -> None:
        """Read what ``stage`` needs.

        Raises:
            ValueError: If ``validation_size`` leaves nothing to train on, or a file is not what its name says.
        """
        if stage in ("fit", "validate") and "train" not in self._sets:
            images, labels = self._read("train")
            if self.validation_size >= len(labels):
                raise ValueError(
                    f"validation_size={self.validation_size} leaves nothing to train on: {str(self.folder)!r} holds "
                    f"{len(labels)} training images"
                )
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
            validation, train = order[: self.validation_size], order[self.validation_size :]
            self._sets["train"] = ImageTensors(images[train], labels[train])
            self._sets["validation"] = ImageTensors(images[validation], labels[validation])
        if stage in ("test", "predict") and "test" not in self._sets:
            self._sets["test"] = ImageTensors(*self._read("test"))

    def _read(self, split: Split) -> tuple[Tensor, Tensor]:
        images, labels = read_images(self.folder, split)
        return torch.from_numpy(images), torch.from_numpy(labels)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Load the training images, shuffled."""
        return loader(self._sets["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Load the validation images."""
        return loader(self._sets["validation"], self.batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Load the test images."""
        return loader(self._sets["test"], self.batch_size)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Load the test images."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment a training batch on the device it trains on."""
        images, labels = batch
        if self.augment and self.trainer is not None and self.trainer.training:
            images = mirror_and_shift(images, _SHIFT_PIXELS)
        return images, labels


def fetch(folder: Path) -> None:
    """Download CIFAR-10's binary archive, check it, and put its six files into ``folder/cifar-10-batches-bin``.

    Raises:
        OSError: If the download fails or the folder cannot be written.
        ValueError: If the archive is not the published one.
    """
    archive = download(_URL, folder, _SIZE_BYTES, _SHA256)
    place = folder / "cifar-10-batches-bin"
    place.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar, TemporaryDirectory(dir=folder) as temporary:
        for name in _MEMBERS:
            # Read by name and written under our own: nothing in the archive chooses a path.
            member = tar.extractfile(f"cifar-10-batches-bin/{name}")
            if member is None:
                raise ValueError(f"{_URL} holds no file {name}")
            staged = Path(temporary) / name
            staged.write_bytes(member.read())
            os.replace(staged, place / name)
    archive.unlink()
