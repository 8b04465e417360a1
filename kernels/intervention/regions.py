"""Regions of a picture: a concept, the ring around each of its pieces, and all that is farther away."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
RING = 3
"""Pixels of a ring's width."""
MARGIN = 2
"""Pixels next to a region that are neither inside nor outside."""


class Spot(NamedTuple):
    """One piece of a concept and the ring around it, (y, x) each."""

    mask: Mask
    ring: Mask


def dilated(mask: Mask, steps: int) -> Mask:
    """Return a mask (y, x) grown by so many pixels, up, down, left and right."""
    from scipy import ndimage  # slow to import, and not needed to plan

    return ndimage.binary_dilation(mask, iterations=steps) if steps else mask.copy()


def spots(region: Mask, smallest: int, largest: float = 0.5) -> list[Spot]:
    """Return the connected pieces of a region (y, x), by edges, each with its ring; the ring leaves out the region.

    Parameters
    ----------
    smallest : pixels of a piece and, half as many, of its ring, below which it is left out.
    largest : share of the picture above which a piece is left out: it has no surroundings.
    """
    from scipy import ndimage

    pieces, count = ndimage.label(region)
    found = []
    for number in range(1, count + 1):
        mask = pieces == number
        ring = dilated(mask, RING) & ~region
        if smallest <= mask.sum() <= largest * region.size and ring.sum() >= smallest / 2:
            found.append(Spot(mask, ring))
    return found


def contrast(picture: NDArray[np.float64], spot: Spot) -> float:
    """Return the Euclidean distance between the mean colours of a piece and its ring, of a picture (channel, y, x)."""
    inside, around = (picture[:, mask].mean(1) for mask in spot)
    return float(np.linalg.norm(inside - around))


def distance(one: NDArray[np.float64], other: NDArray[np.float64], region: Mask) -> float:
    """Return the sum over a region of the mean absolute difference of channels, of pictures (channel, y, x)."""
    return float(np.abs(one - other).mean(0)[region].sum())


def stretched(maps: NDArray, size: tuple[int, int]) -> NDArray:
    """Return maps (..., y, x) at another size: position i of n takes the value at floor((i + 1/2) m / n) of m."""
    if maps.shape[-2:] == size:
        return maps
    rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(size, maps.shape[-2:], strict=True))
    return maps[..., rows[:, None], columns]
