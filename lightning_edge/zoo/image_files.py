"""Read images and labels from a folder of CIFAR-like files. Knows numpy and file formats, nothing of training.

Three formats are read, none of them a pickle: ``.bin`` files of CIFAR-10's binary version, ``.npz`` files of
images and labels, and ``.npz`` files of CIFAR-10 in a reversible difference coding that makes them smaller.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
Split = Literal["train", "test"]

_PATTERNS = {
    "train": ("train*.npz", "data_batch_*.npz", "data_batch_*.bin"),
    "test": ("test*.npz", "test_batch.bin"),
}
_RECORD_BYTES = 1 + 3 * 32 * 32


def find_files(folder: Path, split: Split) -> list[Path]:
    """List the files of one split, in the order of their names, from ``folder`` or its ``cifar-10-batches-bin``.

    Raises:
        FileNotFoundError: If there is none.
    """
    for place in (folder, folder / "cifar-10-batches-bin"):
        for pattern in _PATTERNS[split]:
            if files := sorted(place.glob(pattern)):
                return files
    raise FileNotFoundError(
        f"no {split} images in {str(folder)!r}. Looked for: {', '.join(_PATTERNS[split])}, there and in "
        f"cifar-10-batches-bin. Give the folder that holds them."
    )


def read_images(folder: Path, split: Split) -> tuple[Pixels, Labels]:
    """Read every image of one split.

    Returns:
        Images (N, C, H, W) and labels (N,).

    Raises:
        FileNotFoundError: If the folder holds no file of this split.
        ValueError: If a file is not what its name says.
    """
    parts = [_read(path) for path in find_files(folder, split)]
    shapes = {images.shape[1:] for images, _ in parts}
    if len(shapes) > 1:
        raise ValueError(f"the {split} files of {str(folder)!r} hold images of different shapes: {sorted(shapes)}")
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _read(path: Path) -> tuple[Pixels, Labels]:
    images, labels = _read_binary(path) if path.suffix == ".bin" else _read_npz(path)
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"{path} holds {len(images)} images and {len(labels)} labels; both must be equal and not 0")
    return images, labels.astype(np.int64)


def _read_binary(path: Path) -> tuple[Pixels, NDArray[Any]]:
    raw = np.fromfile(path, dtype=np.uint8)
    if len(raw) % _RECORD_BYTES:
        raise ValueError(
            f"{path} has {len(raw)} bytes, which is no multiple of {_RECORD_BYTES}: it is cut or not CIFAR-10"
        )
    records = raw.reshape(-1, _RECORD_BYTES)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _read_npz(path: Path) -> tuple[Pixels, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        names = set(arrays.files)
        labels = next((arrays[name] for name in ("labels", "y") if name in names), None)
        if labels is None or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"{path} needs whole-number labels of shape (N,) as 'labels' or 'y'; it has {_listed(arrays)}"
            )
        if "residual" in names:
            return _undo_differences(arrays["residual"]), labels
        images = next((arrays[name] for name in ("images", "x") if name in names), None)
        if images is None or images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(
                f"{path} needs uint8 images (N, H, W, C) or (N, C, H, W) as 'images' or 'x'; it has {_listed(arrays)}"
            )
    if images.shape[3] in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels
    if images.shape[1] in (1, 3):
        return images, labels
    raise ValueError(f"{path}: images of shape {images.shape} have neither 1 nor 3 channels, first or last")


def _undo_differences(residual: NDArray[Any]) -> Pixels:
    """Turn differences of (green, red - green, blue - green), modulo 256, back into pixels (N, 3, H, W)."""
    if residual.ndim != 4 or residual.shape[0] != 3 or residual.dtype != np.uint8:
        raise ValueError(f"'residual' must be uint8 (3, N, H, W), it is {residual.dtype} {residual.shape}")
    green, red, blue = np.cumsum(np.cumsum(residual, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    return np.stack([red + green, green, blue + green], axis=1)


def _listed(arrays: Any) -> str:
    return ", ".join(f"{name} {arrays[name].dtype} {arrays[name].shape}" for name in arrays.files) or "nothing"
