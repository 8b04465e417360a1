"""Fit temperature, vector and matrix scaling: softmax of scaled logits with the lowest negative log likelihood (NLL).

Sources: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), section 4.2; the regularisation of matrix
scaling is ODIR of Kull et al., "Beyond temperature scaling" (NeurIPS 2019). All three problems are convex, so the fit
is the minimum. If the scaled logits can separate the images without an error, the minimum is at infinity and
`converged` is False.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.calibration.reliability import Floats, Ints, blocks, softmax

LIMITS = 1e-3, 1e3
"""Lowest and highest temperature, in units of the logits' mean standard deviation within a row."""
PENALTIES = 1000.0, 100.0, 10.0, 1.0, 0.1
"""Penalties of a regularised matrix to choose from, strongest first."""
HELD_OUT = 5
"""One in this many images judges the penalties."""
SAMPLE = 4096
"""A temperature is first fitted on about this many images, so that passes over all of them start near the minimum."""


@dataclass(frozen=True)
class Scaling:
    """The map softmax(W (z - mean of z over the classes) + b), or softmax(z / T).

    Attributes
    ----------
    weight : a number (1 / T), (class) or (class, class).
    bias : (class); None with a temperature.
    converged : whether the gradient of the NLL vanishes at these values.
    centre : whether the mean is subtracted.
    penalty : of a regularised matrix.
    """

    weight: Floats | float
    bias: Floats | None = None
    converged: bool = True
    centre: bool = True
    penalty: float | None = None

    def scaled(self, logits: NDArray) -> Floats:
        """Scale logits (image, class), in float64."""
        if self.bias is None:
            return logits.astype(np.float64) * self.weight
        z = centred(logits, self.centre)
        return (z * self.weight if np.ndim(self.weight) == 1 else z @ np.asarray(self.weight).T) + self.bias

    def __call__(self, logits: NDArray) -> Floats:
        """Compute probabilities (image, class)."""
        return softmax(self.scaled(logits))


def centred(logits: NDArray, centre: bool = True) -> Floats:
    """Subtract the mean of each row from the logits, in float64; with `centre` False, leave them as they are.

    A softmax ignores a constant that is added to a whole row, and so does a temperature. Weights that differ between
    classes do not: without centring they would depend on a number that means nothing.
    """
    z = logits.astype(np.float64)
    if centre:
        z -= z.mean(1, keepdims=True)
    return z


# Temperature ----------------------------------------------------------------------------------------------------------


