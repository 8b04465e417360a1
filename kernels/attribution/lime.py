"""Local surrogate models of a function of binary vectors: Ribeiro et al., "Why should I trust you?" (KDD 2016).

A surrogate g minimises sum over samples z of pi(z) (f(z) - g(z))^2, where the weight pi(z) = exp(-D^2 / sigma^2) falls
with the distance D of z from the whole (eqs. 1 and 2 of the paper). All functions take and return float64 of numpy, of
one input: others change no bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kernels.attribution.agreement import rank_correlation

Distance = Literal["cosine", "l2"]
Selection = Literal["forward", "lasso"]
TIE = 1e-12
"""Relative difference below which two are equal."""


def mask_distance(masks: np.ndarray, distance: Distance) -> np.ndarray:
    """Compute the distance of masks, bool (sample, feature), from the whole, (sample,): 0 for the whole, 1 for nothing.

    With k of M features present, 1 - sqrt(k / M) (cosine) or sqrt(1 - k / M) (L2, in units of the largest).
    """
    share = masks.sum(1) / masks.shape[1] if masks.shape[1] else np.ones(len(masks))
    return 1 - np.sqrt(share) if distance == "cosine" else np.sqrt(1 - share)


def input_distance(masks: np.ndarray, products: np.ndarray, distance: Distance) -> np.ndarray:
    """Compute the distance of masked inputs from the input x itself, (sample,).

    Cosine, or L2 in units of the distance of x from the baseline x0.

    Parameters
    ----------
    products : (3, feature + 1), sums over the values of each feature of x x, x x0 and x0 x0; the last column is that of
        values that are the same in all samples.
    """
    own, mixed, other = products[:, :-1]
    rest = products[:, -1]
    present, absent = masks.astype(np.float64), 1.0 - masks
    if distance == "l2":
        apart = np.maximum(own - 2 * mixed + other, 0)
        return np.sqrt(absent @ apart / apart.sum()) if apart.sum() else np.zeros(len(masks))
    along = present @ own + absent @ mixed + rest[0]
    length = np.sqrt((present @ own + absent @ other + rest[0]) * (own.sum() + rest[0]))
    return 1 - np.divide(along, length, out=np.ones(len(masks)), where=length > 0)


def proximity(distance: np.ndarray, width: float) -> np.ndarray:
    """Compute pi = exp(-D^2 / width^2): section 3.3 of the paper. Its published code takes the square root of this."""
    return np.exp(-((distance / width) ** 2))


@dataclass(frozen=True)
class Local:
    """A surrogate model of one function.

    Attributes
    ----------
    weights : of each feature, (feature,). intercept : of the model.
    fit : weighted R^2 on the samples, NaN where the function is constant.
    split, mean : of a tree, (node,), 2^(depth + 1) - 1 of them: the feature that parts a node, -1 in a leaf, and the
        weighted mean of its samples, NaN where there is no such node. Node k goes on at 2k + 1 where the feature is
        absent, at 2k + 2 where it is present.
    """

    weights: np.ndarray
    intercept: float
    fit: float
    split: np.ndarray | None = None
    mean: np.ndarray | None = None


def linear(
    masks: np.ndarray,
    values: np.ndarray,
    weight: np.ndarray,
    ridge: float = 0.0,
    features: int | None = None,
    selection: Selection = "forward",
) -> Local:
    """Fit f(z) = b + w z by weighted ridge regression: minimise sum weight (f - b - w z)^2 + ridge |w|^2.

    With `ridge` 0, these are the least squares of the paper, the smallest w of several. With `features`, at most so
    many weights are not 0: those that `selection` chooses.

    Parameters
    ----------
    masks : bool (sample, feature). values, weight : (sample,).
    """
    share = weight / weight.sum()
    mean, level = share @ masks, _level(values, weight)
    x, y = masks - mean, values - level
    gram, towards = (x * weight[:, None]).T @ x, x.T @ (weight * y)
    chosen = list(range(masks.shape[1]))
    if features is not None and features < len(chosen):
        chosen = (_forward if selection == "forward" else _lasso)(gram, towards, features, ridge)
    found = np.zeros(masks.shape[1])
    found[chosen] = _solved(gram, towards, chosen, ridge)
    return Local(found, float(level - mean @ found), _fit(y, x @ found, weight))


def _solved(gram: np.ndarray, towards: np.ndarray, chosen: list[int], ridge: float) -> np.ndarray:
    own = gram[np.ix_(chosen, chosen)]
    if ridge > 0:
        return np.linalg.solve(own + ridge * np.eye(len(chosen)), towards[chosen])
    return np.linalg.lstsq(own, towards[chosen], rcond=1e-12)[0]


def _level(values: np.ndarray, weight: np.ndarray) -> float:
    """Return the weighted mean; of equal values, their value exactly."""
    return float(values[0] + weight @ (values - values[0]) / weight.sum())


def _fit(values: np.ndarray, model: np.ndarray, weight: np.ndarray) -> float:
    """Return the weighted R^2 of a model of values whose weighted mean is 0."""
    around = float(weight @ values**2)
    return 1 - float(weight @ (values - model) ** 2) / around if around > 0 else math.nan


def _forward(gram: np.ndarray, towards: np.ndarray, features: int, ridge: float) -> list[int]:
    """Choose features one by one: the one that leaves the smallest error beside those that are chosen."""
    chosen: list[int] = []
    for _ in range(features):
        gains = np.full(len(gram), -np.inf)
        for j in set(range(len(gram))) - set(chosen):
            own = [*chosen, j]
            found = _solved(gram, towards, own, ridge)
            gains[j] = 2 * found @ towards[own] - found @ gram[np.ix_(own, own)] @ found
        chosen.append(int(gains.argmax()))
    return sorted(chosen)


def _lasso(gram: np.ndarray, towards: np.ndarray, features: int, ridge: float) -> list[int]:
    """Choose the features that the lasso has at the smallest penalty at which it has at most so many."""
    best: list[int] = []
    for _, weights in lasso_path(gram, towards):
        own = np.flatnonzero(weights).tolist()
        if len(own) <= features:
            best = own
    return best


def lasso_path(gram: np.ndarray, towards: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Return all knots of the lasso, (penalty, weights (feature,)), from the one with all weights 0 on.

    The weights minimise 1/2 w G w - c w + penalty |w|_1, for G = `gram` and c = `towards`, and are linear between
    knots. Least angle regression with the lasso's change: Efron et al., "Least angle regression" (Annals of Statistics
    2004), section 3.1.
    """
    size = len(gram)
    weights, left = np.zeros(size), towards.astype(np.float64)
    penalty = float(np.abs(left).max(initial=0))
    knots = [(penalty, weights.copy())]
    near = TIE * penalty
    active: list[int] = []
    out: set[int] = set()  # features that the active ones explain
    joins = int(np.abs(left).argmax()) if penalty else None
    gone = None  # the feature that has just left
    while penalty > near and len(knots) < 8 * size + 8:
        if joins is not None:
            own = gram[np.ix_([*active, joins], [*active, joins])]
            if np.linalg.matrix_rank(own, tol=TIE * float(np.abs(gram).max()), hermitian=True) < len(own):
                out.add(joins)
            else:
                active.append(joins)
        direction = np.linalg.solve(gram[np.ix_(active, active)], np.sign(left[active]))
        slope = gram[:, active] @ direction
        step, joins, leaves = penalty, None, None
        for j in sorted(set(range(size)) - set(active) - out):
            for side in (1.0, -1.0):
                rate = 1 - side * slope[j]
                ahead = max((penalty - side * left[j]) / rate, 0.0) if rate > TIE else math.inf
                if ahead < step and not (j == gone and ahead <= near):
                    step, joins = ahead, j
        for place, j in enumerate(active):
            if direction[place] * weights[j] < 0 and -weights[j] / direction[place] < step:
                step, joins, leaves = -weights[j] / direction[place], None, j
        weights[active] += step * direction
        if leaves is not None:
            weights[leaves] = 0.0
            active.remove(leaves)
        left, penalty, gone = towards - gram @ weights, penalty - step, leaves
        knots.append((max(penalty, 0.0), weights.copy()))
        if not active:
            break
    return knots


