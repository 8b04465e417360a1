"""What a map says of the objects of an image: sums in their masks, and what lies outside.

An instance map (y, x) holds k + 1 where object k is seen, and 0 elsewhere.
"""

from __future__ import annotations

import numpy as np


def areas(instances: np.ndarray, objects: int) -> np.ndarray:
    """Count the pixels in which each object is seen, int64 (object,)."""
    return np.bincount(instances.ravel(), minlength=objects + 1)[1:]


def sums(values: np.ndarray, instances: np.ndarray, objects: int) -> np.ndarray:
    """Add up a map (y, x) over the pixels of each object, float64 (object,); 0 of one that is not seen."""
    return np.bincount(instances.ravel(), np.asarray(values, np.float64).ravel(), minlength=objects + 1)[1:]


def outside(values: np.ndarray, instances: np.ndarray) -> float:
    """Return the share of a map's magnitude (y, x) that lies outside all objects; NaN of a map that is 0."""
    magnitude = np.abs(np.asarray(values, np.float64))
    total = magnitude.sum()
    return float(magnitude[instances == 0].sum() / total) if total > 0 else float("nan")


def ring(mask: np.ndarray, width: int) -> np.ndarray:
    """Return the pixels around a mask, bool (y, x): at most `width` steps away, each of them to one of 8 neighbours."""
    grown = mask
    for _ in range(width):
        wide = np.pad(grown, ((0, 0), (1, 1)))
        grown = wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]
        high = np.pad(grown, ((1, 1), (0, 0)))
        grown = high[:-2] | high[1:-1] | high[2:]
    return grown & ~mask


def filled(image: np.ndarray, mask: np.ndarray, width: int) -> np.ndarray | None:
    """Fill a mask with the mean colour of its ring, uint8 (channel, y, x) like the image; None where it has no ring."""
    around = ring(mask, width)
    if not mask.any() or not around.any():
        return None
    found = image.copy()
    found[:, mask] = np.round(image[:, around].mean(1, dtype=np.float64)).astype(image.dtype)[:, None]
    return found
