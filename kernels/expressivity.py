"""Build a two-layer ReLU network of 2n + d weights that gives any n inputs any labels.

This is theorem 1, on finite-sample expressivity, of Zhang et al., "Understanding deep learning requires rethinking
generalization" (ICLR 2017). The construction projects the inputs onto a line on which they all differ, puts one kink
before each projection, and computes the weights from first to last. A running slope and a running value suffice, so the
matrix of the proof is never built.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Interpolant:
    """The function c(z) = sum_j weight_j max(<direction, z> - bias_j, 0).

    Attributes
    ----------
    direction : (d).
    bias : (n), increasing.
    weight : (n).
    """

    direction: Numbers
    bias: Numbers
    weight: Numbers

    @property
    def weights(self) -> int:
        """Number of parameters: 2n + d."""
        return len(self.direction) + len(self.bias) + len(self.weight)

    def __call__(self, inputs: Numbers) -> Numbers:
        """Map inputs (input, d) to outputs (input), with prefix sums of the slopes and of the values at the kinks."""
        return evaluate(inputs @ self.direction, self.bias, self.weight)


def evaluate(projected: Numbers, bias: Numbers, weight: Numbers) -> Numbers:
    """Compute sum_j weight_j max(x - bias_j, 0) for each x in `projected` (input), in O((inputs + n) log n)."""
    slope = np.cumsum(weight)
    value = np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(bias))])
    kink = np.searchsorted(bias, projected, "left") - 1  # the last kink below x, or -1
    return np.where(kink < 0, 0.0, value[kink] + slope[kink] * (projected - bias[kink]))


def interpolate(inputs: Numbers, labels: Numbers, directions: int = 16, seed: int = 0) -> Interpolant:
    """Build the network that maps `inputs` (n, d) to `labels` (n).

    An input that occurs twice with the same label counts once. The closer two projections are, the larger the weights
    become, so of several random directions the function takes the one whose closest two projections are furthest apart.

    Raises
    ------
    ValueError
        If a value is not finite, if an input occurs with two labels, or if no direction separates the inputs.
    """
    inputs, labels = np.asarray(inputs, np.float64), np.asarray(labels, np.float64)
    if inputs.ndim != 2 or labels.shape != inputs.shape[:1] or not len(labels):
        raise ValueError(f"expected inputs (n, d) and labels (n), found {inputs.shape} and {labels.shape}")
    if not (np.isfinite(inputs).all() and np.isfinite(labels).all()):
        raise ValueError("inputs and labels must be finite numbers")
    draw = np.random.default_rng(seed)
    tried = draw.standard_normal((inputs.shape[1], directions))
    tried /= np.linalg.norm(tried, axis=0)
    projected = inputs @ tried
    ordered = np.sort(projected, axis=0)
    # A kink must fit between any two projections.
    if not (np.nextafter(ordered[:-1], np.inf) < ordered[1:]).all(0).any():
        first = _distinct(inputs, labels)
        if len(first) == len(inputs):
            raise ValueError(f"none of {directions} directions separates all inputs: they differ too little")
        return interpolate(inputs[first], labels[first], directions, seed)
    gaps = np.diff(ordered, axis=0).min(0, initial=np.inf)
    direction = np.ascontiguousarray(tried[:, int(gaps.argmax())])
    x = inputs @ direction  # as the network projects them: a matrix-matrix product rounds differently
    order = np.argsort(x)
    bias = kinks(x[order])
    return Interpolant(direction, bias, weights_of(x[order], labels[order], bias))


def kinks(x: Numbers) -> Numbers:
    """Place a kink before each of n increasing projections: biases (n) with b_1 < x_1 < b_2 < x_2 ...

    Each bias lies just above the previous projection, so a kink sets the slope on its own interval and keeps nothing of
    the slope before it. Halfway between two projections, the errors of all earlier slopes would alternate and grow.
    """
    span = x[-1] - x[0] if len(x) > 1 else 1.0
    return np.concatenate([[x[0] - span / len(x)], np.nextafter(x[:-1], np.inf)])


def weights_of(x: Numbers, labels: Numbers, bias: Numbers) -> Numbers:
    """Compute the weights (n) in O(n): each makes up for what the earlier weights miss of its label.

    The value and the slope are summed in the order of `evaluate`, so the weights make up for rounding as well.
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
    """Compute the smallest eigenvalue of the matrix A_ij = max(x_i - bias_j, 0): min_i (x_i - b_i).

    For b_1 < x_1 < b_2 < x_2 ..., A is lower triangular (lemma 1 of the paper), so its eigenvalues are its diagonal
    entries. None of them is 0, so A is invertible.
    """
    return float((x - bias).min())


def _distinct(inputs: Numbers, labels: Numbers) -> NDArray[np.intp]:
    """Return the index of the first copy of each distinct input, in input order."""
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
