"""Read WAV files of one channel and 16 bits by the standard library. Knows numpy and the format."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_edge.regular_files import read_regular
from lightning_edge.wording import counted

# A minute of 16-bit sound at 48 kHz is 6 MB.
MOST_BYTES = 1 << 27


def read_wav(path: Path, sample_rate: int) -> NDArray[np.int16]:
    """Read the samples of a WAV file.

    Args:
        path: A regular file of at most `MOST_BYTES`.
        sample_rate: Samples in a second that it must have; nothing is resampled.

    Returns:
        (samples,), one or more.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no WAV file of one channel, 16 bits and this sample rate, is cut, or has no samples.
    """
    data = read_regular(path, MOST_BYTES)
    try:
        with wave.open(io.BytesIO(data)) as sound:
            found = (sound.getnchannels(), 8 * sound.getsampwidth(), sound.getframerate())
            count = sound.getnframes()
            frames = sound.readframes(count) if found == (1, 16, sample_rate) else b""
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is no WAV file of plain samples: {str(error) or 'it is cut'}") from error
    if found != (1, 16, sample_rate):
        raise ValueError(
            f"{path} has {counted(found[0], 'channel')}, {found[1]} bits and {found[2]} samples in a second; "
            f"allowed: 1 channel, 16 bits, {sample_rate}. To convert: ffmpeg -i IN -ac 1 -ar {sample_rate} "
            "-sample_fmt s16 OUT.wav"
        )
    if not frames or len(frames) != 2 * count:
        raise ValueError(f"{path} holds {len(frames) // 2:,} samples and says {count:,}; it is cut or empty")
    return np.frombuffer(frames, "<i2").astype(np.int16)
