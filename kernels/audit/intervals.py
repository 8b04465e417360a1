"""Bootstrap intervals of any statistic of images."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

DRAWS = 1000
BLOCK = 2**22
"""Images that are drawn at a time, all draws together: as one array they would fill the memory."""
KEPT = 2**17
"""Images, all draws together, up to which draws are kept for the next measure of as many images."""


def resampled(
    statistic: Callable[[np.ndarray], float], count: int, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float, float]:
    """Return a statistic of images and its 95 % percentile interval over images drawn again.

    Efron, "Bootstrap methods: another look at the jackknife" (1979).

    Parameters
    ----------
    statistic : gives a number from indices of images, int64 (n,), that may repeat.
    count : how many images there are. draws : how often as many are drawn with replacement, from `seed`.

    Returns
    -------
    value : of all images, each once; NaN without images.
    low, high : 2.5 and 97.5 % quantiles of the numbers that are known; NaN with fewer than two images.
    """
    if not count:
        return np.nan, np.nan, np.nan
    value = float(statistic(np.arange(count)))
    if count < 2:
        return value, np.nan, np.nan
    random = np.random.default_rng(seed)
    found = np.array([statistic(random.integers(0, count, count)) for _ in range(draws)], np.float64)
    known = found[~np.isnan(found)]
    if not known.size:
        return value, np.nan, np.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return value, float(low), float(high)


@functools.lru_cache(maxsize=32)
def _drawn(count: int, seed: int, draws: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (draws, count))


def mean_interval(values: np.ndarray, seed: int = 0, draws: int = DRAWS) -> tuple[float, float, float, int]:
    """Return the mean of the numbers that are known, its 95 % bootstrap interval, and how many are known.

    `values` are (image,), NaN where an image has none.
    """
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if not known.size:
        return np.nan, np.nan, np.nan, 0
    if known.size < 2:
        return float(known.mean()), np.nan, np.nan, 1
    if known.size * draws <= KEPT:
        means = known[_drawn(known.size, seed, draws)].mean(1)
    else:
        random, block = np.random.default_rng(seed), max(1, BLOCK // known.size)
        blocks = [min(block, draws - at) for at in range(0, draws, block)]
        means = np.concatenate([known[random.integers(0, known.size, (rows, known.size))].mean(1) for rows in blocks])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(known.mean()), float(low), float(high), int(known.size)
