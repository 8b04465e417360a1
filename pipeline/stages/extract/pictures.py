"""What pictures of a unit show: its images with the highest maxima, and a histogram of its values on some images.

The report uses it on stored maps; passes over streamed layers use it to keep only the maps that pictures need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ROWS_AT_ONCE = 8192
"""Images whose maxima are read at once: bounds memory at 50,000 images x thousands of units."""
SAMPLE = 256
"""Images that the histograms are made of: the first ones, which are a random sample as images lie in random order."""
BINS = 32
KEPT = 12
"""Images of a unit whose maps are kept where the layer is not stored: a report shows no more of it."""


def top_images(maximum: Any, units: Sequence[int], shown: np.ndarray, count: int) -> tuple[list[list[int]], np.ndarray]:
    """Find the images with the highest maxima of each unit, and the highest maximum of all.

    Parameters
    ----------
    maximum : array (image, unit) float32, NaN where an image was not extracted.
    shown : (image,) bool, the images that may be shown.

    Returns
    -------
    one list of images per unit, highest first, ties by image number; and (unit,) float32: the highest maximum, NaN if
        there is none
    """
    columns = np.asarray(units)
    length = min(maximum.shape[0], len(shown))
    values, images = np.empty((0, len(columns)), np.float32), np.empty((0, len(columns)), np.int64)
    for start in range(0, length, ROWS_AT_ONCE):
        rows = np.flatnonzero(shown[start : min(start + ROWS_AT_ONCE, length)])
        if not len(rows):
            continue
        # By row: a shard without any of them may not have been extracted.
        block = np.asarray(maximum[start + rows, int(columns[0]) : int(columns[-1]) + 1])[:, columns - columns[0]]
        values = np.concatenate([values, block])
        images = np.concatenate([images, np.broadcast_to(start + rows[:, None], block.shape)])
        # The sort is stable and images come in order, so of equal maxima the earlier image stays before the later.
        order = np.argsort(np.where(np.isnan(values), np.inf, -values), axis=0, kind="stable")[:count]
        values, images = np.take_along_axis(values, order, 0), np.take_along_axis(images, order, 0)
    found = [
        [int(image) for image, value in zip(images[:, place], values[:, place], strict=True) if value == value]
        for place in range(len(columns))
    ]
    return found, values[0] if len(values) else np.full(len(columns), np.nan, np.float32)


def bins_of(values: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """Return each float32 value's bin, of `BINS` equal ones from `low` to `high`, which broadcast."""
    width = np.where(high > low, high - low, np.float32(1))
    return ((values - low) * (BINS / width)).astype(np.int64).clip(0, BINS - 1)


def sample_of(shown: np.ndarray) -> np.ndarray:
    """Return the images of the histograms, among those that may be shown (image,) bool."""
    return np.flatnonzero(shown)[:SAMPLE]


def facts(shown: Mapping[str, np.ndarray], unit: int) -> tuple[list[int], float, float]:
    """Return counts and range of a unit's histogram, from a store of kept maps; no counts without a value."""
    low, high = float(shown["low"][unit]), float(shown["high"][unit])
    return (shown["histogram"][unit].tolist() if low == low else []), low, high
