"""Sounds of a machine as a data module: log-mel frames of normal ones to learn from, both kinds to test on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_edge.zoo.audio_features import log_mel
from lightning_edge.zoo.tensors import Batch, check_batch_size, loader
from lightning_edge.zoo.wav_files import read_wav

SAMPLE_RATE = 16_000
FRAMES = 5
_KINDS = ("normal", "anomaly")
# MLPerf Tiny leaves out the first and last seconds of a clip of ten.
_FIRST_FRAME, _LAST_FRAME = 50, 250


class MachineSoundsDataModule(L.LightningDataModule):
    """Recordings of machines in the layout of DCASE 2020 task 2, such as ToyCar.

    Batches to train and validate on are windows (B, 640) of five log-mel frames of 128 bands, and zeros (B,). Batches
    to test on are all windows of one clip, and its label (1,): 1 for an anomaly.

    Args:
        folder: Has ``train/normal_*.wav`` and ``test/normal_*.wav`` and ``test/anomaly_*.wav``: 16 kHz, 16 bits, one
            channel.
        validation_share: Share of the training clips to validate on, chosen by ``seed``.
        batch_size: Windows in a batch.
        seed: Seed of the validation split.

    Raises:
        ValueError: If ``folder`` is no folder, or ``validation_share`` or ``batch_size`` is out of range.
    """

    def __init__(self, folder: str, validation_share: float = 0.1, batch_size: int = 512, seed: int = 0) -> None:
        super().__init__()
        check_batch_size(batch_size)
        if not 0 < validation_share < 1:
            raise ValueError(f"validation_share={validation_share} is not allowed; give a share between 0 and 1")
        if not Path(folder).is_dir():
            raise ValueError(f"folder={folder!r} is no folder; give the one that holds train/ and test/")
        self.folder = Path(folder)
        self.validation_share = validation_share
        self.batch_size = batch_size
        self.seed = seed
        self._parts: dict[str, Windows] = {}
        self._tests: ClipWindows | None = None

    def setup(self, stage: str) -> None:
        """Read what ``stage`` needs, and compute its features.

        Raises:
            FileNotFoundError: If there are no recordings, or too few to split.
            ValueError: If a file is not what its name says.
        """
        if stage in ("fit", "validate") and not self._parts:
            paths = self._find("train", "normal", 2)
            order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(self.seed)).tolist()
            held = min(max(1, round(self.validation_share * len(paths))), len(paths) - 1)
            clips = [features_of(paths[place]) for place in order]
            self._parts = {"validation": Windows(clips[:held]), "train": Windows(clips[held:])}
        if stage in ("test", "predict") and self._tests is None:
            found = [(path, label) for label, kind in enumerate(_KINDS) for path in self._find("test", kind, 1)]
            self._tests = ClipWindows([(features_of(path), label) for path, label in found])

    def _find(self, part: str, kind: str, least: int) -> list[Path]:
        paths = sorted((self.folder / part).glob(f"{kind}_*.wav"))
        if len(paths) < least:
            raise FileNotFoundError(
                f"{str(self.folder / part)!r} holds {len(paths)} files {kind}_*.wav; {least} or more are needed"
            )
        return paths

    def train_dataloader(self) -> DataLoader[Batch]:
        """Load windows of normal clips, shuffled."""
        return loader(self._parts["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Load windows of the normal clips that were held back."""
        return loader(self._parts["validation"], self.batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Load the test clips, one a batch."""
        assert self._tests is not None
        return DataLoader(self._tests, batch_size=None)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Load the test clips, one a batch."""
        return self.test_dataloader()


def features_of(path: Path) -> Tensor:
    """Compute the log-mel frames (frames, 128) of a recording; of one of ten seconds those in its middle.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no recording of this form, or shorter than a window.
    """
    frames = log_mel(torch.from_numpy(read_wav(path, SAMPLE_RATE)) / 32768, SAMPLE_RATE)
    frames = frames[_FIRST_FRAME:_LAST_FRAME] if len(frames) >= _LAST_FRAME else frames
    if len(frames) < FRAMES:
        raise ValueError(f"{path} is too short: {len(frames)} frames of 32 ms, and {FRAMES} are needed")
    return frames


def windows_of(frames: Tensor) -> Tensor:
    """Put each frame and the four after it into one row: (frames, mels) to (frames - 4, 5 * mels)."""
    return frames.unfold(0, FRAMES, 1).transpose(1, 2).flatten(1)


class Windows(Dataset[Batch]):
    """All windows of some clips; a window is made when it is asked for, since frames are in five of them.

    Args:
        clips: Log-mel frames (frames, mels) of each clip.
    """

    def __init__(self, clips: Sequence[Tensor]) -> None:
        self._frames = torch.cat(list(clips))
        ends = torch.tensor([len(clip) for clip in clips]).cumsum(0)
        firsts = torch.arange(len(self._frames))
        # A window lies in one clip.
        whole = torch.bucketize(firsts, ends, right=True) == torch.bucketize(firsts + FRAMES - 1, ends, right=True)
        self._firsts = firsts[whole]

    def __len__(self) -> int:
        """Count the windows."""
        return len(self._firsts)

    def __getitem__(self, index: int) -> Batch:
        """Make one window (640,) and a zero."""
        windows, labels = self.__getitems__([index])
        return windows[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Make windows (B, 640) and zeros (B,)."""
        rows = self._firsts[torch.as_tensor(indices)][:, None] + torch.arange(FRAMES)
        return self._frames[rows].flatten(1), torch.zeros(len(indices), dtype=torch.int64)


class ClipWindows(Dataset[Batch]):
    """The windows of one clip at a time, with its label.

    Args:
        clips: Log-mel frames (frames, mels) and label of each clip.
    """

    def __init__(self, clips: Sequence[tuple[Tensor, int]]) -> None:
        self._clips = clips

    def __len__(self) -> int:
        """Count the clips."""
        return len(self._clips)

    def __getitem__(self, index: int) -> Batch:
        """Make the windows (W, 640) of a clip and its label (1,)."""
        frames, label = self._clips[index]
        return windows_of(frames), torch.tensor([label])
