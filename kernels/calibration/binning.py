"""Maps from one probability to a calibrated one: histogram binning, isotonic regression, and BBQ.

Each is fitted on scores and on whether what they are the probability of came true. Sources: Zadrozny and Elkan (ICML
2001; KDD 2002) for the first two; for BBQ Naeini, Cooper and Hauskrecht, "Obtaining Well Calibrated Probabilities Using
Bayesian Binning" (AAAI 2015), with the rules of its authors' program where the paper leaves them open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.calibration.reliability import Floats, Ints, equal_width, mass_edges

Outcomes = NDArray[np.bool_]

ALIKE = float(np.finfo(np.float64).resolution)
"""Of isotonic regression: scores that differ by less are one."""
ELBOW = 0.001
"""Of BBQ: binnings are kept, best first, until two relative likelihoods differ by no more than this share of their
variance."""
PRIOR = 5e-3
"""Of BBQ: a bin's prior probability, the middle of its scores, is kept so far from 0 and 1."""


@dataclass(frozen=True)
class Steps:
    """A step function: `values[i]` between two edges.

    Attributes
    ----------
    edges : increasing; one fewer than values.
    values : calibrated probabilities.
    side : of `numpy.searchsorted`: `left` if an edge belongs to what lies below it, `right` if above.
    """

    edges: Floats
    values: Floats
    side: str = "left"

    def __call__(self, scores: Floats) -> Floats:
        return self.values[np.searchsorted(self.edges, scores, self.side)]  # type: ignore[call-overload]


def histogram_equal_width(scores: Floats, outcomes: Outcomes, bins: int) -> Steps:
    """The share of outcomes in bins (m / M, (m + 1) / M]; an empty bin gives its middle."""
    at = equal_width(scores, bins)
    count = np.bincount(at, minlength=bins)
    middle = (np.arange(bins) + 0.5) / bins
    values = np.where(count, np.bincount(at, outcomes, minlength=bins) / np.maximum(count, 1), middle)
    return Steps(np.arange(1, bins) / bins, values)


def histogram_equal_mass(scores: Floats, outcomes: Outcomes, bins: int) -> Steps:
    """The share of outcomes in bins that hold as many scores each; equal scores share a bin, so that none is empty."""
    edges = mass_edges(scores, min(bins, len(scores)))
    at = np.searchsorted(edges, scores, side="left")
    return Steps(edges, np.bincount(at, outcomes) / np.bincount(at))


def isotonic(scores: Floats, outcomes: Outcomes) -> Line:
    """The increasing function with the least squared error, linear between the scores: scikit-learn's, by scipy.

    scikit-learn calls the same function; importing it takes two seconds of every worker. As there, scores that lie less
    than `ALIKE` above another are counted as that one.
    """
    from scipy.optimize import isotonic_regression

    x, at, count = np.unique(scores, return_inverse=True, return_counts=True)
    if (np.diff(x) < ALIKE).any():
        kept = [0]
        for i in range(1, len(x)):
            if x[i] - x[kept[-1]] >= ALIKE:
                kept.append(i)
        at = (np.searchsorted(kept, np.arange(len(x)), side="right") - 1)[at]
        x, count = x[kept], np.bincount(at)
    y = isotonic_regression(np.bincount(at, outcomes) / count, weights=count).x
    # Of a run of equal values the ends say all; with as many maps as classes the rest would outgrow the logits.
    changes = np.concatenate([[True], np.diff(y) != 0, [True]])
    ends = changes[:-1] | changes[1:]
    return Line(x[ends], y[ends])


@dataclass(frozen=True)
class Line:
    """Straight lines between points, constant beyond the first and last."""

    x: Floats
    y: Floats

    def __call__(self, scores: Floats) -> Floats:
        return np.interp(scores, self.x, self.y)


# BBQ ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Average:
    """A weighted mean of step functions; the weights sum to 1."""

    parts: tuple[Steps, ...]
    weights: Floats

    def __call__(self, scores: Floats) -> Floats:
        found = np.zeros(len(scores))
        for part, weight in zip(self.parts, self.weights, strict=True):
            found += weight * part(scores)
        return found


@dataclass(frozen=True)
class Binning:
    """One binning of equal frequency and its Bayesian score, the logarithm of its marginal likelihood."""

    steps: Steps
    score: float


def bbq(scores: Floats, outcomes: Outcomes) -> Average:
    """The mean of binnings of equal frequency, weighted by their BDeu score.

    From max(1, n^(1/3) / 10) to min(n / 5, 10 n^(1/3)) bins; two pseudo-counts a bin, shared by the middle of its
    scores; pruned by the elbow rule.
    """
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], np.concatenate([[0], np.cumsum(outcomes[order])])
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
    """A binning of scores in order, `positive[i]` of whose first i came true, with scores that sum to `weighted[i]`.

    Each bin holds floor(n / bins), the last one what is left. A bin swallows the next ones while these end in the score
    that it begins with. Its value is the share of outcomes with one pseudo-count, which is the mean of the scores that
    came true and the middle of the bin.
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
    """The logarithm of the marginal likelihood of outcomes in bins, with a Beta(2 p, 2 (1 - p)) prior, p the middle."""
    from scipy.special import gammaln

    prior = 2 * np.clip(middle, PRIOR, 1 - PRIOR)
    other = 2 - prior
    terms = gammaln(true + prior) + gammaln(count - true + other) - gammaln(count + 2.0)
    return float((terms - gammaln(prior) - gammaln(other)).sum())


def elbow(likelihood: Floats) -> Ints:
    """The binnings to keep, best first.

    From the best on, those equal to it first, until the next one is less likely by no more than `ELBOW` of the
    variance; the one where that happens is left out, if it is not the only one.
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