def fit_temperature(logits: NDArray, labels: Ints) -> Scaling:
    """Fit the temperature T > 0 with the lowest NLL, by Newton's method in 1 / T, in which the NLL is convex.

    `weight` is 1 / T. If the minimum is at infinity, or at 0 or below (a network that is always right, or no better
    than chance), the result is the nearest limit and `converged` is False.
    """
    spread, never_below, gain = _survey(logits, labels)
    low, high = (1 / (limit * spread) for limit in reversed(LIMITS))
    if never_below or gain <= 0:
        return Scaling(high if never_below else low, converged=False)
    step = -(-len(logits) // SAMPLE)
    start = 1 / spread
    if step > 1:
        start, _ = _newton(logits[::step], labels[::step], start, low, high, 1e-3)
    weight, converged = _newton(logits, labels, start, low, high, 1e-10)
    return Scaling(weight, converged=converged)


def _survey(logits: NDArray, labels: Ints) -> tuple[float, bool, float]:
    """Summarise the logits before the search for a temperature.

    Returns the mean standard deviation within a row (1 if all logits are equal); whether no label's logit is below
    another of its row, so that the NLL falls forever; and the sum of the labels' logits above their row's mean, which
    is minus the slope of the summed NLL at 1 / T = 0.
    """
    spread = gain = 0.0
    never_below = True
    for rows in blocks(*logits.shape):
        z = logits[rows].astype(np.float64)
        true = z[np.arange(len(z)), labels[rows]]
        spread += float(z.std(1).sum())
        never_below = never_below and bool((true >= z.max(1)).all())
        gain += float((true - z.mean(1)).sum())
    return spread / len(logits) or 1.0, never_below, gain


def _newton(
    logits: NDArray, labels: Ints, start: float, low: float, high: float, tolerance: float
) -> tuple[float, bool]:
    """Find the root of the NLL's slope between two values of 1 / T, or the nearest limit; and say whether it is a root.

    If a step leaves the interval that is still possible, the search halves the interval instead, on a logarithmic
    scale. The tolerance of the slope is in units of the logits' spread, 1 / sqrt(low high).
    """
    at, unit = start, np.sqrt(low * high)
    for _ in range(100):
        slope, curvature = _slope(logits, labels, at)
        if abs(slope) * unit <= tolerance:
            return at, True
        low, high = (low, at) if slope > 0 else (at, high)
        if high <= low * (1 + 1e-12):
            break
        at = at - slope / curvature if curvature > 0 else 0.0
        if not low < at < high:
            at = float(np.sqrt(low * high))
    return at, False


def _slope(logits: NDArray, labels: Ints, weight: float) -> tuple[float, float]:
    """Compute the mean NLL's first and second derivative by 1 / T: E[z] - z of the label, and the variance of z."""
    slope = curvature = 0.0
    for rows in blocks(*logits.shape):
        z = logits[rows].astype(np.float64)
        z -= z.max(1, keepdims=True)
        p = z * weight
        np.exp(p, out=p)
        total = p.sum(1)
        p *= z
        mean = p.sum(1) / total
        square = np.einsum("ik,ik->i", p, z) / total
        slope += float((mean - z[np.arange(len(z)), labels[rows]]).sum())
        curvature += float((square - mean**2).sum())
    return slope / len(logits), curvature / len(logits)


# Vector and matrix ----------------------------------------------------------------------------------------------------


def fit_vector(logits: NDArray, labels: Ints, centre: bool = True, steps: int = 500) -> Scaling:
    """Fit one weight and one bias per class with the lowest NLL; the biases sum to 0.

    The search starts at the fitted temperature, with each parameter in the unit in which the NLL curves alike.
    """
    images, classes = logits.shape
    begin = fit_temperature(logits, labels).weight
    curves = np.zeros((2, classes))
    for rows in blocks(images, classes):
        z = centred(logits[rows], centre)
        p = softmax(z * begin)
        p *= 1 - p
        curves += np.stack([np.einsum("ik,ik,ik->k", p, z, z), p.sum(0)])

    def value(parameters: Floats) -> tuple[float, Floats]:
        weight, bias = parameters.reshape(2, classes)
        nll, slope = 0.0, np.zeros((2, classes))
        for rows in blocks(images, classes):
            z = centred(logits[rows], centre)
            more, off = _nll(z * weight + bias, labels[rows])
            nll += more
            slope += np.stack([np.einsum("ik,ik->k", off, z), off.sum(0)])
        return nll / images, slope.ravel() / images

    start = np.stack([np.full(classes, begin), np.zeros(classes)])
    found, converged = _minimise(value, start.ravel(), curves.ravel() / images, steps)
    weight, bias = found.reshape(2, classes)
    return Scaling(weight, bias - bias.mean(), converged, centre)


def fit_matrix(logits: NDArray, labels: Ints, penalty: float = 0.0, centre: bool = True, steps: int = 500) -> Scaling:
    """Fit a matrix and a bias with the lowest NLL + penalty x (mean square off the diagonal + mean square of the bias).

    Without a penalty, many matrices do the same to centred logits; the result is the one whose rows and columns sum to
    0.
    """
    images, classes = logits.shape
    begin = fit_temperature(logits, labels).weight
    off_diagonal = ~np.eye(classes, dtype=bool)
    curves = np.zeros((classes, classes + 1))
    for rows in blocks(images, classes):
        z = centred(logits[rows], centre)
        p = softmax(z * begin)
        p *= 1 - p
        curves += np.column_stack([p.T @ np.square(z), p.sum(0)])
    ridge = np.column_stack(
        [off_diagonal * (2 * penalty / off_diagonal.sum()), np.full(classes, 2 * penalty / classes)]
    )

    def value(parameters: Floats) -> tuple[float, Floats]:
        both = parameters.reshape(classes, classes + 1)
        weight, bias = both[:, :-1], both[:, -1]
        nll, slope = 0.0, np.zeros_like(both)
        for rows in blocks(images, classes):
            z = centred(logits[rows], centre)
            more, off = _nll(z @ weight.T + bias, labels[rows])
            nll += more
            slope[:, :-1] += off.T @ z
            slope[:, -1] += off.sum(0)
        pull = ridge * both
        return nll / images + float((pull * both).sum()) / 2, (slope / images + pull).ravel()

    start = np.column_stack([np.eye(classes) * begin, np.zeros(classes)])
    found, converged = _minimise(value, start.ravel(), (curves / images + ridge).ravel(), steps)
    both = found.reshape(classes, classes + 1)
    weight, bias = both[:, :-1], both[:, -1]
    if not penalty:  # of the equivalent matrices, the one of least norm
        weight, bias = weight - weight.mean(0), bias - bias.mean()
        weight = centred(weight, centre)
    return Scaling(weight, bias, converged, centre, penalty or None)


def fit_regularised_matrix(logits: NDArray, labels: Ints, penalty: float | None = None) -> Scaling:
    """Run `fit_matrix` with a penalty; None chooses it from `PENALTIES`.

    The chosen penalty has the lowest NLL on a fifth of the images, after a fit on the others. The search starts at the
    strongest penalty and ends at the first that is worse than the one before it.
    """
    if penalty is None:
        order = np.random.default_rng(0).permutation(len(logits))
        held, others = np.split(order, [max(1, len(order) // HELD_OUT)])
        penalty, lowest = PENALTIES[0], np.inf
        for candidate in PENALTIES:
            fitted = fit_matrix(logits[others], labels[others], candidate)
            loss = sum(
                _nll(fitted.scaled(logits[held[at]]), labels[held[at]])[0] for at in blocks(len(held), logits.shape[1])
            )
            if loss > lowest:
                break
            penalty, lowest = candidate, loss
    return fit_matrix(logits, labels, penalty)


def _nll(scaled: Floats, labels: Ints) -> tuple[float, Floats]:
    """Compute the summed NLL and its gradient by the scaled logits: the probability, minus 1 at the label."""
    row = np.arange(len(scaled))
    scaled -= scaled.max(1, keepdims=True)
    true = scaled[row, labels]
    np.exp(scaled, out=scaled)
    total = scaled.sum(1)
    scaled /= total[:, None]
    scaled[row, labels] -= 1
    return float((np.log(total) - true).sum()), scaled


def _minimise(
    value: Callable[[Floats], tuple[float, Floats]], start: Floats, curves: Floats, steps: int
) -> tuple[Floats, bool]:
    """Run L-BFGS from `start`, with parameters in units of 1 / sqrt(second derivative).

    Returns the parameters and whether the gradient vanished.
    """
    from scipy.optimize import minimize

    unit = 1 / np.sqrt(np.maximum(curves, max(1e-3 * curves.mean(), 1e-12)))

    def scaled(parameters: Floats) -> tuple[float, Floats]:
        nll, slope = value(parameters * unit)
        return nll, slope * unit

    found = minimize(
        scaled, start / unit, jac=True, method="L-BFGS-B",
        options={"maxiter": steps, "maxfun": 2 * steps, "maxcor": 20, "ftol": 0.0, "gtol": 1e-6},
    )  # fmt: skip
    return found.x * unit, bool(np.abs(found.jac).max() <= 1e-5)