def tree(masks: np.ndarray, values: np.ndarray, weight: np.ndarray, depth: int) -> Local:
    """Fit a regression tree of bounded depth; the weight of a feature is what it changes on the way of the whole.

    Each node splits by the feature that leaves the least weighted squared error, the first of equal ones. From the root
    to the leaf of the whole, where all features are present, the mean changes at each split; a feature's weight is the
    sum of the changes at its splits, so that the intercept, the root's mean, and all weights add up to the leaf's mean.

    Parameters
    ----------
    masks : bool (sample, feature). values, weight : (sample,).
    """
    found = np.zeros(masks.shape[1])
    model = np.empty(len(values))
    level = _level(values, weight)
    around = float(weight @ (values - level) ** 2)
    splits, means = np.full(2 ** (depth + 1) - 1, -1), np.full(2 ** (depth + 1) - 1, math.nan)

    def grow(rows: np.ndarray, level: float, depth: int, node: int, whole: bool) -> None:
        means[node] = level
        split = _split(masks[rows], values[rows], weight[rows], TIE * around) if depth else None
        if split is None:
            model[rows] = level
            return
        splits[node] = split
        for present in (True, False):
            own = rows[masks[rows, split] == present]
            below = _level(values[own], weight[own])
            if whole and present:
                found[split] += below - level
            grow(own, below, depth - 1, 2 * node + 1 + present, whole and present)

    grow(np.arange(len(values)), level, depth, 0, True)
    fit = 1 - float(weight @ (values - model) ** 2) / around if around > 0 else math.nan
    return Local(found, level, fit, splits, means)


