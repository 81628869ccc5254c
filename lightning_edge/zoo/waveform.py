"""A keyword spotter that takes the waveform: its features are computed in the file."""

from __future__ import annotations

from torch import nn

from lightning_edge.zoo.audio_features import MFCC
from lightning_edge.zoo.networks import DSCNN


class WaveformDSCNN(nn.Sequential):
    """`DSCNN` behind its features: waveforms (N, 16000) of any scale to logits (N, ``num_classes``).

    An app hands the file what the microphone gives. ``Quantize(skip=["features"])`` keeps the features in float: their
    logarithm spans more than 8 bits resolve.

    Args:
        width: Channels of every layer.
        num_classes: Number of logits.
    """

    def __init__(self, width: int = 64, num_classes: int = 12) -> None:
        super().__init__()
        self.add_module("features", MFCC())
        self.add_module("classifier", DSCNN(width, num_classes))
