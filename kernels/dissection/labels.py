"""Label single units from counts: the best concept, its held-out IoU, a confidence interval, and a ceiling.

Images are split into groups by a hash of their ids (`kernels.dissection.counts.GROUPS`), and every result follows from
the counts by group. Nothing is clamped away from zero; undefined values are NaN or 0, as each function says.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.dissection.counts import Counts, Union, area_seen, iou, ratio

CONFIDENCE = 0.95
NONE = -1  # the column of a unit that meets no concept


@dataclass(frozen=True)
class UnitLabels:
    """One row per unit; every array is (units,).

    Attributes
    ----------
    column : int64, the concept with the highest IoU, the first of equal ones; `NONE` if no IoU is above 0.
    iou : float64, that IoU.
    held_out, low, high, ceiling : float64, as the functions below return them.
    """

    column: NDArray[np.int64]
    iou: NDArray[np.float64]
    held_out: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    ceiling: NDArray[np.float64]


def label_units(counts: Counts, category: ArrayLike, union: Union = "all") -> UnitLabels:
    """Label each unit with its best concept.

    `category` (concepts,) and `union` are as for `kernels.dissection.counts.iou`.
    """
    column, best = best_concept(iou(counts, category, union))
    low, high = interval(counts, category, union, column)
    return UnitLabels(
        column,
        best,
        held_out(counts, category, union),
        low,
        high,
        ceiling(counts, category, union, column),
    )


def best_concept(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the column of each unit's highest IoU, the first of equal ones, and that IoU, from (units, concepts).

    A unit whose IoUs are all 0, for example one that never fires, has column `NONE` and IoU 0.
    """
    units, concepts = values.shape
    if concepts == 0:
        return np.full(units, NONE), np.zeros(units)
    column = values.argmax(axis=1)
    best = values[np.arange(units), column]
    return np.where(best > 0, column, NONE), best


def held_out(counts: Counts, category: ArrayLike, union: Union = "all") -> NDArray[np.float64]:
    """Compute IoU (units,) on the odd groups, of the concept that is best on the even groups: free of selection bias.

    NaN if no concept could be chosen; NaN for every unit if the odd groups hold no image.
    """
    column, _ = best_concept(iou(counts, category, union, slice(0, None, 2)))
    together, either = _by_group(counts, category, union, column)
    values = ratio(together[1::2].sum(axis=0), either[1::2].sum(axis=0), 0.0)
    return np.where((column == NONE) | (counts.pixels[1::2].sum() == 0), np.nan, values)


def interval(
    counts: Counts, category: ArrayLike, union: Union, column: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the confidence interval of IoU(unit, column) by the jackknife over groups: low and high ends (units,).

    Let theta_i be the IoU without group i, for the g groups that hold images. The standard error is sqrt((g - 1) / g *
    sum((theta_i - mean)^2)) (Efron & Tibshirani 1993, equation 11.5). The interval reaches the standard error times the
    quantile of Student's t with g - 1 degrees of freedom to either side, clipped to [0, 1]. NaN if there are fewer than
    two groups, or no concept.
    """
    held = counts.pixels > 0
    groups = int(held.sum())
    undefined = np.full(len(column), np.nan)
    if groups < 2:
        return undefined, undefined
    together, either = (values[held] for values in _by_group(counts, category, union, column))
    center = ratio(together.sum(axis=0), either.sum(axis=0), 0.0)
    without = ratio(together.sum(axis=0) - together, either.sum(axis=0) - either, 0.0)
    error = np.sqrt((groups - 1) / groups * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    reach = student_t(groups - 1) * error
    low, high = np.clip(center - reach, 0, 1), np.clip(center + reach, 0, 1)
    return np.where(column == NONE, np.nan, low), np.where(column == NONE, np.nan, high)


def ceiling(counts: Counts, category: ArrayLike, union: Union, column: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute the highest IoU (units,) that the areas allow: min(p, q) / max(p, q).

    The concept covers a share p of the pixels, and the unit is active at a share q of them. NaN if there is no concept.
    """
    if counts.concept_area.shape[1] == 0:
        return np.full(len(column), np.nan)
    place = np.asarray(category, np.int64)[column]
    unit = area_seen(counts, union).sum(axis=0)[np.arange(len(column)), place]
    concept = counts.concept_area.sum(axis=0)[column]
    return np.where(column == NONE, np.nan, ratio(np.minimum(unit, concept), np.maximum(unit, concept), np.nan))


def _by_group(
    counts: Counts, category: ArrayLike, union: Union, column: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return intersection and union (groups, units) of each unit with its column; arbitrary where that is `NONE`."""
    if counts.concept_area.shape[1] == 0:
        return counts.unit_area * 0, counts.unit_area
    units = np.arange(len(column))
    area = area_seen(counts, union)[:, units, np.asarray(category, np.int64)[column]]
    together = counts.intersection[:, units, column]
    return together, area + counts.concept_area[:, column] - together


@lru_cache(maxsize=64)
def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return the t with P(|T| <= t) = `confidence`, for Student's T with an integer number of degrees of freedom.

    The function solves the finite series of Abramowitz & Stegun (1964), 26.7.3 and 26.7.4, by bisection, in the angle
    theta = atan(t / sqrt(freedom)).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        low, high = (angle, high) if _inside(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _inside(angle: float, freedom: int) -> float:
    """Compute P(|T| <= sqrt(freedom) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
