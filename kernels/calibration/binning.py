"""Fit maps from a probability to a calibrated one: histogram binning, isotonic regression, and BBQ.

Each map is fitted on scores and outcomes: an outcome is whether the event came true whose probability the score states.
Sources: Zadrozny and Elkan (ICML 2001; KDD 2002) for the first two; for BBQ, Naeini, Cooper and Hauskrecht, "Obtaining
Well Calibrated Probabilities Using Bayesian Binning" (AAAI 2015). Where that paper leaves a rule open, BBQ follows its
authors' program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.calibration.reliability import Floats, Ints, equal_width, mass_edges, width_edges

Outcomes = NDArray[np.bool_]

ALIKE = float(np.finfo(np.float64).resolution)
"""Isotonic regression treats scores that differ by less than this as equal."""
ELBOW = 0.001
"""BBQ keeps binnings, best first, until two relative likelihoods differ by no more than this share of their variance.
"""
PRIOR = 5e-3
"""BBQ keeps a bin's prior probability, the middle of its scores, at least this far from 0 and 1."""


@dataclass(frozen=True)
class Steps:
    """A step function: `values[i]` between two edges.

    Attributes
    ----------
    edges : increasing; one fewer than values.
    values : calibrated probabilities.
    side : as in `numpy.searchsorted`: with `left` an edge belongs to the step below it, with `right` to the step above.
    """

    edges: Floats
    values: Floats
    side: str = "left"

    def __call__(self, scores: NDArray) -> Floats:
        return self.values[np.searchsorted(self.edges, scores, self.side)]  # type: ignore[call-overload]


def histogram_equal_width(scores: NDArray, outcomes: Outcomes, bins: int) -> Steps:
    """Fit the share of outcomes in the bins (m / M, (m + 1) / M]; an empty bin takes its middle.

    The edges are those of the scores' precision.
    """
    at = equal_width(scores, bins)
    count = np.bincount(at, minlength=bins)
    middle = (np.arange(bins) + 0.5) / bins
    values = np.where(count, np.bincount(at, outcomes, minlength=bins) / np.maximum(count, 1), middle)
    return Steps(width_edges(bins, scores.dtype)[1:-1].astype(np.float64), values)


def histogram_equal_mass(scores: NDArray, outcomes: Outcomes, bins: int) -> Steps:
    """Fit the share of outcomes in bins that hold equally many scores.

    Equal scores share a bin, so no bin is empty.
    """
    edges = mass_edges(scores, min(bins, len(scores))).astype(np.float64)
    at = np.searchsorted(edges, scores, side="left")
    return Steps(edges, np.bincount(at, outcomes) / np.bincount(at))


def isotonic(scores: NDArray, outcomes: Outcomes) -> Line:
    """Fit the increasing function with the least squared error, linear between the scores.

    scikit-learn calls the same function of scipy, so the fit is the same, but importing scikit-learn takes two seconds
    in every worker. As in scikit-learn, a score that lies less than `ALIKE` above another counts as that score.
    """
    from scipy.optimize import isotonic_regression

    x, at, count = np.unique(scores.astype(np.float64), return_inverse=True, return_counts=True)
    if (np.diff(x) < ALIKE).any():
        kept = [0]
        for i in range(1, len(x)):
            if x[i] - x[kept[-1]] >= ALIKE:
                kept.append(i)
        at = (np.searchsorted(kept, np.arange(len(x)), side="right") - 1)[at]
        x, count = x[kept], np.bincount(at)
    y = isotonic_regression(np.bincount(at, outcomes) / count, weights=count).x
    # The ends of a run of equal values suffice; with one map per class, the rest would outgrow the logits.
    changes = np.concatenate([[True], np.diff(y) != 0, [True]])
    ends = changes[:-1] | changes[1:]
    return Line(x[ends], y[ends])


@dataclass(frozen=True)
class Line:
    """Straight lines between points, constant before the first and after the last."""

    x: Floats
    y: Floats

    def __call__(self, scores: NDArray) -> Floats:
        return np.interp(scores, self.x, self.y)


# BBQ ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Average:
    """A weighted mean of step functions; the weights sum to 1."""

    parts: tuple[Steps, ...]
    weights: Floats

    def __call__(self, scores: NDArray) -> Floats:
        found = np.zeros(len(scores))
        for part, weight in zip(self.parts, self.weights, strict=True):
            found += weight * part(scores)
        return found


