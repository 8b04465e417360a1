"""Finite-sample expressivity: a two-layer ReLU network of 2n + d weights that gives any labels to any n inputs.

Theorem 1 of Zhang et al., "Understanding deep learning requires rethinking generalization" (ICLR 2017): project the
inputs on a line, where all differ; put one kink before each; the weights follow from the first to the last. The matrix
of the proof is never made: a running slope and a running value are enough.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Interpolant:
    """c(z) = sum_j weight_j max(<direction, z> - bias_j, 0): `direction` (d), `bias` and `weight` (n), bias rising."""

    direction: Numbers
    bias: Numbers
    weight: Numbers

    @property
    def weights(self) -> int:
        """How many numbers it has: 2n + d."""
        return len(self.direction) + len(self.bias) + len(self.weight)

    def __call__(self, inputs: Numbers) -> Numbers:
        """(input, d) -> (input), by prefix sums: of the slopes, and of what they have added up to at each kink."""
        return evaluate(inputs @ self.direction, self.bias, self.weight)


def evaluate(projected: Numbers, bias: Numbers, weight: Numbers) -> Numbers:
    """sum_j weight_j max(x - bias_j, 0) for x in `projected` (input), in O((inputs + n) log n)."""
    slope = np.cumsum(weight)
    value = np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(bias))])
    kink = np.searchsorted(bias, projected, "left") - 1  # the last one below x; -1: none
    return np.where(kink < 0, 0.0, value[kink] + slope[kink] * (projected - bias[kink]))


def interpolate(inputs: Numbers, labels: Numbers, directions: int = 16, seed: int = 0) -> Interpolant:
    """The network that gives `labels` (n) to `inputs` (n, d).

    Inputs that occur twice with one label count once. The weights are as large as two projections are close; of several
    random directions the one is taken whose closest two are furthest apart.

    Raises
    ------
    ValueError
        Values that are not finite, an input that occurs twice with two labels, inputs that no direction tells apart.
    """
    inputs, labels = np.asarray(inputs, np.float64), np.asarray(labels, np.float64)
    if inputs.ndim != 2 or labels.shape != inputs.shape[:1] or not len(labels):
        raise ValueError(f"expected inputs (n, d) and labels (n), found {inputs.shape} and {labels.shape}")
    if not (np.isfinite(inputs).all() and np.isfinite(labels).all()):
        raise ValueError("inputs and labels are to be finite numbers")
    draw = np.random.default_rng(seed)
    tried = draw.standard_normal((inputs.shape[1], directions))
    tried /= np.linalg.norm(tried, axis=0)
    projected = inputs @ tried
    ordered = np.sort(projected, axis=0)
    # Between two projections there has to be room for a kink.
    if not (np.nextafter(ordered[:-1], np.inf) < ordered[1:]).all(0).any():
        first = _distinct(inputs, labels)
        if len(first) == len(inputs):
            raise ValueError(f"none of {directions} directions tells all inputs apart: they differ too little")
        return interpolate(inputs[first], labels[first], directions, seed)
    gaps = np.diff(ordered, axis=0).min(0, initial=np.inf)
    direction = np.ascontiguousarray(tried[:, int(gaps.argmax())])
    x = inputs @ direction  # as the network projects them: a product of matrices rounds otherwise
    order = np.argsort(x)
    bias = kinks(x[order])
    return Interpolant(direction, bias, weights_of(x[order], labels[order], bias))


def kinks(x: Numbers) -> Numbers:
    """(n) rising projections -> (n) biases, b_1 < x_1 < b_2 < x_2 ...: each just above the projection before.

    So a kink changes the slope on its interval and leaves nothing of the one before; half-way between two projections
    the errors of all slopes before would alternate and grow.
    """
    span = x[-1] - x[0] if len(x) > 1 else 1.0
    return np.concatenate([[x[0] - span / len(x)], np.nextafter(x[:-1], np.inf)])


def weights_of(x: Numbers, labels: Numbers, bias: Numbers) -> Numbers:
    """(n) weights, in O(n): each makes up for what those before leave of its label.

    Value and slope are added up in the order of `evaluate`, so that rounding is made up for too.
    """
    weights = np.empty(len(x))
    value = slope = 0.0
    before = float(bias[0])
    for at, (point, label, kink) in enumerate(zip(x.tolist(), labels.tolist(), bias.tolist(), strict=True)):
        value += slope * (kink - before)
        before = kink
        weights[at] = (label - value) / (point - kink) - slope
        slope += weights[at]
    return weights


def smallest_eigenvalue(x: Numbers, bias: Numbers) -> float:
    """Of the matrix A, A_ij = max(x_i - bias_j, 0), for b_1 < x_1 < b_2 < x_2 ...: min_i (x_i - b_i).

    Lemma 1 of the paper: A is lower triangular, so its eigenvalues are its diagonal; none is 0, and it has an inverse.
    """
    return float((x - bias).min())


def _distinct(inputs: Numbers, labels: Numbers) -> NDArray[np.intp]:
    """The first of each distinct input, in their order."""
    _, first, which = np.unique(inputs, axis=0, return_index=True, return_inverse=True)
    wrong = np.flatnonzero(labels != labels[first[which.ravel()]])
    if len(wrong):
        at = int(wrong[0])
        other = int(first[which.ravel()[at]])
        raise ValueError(
            f"inputs {other} and {at} are equal and have the labels {labels[other]:g} and {labels[at]:g}: "
            "no function gives both"
        )
    return np.sort(first)
