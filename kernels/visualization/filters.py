"""What the filters of a first convolution are worth: dead ones, near-duplicates, and those that alias.

Zeiler and Fergus, "Visualizing and understanding convolutional networks" (ECCV 2014), section 4.1, compare the first
layers of two networks by eye, 11 x 11 at stride 4 with 7 x 7 at stride 2. These numbers do it by measure.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DEAD = 0.01
"""Share of the median norm of a layer's filters below which one counts as dead."""
ALIKE = 0.95
"""Absolute cosine of two filters above which they are near-duplicates."""
GRID = 64
"""Side of the grid of frequencies on which the energy of a filter is measured."""


def norms(filters: NDArray) -> NDArray[np.float64]:
    """Return the Euclidean norm of each filter (filter, channel, y, x), (filter,)."""
    return np.sqrt((np.asarray(filters, np.float64).reshape(len(filters), -1) ** 2).sum(1))


def dead(filters: NDArray) -> NDArray[np.bool_]:
    """Return which filters are dead: those whose norm is below `DEAD` of the median, or 0."""
    found = norms(filters)
    return (found <= DEAD * np.median(found)) | (found == 0)


def nearest(filters: NDArray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the other filter most alike each one, and |cosine| of the two; -1 and NaN for a filter of zeros or alone.

    A filter and its negative are duplicates too: a ReLU after both splits one response in two. Ties by number.
    """
    flat = np.asarray(filters, np.float64).reshape(len(filters), -1)
    length = norms(filters)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = flat / length[:, None]
    cosine = np.abs(unit @ unit.T)
    np.fill_diagonal(cosine, np.nan)
    at, value = np.full(len(flat), -1, np.int64), np.full(len(flat), np.nan)
    for row in range(len(flat)):
        if not np.isnan(cosine[row]).all():
            at[row] = int(np.nanargmax(cosine[row]))
            value[row] = min(cosine[row, at[row]], 1.0)
    return at, value


def aliasing(filters: NDArray, stride: tuple[int, int]) -> NDArray[np.float64]:
    """Return the share of each filter's energy above the Nyquist frequency of the stride, (filter,); NaN without any.

    A map sampled every s pixels along an axis can tell frequencies up to 1 / (2 s) of a cycle a pixel; what the filter
    passes above that along either axis appears as a lower one. The energy is that of the discrete Fourier transform on
    a grid of `GRID` frequencies a side, or more if the filter is larger.
    """
    values = np.asarray(filters, np.float64)
    side = max(GRID, *values.shape[2:])
    energy = (np.abs(np.fft.fft2(values, s=(side, side))) ** 2).sum(1)
    frequency = np.abs(np.fft.fftfreq(side))
    above = (frequency[:, None] > 0.5 / stride[0]) | (frequency[None] > 0.5 / stride[1])
    total = energy.sum((1, 2))
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, (energy * above).sum((1, 2)) / total, np.nan)
