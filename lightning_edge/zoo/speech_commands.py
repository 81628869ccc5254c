"""Speech Commands, or your own recorded words, as a data module: MFCC features, or the waveforms themselves."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path

import lightning as L
from torch.utils.data import DataLoader

from lightning_edge.zoo.audio_features import MFCC
from lightning_edge.zoo.download import download
from lightning_edge.zoo.keyword_clips import ClipFiles, find_clips, read_noise
from lightning_edge.zoo.tensors import Batch, check_batch_size, loader

# Size and checksum as TensorFlow Datasets publishes them.
_URL = "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
_SIZE_BYTES = 2_428_923_189
_SHA256 = "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"
# Words of lower-case letters, and the two lists; what the archive holds besides is not needed.
_MEMBER = re.compile(r"(?:\./)?((?:[a-z]+|_background_noise_)/[A-Za-z0-9_]+\.wav|(?:validation|testing)_list\.txt)")
_MOST_MEMBER_BYTES = 1 << 23
KEYWORDS = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes")


class SpeechCommandsDataModule(L.LightningDataModule):
    """Spoken words of one second: the keywords, silence, and other words as one class.

    Batches are features (B, 1, 49, 10), those of MLPerf Tiny's keyword spotting, and labels (B,); or waveforms
    (B, 16000) with values -1..1. Labels are the places of the keywords in ``words``, then silence, then unknown.

    Args:
        folder: A folder with a folder of WAV files (16 kHz, 16 bits, one channel) for each word; of
            ``_background_noise_`` silence and noise are taken. Without it, Speech Commands v0.02 (Warden 2018,
            arXiv:1804.03209, CC BY 4.0, 2.4 GB) is downloaded into ``data/``.
        words: The keywords; MLPerf Tiny's ten if not given.
        features: Whether batches hold features or waveforms.
        batch_size: Clips in a batch.
        augment: Whether noise is mixed into training clips.
        seed: Seed of the choice among other words.

    Raises:
        ValueError: If ``folder`` is no folder, ``words`` is empty or has a word twice, or ``batch_size`` is below 1.
    """

    def __init__(
        self,
        folder: str | None = None,
        words: list[str] | None = None,
        features: bool = True,
        batch_size: int = 100,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_batch_size(batch_size)
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(
                f"folder={folder!r} is no folder; give the one that holds a folder for each word, or none at all"
            )
        self.words = list(KEYWORDS) if words is None else words
        if not self.words or len({*self.words}) < len(self.words):
            raise ValueError(f"words={words!r} is not allowed; give one word or more, each once")
        self.folder = Path("data/speech_commands_v0.02") if folder is None else Path(folder)
        self.downloads = folder is None
        self.features = features
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed
        self._mfcc = MFCC()
        self._parts: dict[str, ClipFiles] = {}

    def prepare_data(self) -> None:
        """Download and unpack the archive if no folder was given and ``data/`` does not hold it yet.

        Raises:
            OSError: If the download fails.
            ValueError: If the archive is not the published one.
        """
        if self.downloads and not self.folder.is_dir():
            unpack(download(_URL, self.folder.parent, _SIZE_BYTES, _SHA256), self.folder)

    def setup(self, stage: str) -> None:
        """Find the clips.

        Raises:
            FileNotFoundError: If a word or a part has no clips.
            ValueError: If a file is not what its name says.
        """
        if self._parts:
            return
        noise = read_noise(self.folder)
        found = find_clips(self.folder, self.words, self.seed)
        self._parts = {part: ClipFiles(found[part], noise, self.augment and part == "train") for part in found}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Load the training clips, shuffled."""
        return loader(self._parts["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Load the validation clips."""
        return loader(self._parts["validation"], self.batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Load the test clips."""
        return loader(self._parts["test"], self.batch_size)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Load the test clips."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Compute the features on the device that trains."""
        waveforms, labels = batch
        return (self._mfcc.to(waveforms.device)(waveforms) if self.features else waveforms), labels


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the words, the noise and the lists of the archive into ``folder``, and remove the archive.

    Raises:
        ValueError: If a file in it is larger than a recording can be.
    """
    unpacked = folder.with_name(f"{folder.name}.unpacking")
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            # Only names of this form, so that nothing in the archive chooses another place; no links.
            name = _MEMBER.fullmatch(member.name)
            if name is None or not member.isfile():
                continue
            if member.size > _MOST_MEMBER_BYTES:
                raise ValueError(
                    f"{archive}: {member.name} has {member.size:,} bytes; {_MOST_MEMBER_BYTES:,} are allowed"
                )
            content = tar.extractfile(member)
            assert content is not None
            place = unpacked / name.group(1)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content.read())
    unpacked.rename(folder)
    archive.unlink()
