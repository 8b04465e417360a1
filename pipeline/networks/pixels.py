"""Pixels that are moved by gradients, as a network takes them."""

from __future__ import annotations

import torch

from kernels.images.whiten import whiten
from pipeline.config.networks import Network

LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)
"""The weights of `kernels.images.grey`, which rounds."""


def inputs_of(points: torch.Tensor, spec: Network) -> torch.Tensor:
    """Return what a network takes of pixels from 0 to 255, floating-point (image, 3, y, x), with a gradient.

    For whole numbers, these are the bits of `forward.normalise`; a network of grey images gets its grey before the
    rounding to whole numbers.
    """
    given = spec.preprocessing
    if given.channels == 1:
        points = (points * points.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if given.per_image:
        made = whiten(points)
    else:
        mean, std = (points.new_tensor(values).view(1, -1, 1, 1) for values in (given.mean, given.std))
        made = (points / 255 - mean) / std
    return made.contiguous(memory_format=torch.channels_last) if spec.numerics.channels_last else made
