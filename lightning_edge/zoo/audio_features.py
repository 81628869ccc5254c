"""Features of sound: mel-frequency cepstral coefficients as a layer, and log-mel spectrograms. Knows torch only.

Both follow the features of MLPerf Tiny's references: `MFCC` those of keyword spotting (TensorFlow's), `log_mel` those
of anomaly detection (librosa's). The two disagree on what a mel is; `mel_matrix` has both.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

# Slaney's scale: linear below 1000 Hz, a factor of 6.4 in 27 steps above.
_LINEAR_HZ, _KNEE_HZ, _LOG_STEP = 200 / 3, 1000.0, math.log(6.4) / 27
Scale = Literal["htk", "slaney"]


def mel_matrix(bins: int, mels: int, sample_rate: int, low_hz: float, high_hz: float, scale: Scale = "htk") -> Tensor:
    """Build triangles that sum the bins of a spectrum into mel bands.

    ``"htk"`` is TensorFlow's ``linear_to_mel_weight_matrix``: 1127 ln(1 + f / 700), triangles that are straight in mel,
    of height 1, and nothing of bin 0. ``"slaney"`` is librosa's default: triangles that are straight in Hz, of area 1.

    Args:
        bins: Bins of the spectrum, from 0 Hz to half of the sample rate.
        mels: Number of bands.
        sample_rate: Samples in a second.
        low_hz: Where the first triangle begins.
        high_hz: Where the last one ends.
        scale: Which of the two.

    Returns:
        Weights (``bins``, ``mels``), float32.

    Raises:
        ValueError: If the bands do not lie between 0 Hz and half of the sample rate.
    """
    if not 0 <= low_hz < high_hz <= sample_rate / 2:
        raise ValueError(
            f"low_hz={low_hz} and high_hz={high_hz} are not allowed: give 0 or more, and at most half of the sample "
            f"rate, {sample_rate / 2:g}"
        )
    frequencies = torch.linspace(0, sample_rate / 2, bins, dtype=torch.float64)
    ends = torch.tensor([low_hz, high_hz], dtype=torch.float64)
    to_mel = _htk if scale == "htk" else _slaney
    low, high = to_mel(ends).tolist()
    edges = torch.linspace(low, high, mels + 2, dtype=torch.float64)
    places = _htk(frequencies) if scale == "htk" else frequencies
    edges = edges if scale == "htk" else _slaney_hz(edges)
    rising = (places[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - places[:, None]) / (edges[2:] - edges[1:-1])
    weights = torch.minimum(rising, falling).clamp_min(0)
    if scale == "htk":
        weights[0] = 0
    else:
        weights = weights * 2 / (edges[2:] - edges[:-2])
    return weights.float()


def _htk(hz: Tensor) -> Tensor:
    return 1127 * torch.log1p(hz / 700)


def _slaney(hz: Tensor) -> Tensor:
    knee = _KNEE_HZ / _LINEAR_HZ
    return torch.where(hz < _KNEE_HZ, hz / _LINEAR_HZ, knee + torch.log(hz.clamp_min(1) / _KNEE_HZ) / _LOG_STEP)


def _slaney_hz(mel: Tensor) -> Tensor:
    knee = _KNEE_HZ / _LINEAR_HZ
    return torch.where(mel < knee, mel * _LINEAR_HZ, _KNEE_HZ * torch.exp(_LOG_STEP * (mel - knee)))


class MFCC(nn.Module):
    """Mel-frequency cepstral coefficients of waveforms (N, samples), as (N, 1, frames, ``coefficients``).

    A clip is divided by its largest sample. Then, for each frame: Hann window, magnitude of the Fourier transform, mel
    bands, natural logarithm, cosine transform (DCT-II divided by the root of twice the bands). The transform is a
    convolution with the sines and cosines of the bins that a band uses, so that it is written into files of every
    target; none of them has an FFT.

    Args:
        sample_rate: Samples in a second.
        frame_samples: Samples of a frame.
        step_samples: Samples between the beginnings of two frames.
        mels: Number of mel bands.
        coefficients: How many coefficients are kept, from the first on.
        low_hz: Where the lowest band begins.
        high_hz: Where the highest band ends.

    Raises:
        ValueError: If the bands do not lie between 0 Hz and half of the sample rate.
    """

    waves: Tensor
    bands: Tensor
    cosines: Tensor

    def __init__(
        self,
        sample_rate: int = 16_000,
        frame_samples: int = 480,
        step_samples: int = 320,
        mels: int = 40,
        coefficients: int = 10,
        low_hz: float = 20.0,
        high_hz: float = 4000.0,
    ) -> None:
        super().__init__()
        self.step_samples = step_samples
        points = 1 << (frame_samples - 1).bit_length()
        bands = mel_matrix(points // 2 + 1, mels, sample_rate, low_hz, high_hz)
        used = bands.sum(1).nonzero().squeeze(1)
        places = torch.arange(frame_samples, dtype=torch.float64)
        window = torch.hann_window(frame_samples, periodic=True, dtype=torch.float64)
        angles = 2 * math.pi * used[:, None] * places / points
        waves = torch.cat([angles.cos(), angles.sin()]) * window
        bands_middle = torch.arange(mels, dtype=torch.float64) + 0.5
        cosines = torch.cos(math.pi / mels * bands_middle[:, None] * torch.arange(coefficients)) * (2 / mels) ** 0.5
        self.register_buffer("waves", waves.float()[:, None], persistent=False)
        self.register_buffer("bands", bands[used], persistent=False)
        self.register_buffer("cosines", cosines.float(), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Compute the coefficients of waveforms (N, samples), whatever their scale."""
        scaled = waveforms / waveforms.amax(1, keepdim=True).clamp_min(1e-6)
        spectrum = nn.functional.conv1d(scaled[:, None], self.waves, stride=self.step_samples)
        real, imaginary = spectrum.chunk(2, 1)
        magnitude = (real * real + imaginary * imaginary).sqrt()
        mels = magnitude.transpose(1, 2) @ self.bands
        return (torch.log(mels + 1e-6) @ self.cosines)[:, None]


def log_mel(
    waveform: Tensor, sample_rate: int = 16_000, points: int = 1024, step_samples: int = 512, mels: int = 128
) -> Tensor:
    """Compute the log-mel spectrogram of a waveform in decibels of power, as librosa's defaults do.

    Args:
        waveform: (samples,), values -1..1.
        sample_rate: Samples in a second.
        points: Samples of a frame, which are centered; silence lies before and behind the waveform.
        step_samples: Samples between two frames.
        mels: Number of mel bands between 0 Hz and half of the sample rate.

    Returns:
        (frames, ``mels``); frames are 1 + samples // ``step_samples``.
    """
    window = torch.hann_window(points)
    spectrum = torch.stft(
        waveform, points, step_samples, window=window, center=True, pad_mode="constant", return_complex=True
    )
    bands = mel_matrix(points // 2 + 1, mels, sample_rate, 0, sample_rate / 2, "slaney")
    power = spectrum.abs().square().T @ bands
    return 10 * torch.log10(power + torch.finfo(torch.float64).eps)
