"""How well the relevance of units for a class predicts what the class loses without each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kernels.attribution.agreement import rank_correlation

FIELLER = 1.06
"""Variance of Fisher's z of a rank correlation, times n - 3: Fieller, Hartley and Pearson (1957)."""


def agreement(relevance: np.ndarray, loss: np.ndarray, images: Sequence[np.ndarray]) -> np.ndarray:
    """Return the rank correlation of relevance and loss over units, for each class, float64 (class,).

    Parameters
    ----------
    relevance : (image, unit). loss : (unit, class), without each unit.
    images : of each class, int64 indices, over which its relevance is averaged; may repeat. NaN for a class without.
    """
    found = np.full(len(images), np.nan)
    there = [c for c, rows in enumerate(images) if len(rows)]
    if there:
        means = np.stack([relevance[images[c]].mean(0) for c in there])
        found[there] = rank_correlation(means, loss.T[there])
    return found


def spread(relevance: np.ndarray, loss: np.ndarray, draws: int, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval, over images, of the rank correlation of mean relevance and loss.

    `relevance` is (image, unit) of one class, `loss` (unit,). NaN with fewer than two images.
    """
    count = len(relevance)
    if count < 2:
        return math.nan, math.nan
    rows = np.random.default_rng(seed).integers(0, count, (draws, count))
    means = relevance[rows].mean(1)
    found = rank_correlation(means, np.broadcast_to(loss, means.shape))
    known = found[~np.isnan(found)]
    if not known.size:
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def overlap(relevance: np.ndarray, loss: np.ndarray, top: int) -> float:
    """Return which share of the units with the greatest loss (unit,) is among those with the greatest relevance.

    Of equal values, the first unit counts as greater. NaN where nothing is lost by any unit.
    """
    if not (loss > 0).any():
        return math.nan
    count = min(top, len(loss))
    first, second = (set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (relevance, loss))
    return len(first & second) / count


def chance(correlation: float, units: int) -> float:
    """Return how probable a rank correlation of such magnitude is over so many units that have nothing in common.

    From the normal distribution of Fisher's z. NaN for fewer than four units.
    """
    if units < 4 or math.isnan(correlation):
        return math.nan
    if abs(correlation) >= 1:
        return 0.0
    return math.erfc(abs(math.atanh(correlation)) * math.sqrt((units - 3) / FIELLER) / math.sqrt(2))


def holm(probabilities: np.ndarray) -> np.ndarray:
    """Return probabilities (test,) corrected for their number; NaN stays and counts as no test.

    Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    found = np.full(len(probabilities), np.nan)
    known = np.flatnonzero(~np.isnan(probabilities))
    order = known[np.argsort(probabilities[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    found[order] = np.minimum(1.0, np.maximum.accumulate(probabilities[order] * factors))
    return found


def shares(values: np.ndarray, concepts: Sequence[str]) -> dict[str, float]:
    """Return the share of each concept in the positive values (unit,), the largest first; empty if none is positive."""
    positive = np.maximum(values, 0)
    total = positive.sum()
    if not total > 0:
        return {}
    found: dict[str, float] = {}
    for concept, value in zip(concepts, positive, strict=True):
        found[concept] = found.get(concept, 0.0) + float(value / total)
    return dict(sorted(found.items(), key=lambda each: (-each[1], each[0])))
