"""Intervals of means and shares over images, and how well a number tells two groups of images apart."""

from __future__ import annotations

import math

import numpy as np


def mean_interval(values: np.ndarray, level: float) -> tuple[float, float, float, int]:
    """Return the mean of the known numbers, its interval of Student's t, and how many are known.

    `values` are (image,), NaN where an image has none. The interval is NaN with fewer than two.
    """
    from scipy.special import stdtrit  # imported late: whoever plans a run computes no interval

    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if known.size < 2:
        return (float(known[0]) if known.size else math.nan), math.nan, math.nan, int(known.size)
    half = float(stdtrit(known.size - 1, (1 + level) / 2)) * float(known.std(ddof=1)) / math.sqrt(known.size)
    mean = float(known.mean())
    return mean, mean - half, mean + half, int(known.size)


def share_interval(count: int, total: int, level: float) -> tuple[float, float]:
    """Return Wilson's interval of a share: "Probable inference, the law of succession" (JASA 1927). NaN without any."""
    from scipy.special import ndtri

    if not total:
        return math.nan, math.nan
    z = float(ndtri((1 + level) / 2))
    share, wide = count / total, z**2 / total
    middle = (share + wide / 2) / (1 + wide)
    half = math.sqrt(share * (1 - share) * wide + wide**2 / 4) / (1 + wide)
    return max(0.0, middle - half), min(1.0, middle + half)


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the probability that a positive has a higher score than a negative; ties count half.

    `scores` (image,) and bool `positive` (image,). NaN where one group is empty. Mann and Whitney (1947).
    """
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return math.nan
    others = np.sort(scores[~positive])
    below, through = (np.searchsorted(others, scores[positive], side) for side in ("left", "right"))
    return float((below + through).sum() / 2 / (positives * negatives))
