"""Which units are removed: the best of a ranking, and random ones that are as active."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NEAREST = 3


def order_of(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return units by falling score (unit,); of equal scores, the lower number first; NaN last."""
    return np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")


def alike(best: NDArray[np.int64], means: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.int64]:
    """Return as many other units as `best` has, each drawn among the three that are closest to one of them in mean.

    Parameters
    ----------
    means : (unit,) mean activation.

    Raises
    ------
    ValueError
        Fewer other units than `best` has.
    """
    left = np.setdiff1d(np.arange(len(means)), best)
    if len(left) < len(best):
        raise ValueError(f"{len(left)} other units for {len(best)}: expected as many")
    found = []
    for unit in best.tolist():
        near = left[np.argsort(np.abs(means[left] - means[unit]), kind="stable")[:NEAREST]]
        chosen = int(near[random.integers(len(near))])
        found.append(chosen)
        left = left[left != chosen]
    return np.array(found, np.int64)
