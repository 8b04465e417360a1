"""How far the objects of an image stand in the same order by a map and by a truth."""

from __future__ import annotations

import numpy as np

from kernels.attribution.agreement import standard_ranks

DETERMINED = 1e-9
"""Share of the variance of ranks below which nothing is left of them besides what a third quantity determines."""


def partial_rank_correlation(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
    """Compute the rank correlation of two values of objects (object,), with a third value partialled out.

    That is the correlation of what is left of both ranks after the best linear prediction from the ranks of the third:
    (r_ab - r_ac r_bc) / sqrt((1 - r_ac^2)(1 - r_bc^2)). Equal values share their mean rank. NaN where a value is
    constant, or where the third determines the ranks of one of them.

    Kendall and Gibbons, "Rank correlation methods" (1990), chapter 8.
    """
    first, second, third = standard_ranks(np.stack([a, b, given]).astype(np.float64))
    ab, ac, bc = first @ second, first @ third, second @ third
    left = (1 - ac**2, 1 - bc**2)
    if not min(left) > DETERMINED:
        return float("nan")
    return float(np.clip((ab - ac * bc) / np.sqrt(left[0] * left[1]), -1, 1))


def found(values: np.ndarray, truth: np.ndarray) -> float:
    """Return whether the greatest value is that of the object with the greatest truth, from two (object,).

    1 or 0; where several share the greatest value, the share of them that has the greatest truth. NaN where a value is
    not finite.
    """
    if not (np.isfinite(values).all() and np.isfinite(truth).all()):
        return float("nan")
    return float((truth[values == values.max()] == truth.max()).mean())