@dataclass(frozen=True)
class Binning:
    """An equal-frequency binning and its Bayesian score, the logarithm of its marginal likelihood."""

    steps: Steps
    score: float


def bbq(scores: NDArray, outcomes: Outcomes) -> Average:
    """Fit the mean of equal-frequency binnings, weighted by their BDeu score.

    The binnings have from max(1, n^(1/3) / 10) to min(n / 5, 10 n^(1/3)) bins. Each bin has two pseudo-counts, divided
    according to the middle of its scores. The elbow rule prunes the binnings.
    """
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order].astype(np.float64), np.concatenate([[0], np.cumsum(outcomes[order])])
    weighted = np.concatenate([[0.0], np.cumsum(np.where(outcomes[order], ordered, 0.0))])
    images = len(ordered)
    root = images ** (1 / 3)
    fewest, most = max(1, math.floor(root / 10)), min(math.ceil(images / 5), math.ceil(10 * root))
    tied = bool((ordered[1:] == ordered[:-1]).any())
    binnings = [binning(ordered, positive, weighted, bins, tied) for bins in range(fewest, max(fewest, most) + 1)]
    score = np.array([each.score for each in binnings])
    likelihood = np.exp(score - score.max())
    kept = elbow(likelihood)
    weights = likelihood[kept]
    return Average(tuple(binnings[at].steps for at in kept), weights / weights.sum())


def binning(ordered: Floats, positive: Ints, weighted: Floats, bins: int, tied: bool) -> Binning:
    """Bin scores that are sorted in increasing order.

    Each bin holds floor(n / bins) scores, and the last one also the rest. A bin absorbs the next bins as long as they
    end in the score that it begins with. Its value is the share of outcomes with one pseudo-count; the pseudo-count is
    the mean of the middle of the bin and of its scores that came true.

    Parameters
    ----------
    ordered : (n), the scores.
    positive : (n + 1), how many of the first i came true.
    weighted : (n + 1), the sum of the scores among the first i that came true.
    tied : whether any two scores are equal.
    """
    size = len(ordered) // bins
    last = np.append(np.arange(1, bins) * size, len(ordered)) - 1
    stop = last + 1
    if tied:
        kept, at = [], 0
        while at < bins:
            begin = ordered[stop[at - 1]] if at else ordered[0]
            at = max(at, int(np.searchsorted(ordered[last], begin, side="right")) - 1)
            kept.append(at)
            at += 1
        stop = stop[kept]
    start = np.concatenate([[0], stop[:-1]])
    cuts = (ordered[stop[:-1] - 1] + ordered[stop[:-1]]) / 2
    middle = (np.concatenate([[0.0], cuts]) + np.concatenate([cuts, [1.0]])) / 2
    count, true = stop - start, positive[stop] - positive[start]
    value = (weighted[stop] - weighted[start] + middle) / (true + 1)
    return Binning(Steps(cuts, (true + value) / (count + 1), "right"), bdeu(count, true, middle))


def bdeu(count: Ints, true: Ints, middle: Floats) -> float:
    """Compute the log marginal likelihood of outcomes in bins; the prior is Beta(2 p, 2 (1 - p)), with p the middle."""
    from scipy.special import gammaln

    prior = 2 * np.clip(middle, PRIOR, 1 - PRIOR)
    other = 2 - prior
    terms = gammaln(true + prior) + gammaln(count - true + other) - gammaln(count + 2.0)
    return float((terms - gammaln(prior) - gammaln(other)).sum())


def elbow(likelihood: Floats) -> Ints:
    """Choose the binnings to keep, best first.

    The rule starts at the best binning, passes those equal to it, and continues until the next binning is less likely
    by no more than `ELBOW` of the variance. It leaves out the binning at which it stops, unless that is the only one.
    """
    order = np.argsort(-likelihood, kind="stable")
    ordered, variance = likelihood[order], likelihood.var()
    last = len(ordered) - 1
    at = 0
    while at < last and ordered[at] == ordered[at + 1]:
        at += 1
    while at < last and ordered[at] - ordered[at + 1] > ELBOW * variance:
        at += 1
    return order[: max(1, at)]
