"""Images without information, as pixels uint8."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional

BLUR = 0.1
"""Standard deviation of `blurred`, as a share of the image's shorter side."""


def blurred(pixels: torch.Tensor) -> torch.Tensor:
    """Blur images uint8 (image, channel, y, x) by a Gaussian of a tenth of the shorter side; edges are repeated."""
    sigma = BLUR * min(pixels.shape[2:])
    reach = min(math.ceil(3 * sigma), min(pixels.shape[2:]) - 1)
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    values = functional.pad(pixels.double(), (reach,) * 4, mode="replicate")
    channels = values.shape[1]
    down = kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    values = functional.conv2d(values, down, groups=channels)
    values = functional.conv2d(values, down.mT, groups=channels)
    return values.round().clamp(0, 255).to(torch.uint8)


def uniform(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Draw every value of an image uniformly from 0 to 255, from its seed alone: uint8 of this shape."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
