"""Clips of spoken words in a folder for each word: which there are, which part they belong to, and reading them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_edge.regular_files import read_regular
from lightning_edge.zoo.tensors import Batch
from lightning_edge.zoo.wav_files import read_wav

SAMPLE_RATE = 16_000
PARTS = ("train", "validation", "test")
NOISE = "_background_noise_"
_LISTS = {"validation_list.txt": "validation", "testing_list.txt": "test"}
_MOST_LIST_BYTES = 1 << 22
# Of the clips of keywords, as many again of other words, and of silence (Warden 2018, arXiv:1804.03209).
_SHARE = 0.1
# MLPerf Tiny's reference mixes noise of up to a tenth of full scale into 80 % of training clips.
_NOISY, _LOUDEST = 0.8, 0.1


@dataclass(frozen=True)
class Clip:
    """A clip of one second.

    Attributes:
        path: Its file; ``None`` for silence.
        label: Its class.
    """

    path: Path | None
    label: int


def find_clips(folder: Path, words: Sequence[str], seed: int) -> dict[str, list[Clip]]:
    """Find the clips of each part: of the words, and of each part a tenth as many of other words and of silence.

    The parts are those of ``validation_list.txt`` and ``testing_list.txt`` where the folder has them. Without them, a
    tenth each, chosen by what a name has before ``_nohash_``: all clips of a speaker are in one part.

    Args:
        folder: A folder with a folder of WAV files for each word.
        words: The keywords, class 0 and on; then come silence and all other words.
        seed: Seed of the choice among other words.

    Raises:
        FileNotFoundError: If a word has no folder, or a part has no clip.
        ValueError: If a list is too large or no text.
    """
    missing = [word for word in words if not (folder / word).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{str(folder)!r} has no folder {', '.join(map(repr, missing))}; it needs a folder of WAV files for each "
            "word, as the archive of Speech Commands has"
        )
    listed = _listed(folder)
    found: dict[str, list[Clip]] = {part: [] for part in PARTS}
    others: dict[str, list[Path]] = {part: [] for part in PARTS}
    for place in sorted(place for place in folder.iterdir() if place.is_dir() and place.name[:1] not in "._"):
        for path in sorted(place.glob("*.wav")):
            part = listed.get(f"{place.name}/{path.name}", "train") if listed else _part_of(path.name)
            if place.name in words:
                found[part].append(Clip(path, words.index(place.name)))
            else:
                others[part].append(path)
    for part, clips in found.items():
        if not clips:
            raise FileNotFoundError(f"{str(folder)!r} has no clip of {', '.join(words)} for {part}; add some")
        count = max(1, round(_SHARE * len(clips)))
        chosen = random.Random(seed).sample(others[part], min(count, len(others[part])))
        clips += [Clip(None, len(words))] * count + [Clip(path, len(words) + 1) for path in chosen]
    return found


def _listed(folder: Path) -> dict[str, str]:
    listed: dict[str, str] = {}
    for name, part in _LISTS.items():
        if (folder / name).exists():
            try:
                text = read_regular(folder / name, _MOST_LIST_BYTES).decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{folder / name} is no list of files: {error}") from error
            listed.update(dict.fromkeys(text.split(), part))
    return listed


def _part_of(name: str) -> str:
    speaker = name.partition("_nohash_")[0]
    place = int.from_bytes(hashlib.sha256(speaker.encode()).digest()[:4]) % 10
    return {0: "validation", 1: "test"}.get(place, "train")


def read_noise(folder: Path) -> list[Tensor]:
    """Read the recordings of ``_background_noise_``, values -1..1; those shorter than a clip are left out."""
    recordings = [read_wav(path, SAMPLE_RATE) for path in sorted((folder / NOISE).glob("*.wav"))]
    return [torch.from_numpy(samples) / 32768 for samples in recordings if len(samples) > SAMPLE_RATE]


class ClipFiles(Dataset[Batch]):
    """Clips, read when they are asked for: waveforms (16000,) with values -1..1 and labels.

    Shorter recordings are followed by silence, longer ones are cut. Silence is a piece of a recording of noise.

    Args:
        clips: The clips.
        noise: Recordings of noise.
        augment: Whether noise is mixed into clips, another one each time.
    """

    def __init__(self, clips: Sequence[Clip], noise: Sequence[Tensor], augment: bool) -> None:
        self.clips = clips
        self.noise = noise
        self.augment = augment

    def __len__(self) -> int:
        """Count the clips."""
        return len(self.clips)

    def __getitem__(self, index: int) -> Batch:
        """Read one clip (16000,) and its label."""
        clip = self.clips[index]
        if clip.path is None:
            # To validate and to test on, the same silence each time.
            generator = None if self.augment else torch.Generator().manual_seed(index)
            return self._piece(generator), torch.tensor(clip.label)
        samples = read_wav(clip.path, SAMPLE_RATE)[:SAMPLE_RATE]
        waveform = torch.from_numpy(np.pad(samples, (0, SAMPLE_RATE - len(samples)))) / 32768
        if self.augment and torch.rand(()) < _NOISY:
            waveform = waveform + self._piece(None) * torch.rand(()) * _LOUDEST
        return waveform, torch.tensor(clip.label)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Read a whole batch: waveforms (B, 16000) and labels (B,)."""
        waveforms, labels = zip(*[self[index] for index in indices], strict=True)
        return torch.stack(waveforms), torch.stack(labels)

    def _piece(self, generator: torch.Generator | None) -> Tensor:
        if not self.noise:
            return torch.zeros(SAMPLE_RATE)
        recording = self.noise[int(torch.randint(len(self.noise), (), generator=generator))]
        start = int(torch.randint(len(recording) - SAMPLE_RATE, (), generator=generator))
        return recording[start : start + SAMPLE_RATE]
