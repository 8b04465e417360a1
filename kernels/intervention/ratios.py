"""Ratios of sums over images, with bootstrap intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000


class Ratio(NamedTuple):
    """A ratio and its 95 % interval over images, (column,) each; NaN where the denominator is 0."""

    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def ratio_of_sums(part: NDArray[np.float64], whole: NDArray[np.float64], seed: int = 0, draws: int = DRAWS) -> Ratio:
    """Return the sum of `part` over images by that of `whole`, with the percentile interval of images drawn again.

    Every column sees the same draws. Efron, "Bootstrap methods: another look at the jackknife" (1979).

    Parameters
    ----------
    part, whole : (image, column). An image that is NaN in one of them does not count for that column.
    """
    known = ~(np.isnan(part) | np.isnan(whole))
    above, below = np.where(known, part, 0.0), np.where(known, whole, 0.0)
    images = len(above)
    value = _over(above.sum(0), below.sum(0))
    if images < 2:
        empty = np.full(value.shape, np.nan)
        return Ratio(value, empty, empty)
    random = np.random.default_rng(seed)
    drawn = (np.bincount(random.integers(0, images, images), minlength=images) for _ in range(draws))
    times = np.stack([each.astype(np.float64) for each in drawn])
    found = _over(times @ above, times @ below)
    low, high = (np.full(value.shape, np.nan) for _ in range(2))
    for at in np.flatnonzero(~np.isnan(value)).tolist():
        column = found[:, at][~np.isnan(found[:, at])]
        if column.size:
            low[at], high[at] = np.quantile(column, [0.025, 0.975])
    return Ratio(value, low, high)


def _over(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole != 0)