def _split(masks: np.ndarray, values: np.ndarray, weight: np.ndarray, least: float) -> int | None:
    """Return the feature that parts samples best; None where no one lowers the squared error by more than `least`."""
    if not masks.shape[1]:
        return None
    total, level = weight.sum(), _level(values, weight)
    inside = weight @ masks
    apart = (weight * (values - level)) @ masks
    outside = total - inside
    both = (inside > TIE * total) & (outside > TIE * total)
    gain = np.where(both, apart**2 * total / np.where(both, inside * outside, 1.0), 0.0)
    best = int(gain.argmax())
    return best if gain[best] > least else None


def stability(one: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's rank correlation of two models' weights (feature,); NaN where one has no ranks."""
    return float(rank_correlation(one[None], other[None])[0]) if len(one) else math.nan


def pick(weights: np.ndarray, budget: int) -> list[int]:
    """Choose images whose explanations together cover the most important features: SP-LIME.

    The importance of a feature is I_j = sqrt(sum over images of |W_ij|); each image of the choice adds the most
    importance of features that none before it has, the first of equal ones: algorithm 2 of the paper.

    Parameters
    ----------
    weights : (image, feature), of features that mean the same in all images; NaN: the image has none such.

    Returns
    -------
    The places of at most `budget` images, in the order of their choice.
    """
    sizes = np.abs(np.nan_to_num(weights))
    importance = np.sqrt(sizes.sum(0))
    has = sizes > 0
    covered = np.zeros(len(importance), bool)
    chosen: list[int] = []
    left = np.ones(len(weights), bool)
    for _ in range(min(budget, len(weights))):
        gain = np.where(left, (has & ~covered) @ importance, -1.0)
        best = int(gain.argmax())
        chosen.append(best)
        left[best] = False
        covered |= has[best]
    return chosen


def by_feature(values: np.ndarray, features: np.ndarray, count: int) -> np.ndarray:
    """Add up the magnitudes of segments that mean the same, (image, feature): what `pick` takes.

    Parameters
    ----------
    values : (image, segment). features : int (image, segment), from 0 up, what each segment is; -1: nothing.
    count : of features.
    """
    found = np.zeros((len(values), count))
    image, segment = np.nonzero((features >= 0) & ~np.isnan(values))
    np.add.at(found, (image, features[image, segment]), np.abs(values[image, segment]))
    return found
