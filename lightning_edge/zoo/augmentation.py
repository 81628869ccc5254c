"""Changes of training images that leave their class as it is, a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mirror_and_shift(images: Tensor, pixels: int) -> Tensor:
    """Mirror each image with a chance of one half and shift it by up to ``pixels``, filling with zeros.

    Args:
        images: (B, C, H, W).
        pixels: Largest shift in each direction.

    Returns:
        Images of the same shape.
    """
    batch, _, height, width = images.shape
    device = images.device
    mirrored = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, images.flip(-1), images)
    padded = nn.functional.pad(mirrored, (pixels, pixels, pixels, pixels))
    rows = torch.randint(2 * pixels + 1, (batch, 1), device=device) + torch.arange(height, device=device)
    columns = torch.randint(2 * pixels + 1, (batch, 1), device=device) + torch.arange(width, device=device)
    samples = torch.arange(batch, device=device)
    shifted = padded.permute(0, 2, 3, 1)[samples[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2).contiguous()
