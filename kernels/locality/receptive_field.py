"""Measure effective receptive fields: the pixels on which the output at the centre of a layer depends, and their reach.

The effective receptive field is |d (sum over units of the centre position) / d input|, averaged over images (Luo et
al., "Understanding the effective receptive field in deep convolutional neural networks", NeurIPS 2016; Raghu et al.,
"Do vision transformers see like convolutional neural networks?", NeurIPS 2021, section 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHARE = 1 - 0.9545  # of the maximum, above which a pixel counts: two standard deviations of a Gaussian


@dataclass(frozen=True)
class Extent:
    """How far a receptive field reaches, in pixels; all NaN if no pixel has any weight.

    Attributes
    ----------
    area : number of pixels above 1 - 0.9545 of the maximum.
    radius : of the disc of that area.
    deviation : (y, x), the standard deviation of the field as a distribution, about its own mean.
    """

    area: float
    radius: float
    deviation: tuple[float, float]


def centre(grid: tuple[int, int]) -> tuple[int, int]:
    """Return the centre position (y, x) of a grid.

    Of an even number of rows it is the lower of the two in the middle, of an even number of columns the right one. It
    is one position of the grid, whatever the grid's size, because the field of a mean of several positions would be
    larger.
    """
    return grid[0] // 2, grid[1] // 2


def extent(field: NDArray) -> Extent:
    """Compute area, radius and standard deviation of a receptive field (y, x) of non-negative weights."""
    field = np.asarray(field, np.float64)
    largest = field.max(initial=0)
    if not largest > 0:
        return Extent(math.nan, math.nan, (math.nan, math.nan))
    area = float(np.count_nonzero(field > SHARE * largest))
    deviations = []
    for axis in (0, 1):
        weight = field.sum(1 - axis) / field.sum()
        place = np.arange(len(weight))
        deviations.append(math.sqrt((weight * (place - weight @ place) ** 2).sum()))
    return Extent(area, math.sqrt(area / math.pi), (deviations[0], deviations[1]))
