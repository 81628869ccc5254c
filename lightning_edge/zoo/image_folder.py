"""Images in a folder for each class as a data module, read and resized one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_edge.errors import require
from lightning_edge.regular_files import check_regular
from lightning_edge.zoo.augmentation import mirror_and_shift
from lightning_edge.zoo.tensors import Batch, check_batch_size, loader

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_MOST_BYTES = 1 << 26
_MOST_PIXELS = 1 << 26
_VALIDATION = ("validation", "val")
Sample = tuple[Path, int]


class ImageFolderDataModule(L.LightningDataModule):
    """Images by class: a folder for each class, or ``train/``, ``validation/`` (or ``val/``) and ``test/`` of such.

    Batches are images (B, 3, ``size``, ``size``) with values 0..1, and labels (B,): the places of the folders in order
    of their names. Images are resized to a square, whatever their shape.

    Args:
        folder: Folder of the classes, or of ``train/`` and others.
        size: Height and width in pixels.
        validation_share: Share of the training images to validate on, chosen by ``seed``, where there is no folder of
            them.
        batch_size: Images in a batch.
        augment: Whether training images are mirrored and shifted by up to 5 %, each by its own chance.
        seed: Seed of the validation split.

    Raises:
        MissingExtraError: If Pillow is not installed.
        ValueError: If ``folder`` is no folder, or a number is out of range.
    """

    def __init__(
        self,
        folder: str,
        size: int = 96,
        validation_share: float = 0.1,
        batch_size: int = 32,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_batch_size(batch_size)
        require("PIL.Image", "recipes")
        if not 0 < validation_share < 1:
            raise ValueError(f"validation_share={validation_share} is not allowed; give a share between 0 and 1")
        if not 8 <= size <= 1024:
            raise ValueError(f"size={size} is not allowed; give 8 to 1024 pixels")
        if not Path(folder).is_dir():
            raise ValueError(
                f"folder={folder!r} is no folder; give the one that holds a folder of images for each class"
            )
        self.folder = Path(folder)
        self.size = size
        self.validation_share = validation_share
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed
        self._parts: dict[str, ImageFiles] = {}

    def setup(self, stage: str) -> None:
        """Find the images.

        Raises:
            FileNotFoundError: If a class has no images, or there are too few to split.
            ValueError: If the parts have different classes.
        """
        if self._parts:
            return
        divided = (self.folder / "train").is_dir()
        classes, train = find_images(self.folder / "train" if divided else self.folder)
        parts = {"train": train}
        for part, names in (("validation", _VALIDATION), ("test", ("test",))):
            place = next((self.folder / name for name in names if divided and (self.folder / name).is_dir()), None)
            if place is not None:
                found, parts[part] = find_images(place)
                if found != classes:
                    raise ValueError(f"{str(place)!r} has the classes {found}, and train/ has {classes}")
        if "validation" not in parts:
            if len(train) < 2:
                raise FileNotFoundError(f"{str(self.folder)!r} holds one image; give two or more")
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed)).tolist()
            held = min(max(1, round(self.validation_share * len(train))), len(train) - 1)
            parts["validation"] = [train[place] for place in order[:held]]
            parts["train"] = [train[place] for place in order[held:]]
        self._parts = {part: ImageFiles(samples, self.size) for part, samples in parts.items()}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Load the training images, shuffled."""
        return loader(self._parts["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Load the validation images."""
        return loader(self._parts["validation"], self.batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Load the test images.

        Raises:
            FileNotFoundError: If there is no folder of them.
        """
        if "test" not in self._parts:
            raise FileNotFoundError(f"{str(self.folder)!r} has no test images; put them into train/ and test/")
        return loader(self._parts["test"], self.batch_size)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Load the test images."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Scale the pixels, and augment a training batch, on the device it trains on."""
        pixels, labels = batch
        images = pixels.float() / 255
        if self.augment and self.trainer is not None and self.trainer.training:
            images = mirror_and_shift(images, max(1, self.size // 20))
        return images, labels


def find_images(folder: Path) -> tuple[list[str], list[Sample]]:
    """List the classes, folders in order of their names, and the images of each.

    Raises:
        FileNotFoundError: If there are fewer than two classes, or one has no images.
    """
    classes = sorted(place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    if len(classes) < 2:
        raise FileNotFoundError(f"{str(folder)!r} has {len(classes)} folders; it needs one of images for each class")
    samples = []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in _SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"{str(folder / name)!r} holds no images ({', '.join(_SUFFIXES)})")
        samples += [(path, label) for path in paths]
    return classes, samples


def read_image(path: Path, size: int) -> Tensor:
    """Read an image as RGB and resize it to a square.

    Args:
        path: A regular file, JPEG, PNG, BMP or WebP, of at most 64 MiB and 64 million pixels.
        size: Height and width in pixels.

    Returns:
        uint8 (3, ``size``, ``size``).

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no such image.
    """
    pillow = require("PIL.Image", "recipes")
    check_regular(path, _MOST_BYTES)
    try:
        with pillow.open(path, formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{path} has {image.width} x {image.height} pixels; {_MOST_PIXELS:,} are allowed")
            resized = image.convert("RGB").resize((size, size), pillow.Resampling.BILINEAR)
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read: {error}") from error
    return torch.from_numpy(np.array(resized).transpose(2, 0, 1).copy())


class ImageFiles(Dataset[Batch]):
    """Images, read when they are asked for: uint8 (3, ``size``, ``size``), and labels.

    Args:
        samples: File and label of each.
        size: Height and width in pixels.
    """

    def __init__(self, samples: Sequence[Sample], size: int) -> None:
        self.samples = samples
        self.size = size

    def __len__(self) -> int:
        """Count the images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch:
        """Read one image and its label."""
        path, label = self.samples[index]
        return read_image(path, self.size), torch.tensor(label)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Read a whole batch (B, 3, ``size``, ``size``) and labels (B,)."""
        images, labels = zip(*[self[index] for index in indices], strict=True)
        return torch.stack(images), torch.stack(labels)
