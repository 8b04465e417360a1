"""Fit calibration methods by name on some images; they then turn the logits of other images into probabilities.

A map of one probability (`kernels.calibration.binning`) becomes a method for many classes in two ways. One-vs-rest fits
one map per class and divides each row by its sum; predictions may change. Top-label fits one map of the predicted
class's confidence: the prediction stays, and the other classes share the remainder in their old proportions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.calibration.binning import Outcomes, bbq, histogram_equal_mass, histogram_equal_width, isotonic
from kernels.calibration.reliability import BINS, Floats, Ints, Reliability, blocks, softmax
from kernels.calibration.scaling import Scaling, fit_matrix, fit_regularised_matrix, fit_temperature, fit_vector
from kernels.calibration.uncertainty import ClasswiseNoise

UNCALIBRATED = "uncalibrated"

Map = Callable[[Floats], Floats]
Calibrated = tuple[Floats, Ints]
"""Probabilities (image, class) and predicted classes (image)."""


@dataclass(frozen=True)
class OneVersusRest:
    """One map per class."""

    maps: tuple[Map, ...]

    def __call__(self, logits: NDArray) -> Calibrated:
        before = softmax(logits)
        after = np.stack([each(before[:, c]) for c, each in enumerate(self.maps)], axis=1)
        total = after.sum(1, keepdims=True)
        # A row that gives no class any probability keeps the network's own probabilities.
        after = np.where(total > 0, after / np.where(total > 0, total, 1), before)
        return after, after.argmax(1)


@dataclass(frozen=True)
class TopLabel:
    """One map of the confidence."""

    map: Map

    def __call__(self, logits: NDArray) -> Calibrated:
        before = softmax(logits)
        row, predicted = np.arange(len(before)), before.argmax(1)
        confidence = self.map(before[row, predicted])
        before[row, predicted] = 0
        rest = before.sum(1)
        none = rest <= 0
        before[none] = 1
        before[row[none], predicted[none]] = 0
        rest[none] = before.shape[1] - 1
        before *= ((1 - confidence) / rest)[:, None]
        before[row, predicted] = confidence
        return before, predicted


@dataclass(frozen=True)
class Softmax:
    """A scaling of the logits.

    It predicts the class with the largest scaled logit. One weight for all classes changes no prediction.
    """

    scaling: Scaling

    def __call__(self, logits: NDArray) -> Calibrated:
        scaled = self.scaling.scaled(logits)
        return softmax(scaled), (logits if self.scaling.bias is None else scaled).argmax(1)


Method = Callable[[NDArray], Calibrated]
FitMap = Callable[[Floats, Outcomes], Map]


def uncalibrated(logits: NDArray) -> Calibrated:
    return softmax(logits), logits.argmax(1)


def _one_versus_rest(fit: FitMap, logits: NDArray, labels: Ints) -> OneVersusRest:
    largest = logits.max(1).astype(np.float64)
    total = np.empty(len(logits))
    for rows in blocks(*logits.shape):
        total[rows] = np.exp(logits[rows] - largest[rows, None]).sum(1)
    return OneVersusRest(
        tuple(fit(np.exp(logits[:, c] - largest) / total, labels == c) for c in range(logits.shape[1]))
    )


def _top_label(fit: FitMap, logits: NDArray, labels: Ints) -> TopLabel:
    confidence = np.concatenate([softmax(logits[rows]).max(1) for rows in blocks(*logits.shape)])
    return TopLabel(fit(confidence, logits.argmax(1) == labels))


def _scaling(fit: Callable[[NDArray, Ints], Scaling], logits: NDArray, labels: Ints) -> Softmax:
    return Softmax(fit(logits, labels))


def methods(bins: int = BINS, penalty: float | None = None) -> Mapping[str, Callable[[NDArray, Ints], Method]]:
    """Return each method's fit function by name; it takes logits (image, class) and labels (image).

    Parameters
    ----------
    bins : number of bins of histogram binning.
    penalty : of the regularised matrix; None chooses it on some of the images.
    """
    width, mass = partial(histogram_equal_width, bins=bins), partial(histogram_equal_mass, bins=bins)
    return {
        UNCALIBRATED: lambda logits, labels: uncalibrated,
        "histogram": partial(_one_versus_rest, width),
        "histogram_mass": partial(_one_versus_rest, mass),
        "histogram_top": partial(_top_label, width),
        "histogram_mass_top": partial(_top_label, mass),
        "isotonic": partial(_one_versus_rest, isotonic),
        "isotonic_top": partial(_top_label, isotonic),
        "bbq": partial(_one_versus_rest, bbq),
        "bbq_top": partial(_top_label, bbq),
        "temperature": partial(_scaling, fit_temperature),
        "vector": partial(_scaling, fit_vector),
        "matrix": partial(_scaling, fit_matrix),
        "matrix_odir": partial(_scaling, partial(fit_regularised_matrix, penalty=penalty)),
    }


NAMES = tuple(methods())


def fit(name: str, logits: NDArray, labels: Ints, bins: int = BINS, penalty: float | None = None) -> Method:
    """Fit a method on images with finite logits (image, class) and labels (image).

    Raises
    ------
    ValueError
        If there are fewer images than classes.
    """
    images, classes = logits.shape
    if images < classes:
        raise ValueError(
            f"{images} images to calibrate on, and {classes} classes: there must be at least as many images"
        )
    return methods(bins, penalty)[name](logits, labels)


def judge(
    method: Method, logits: NDArray, labels: Ints, bins: int = BINS, chance: tuple[ClasswiseNoise, int] | None = None
) -> tuple[Reliability, Floats, Outcomes]:
    """Measure a method on other images: sums, and (image) the confidence and whether the prediction is right.

    `chance` is a counter that sees the same images, together with the seed of its random numbers.
    """
    generator = np.random.default_rng(chance[1]) if chance else None
    found = Reliability.zeros(logits.shape[1], bins)
    confidence, right = np.empty(len(logits)), np.empty(len(logits), bool)
    for rows in blocks(*logits.shape):
        probabilities, predicted = method(logits[rows])
        found.update(probabilities, labels[rows], predicted)
        if chance and generator:
            chance[0].update(probabilities, labels[rows], generator)
        confidence[rows] = probabilities[np.arange(len(predicted)), predicted]
        right[rows] = predicted == labels[rows]
    return found, confidence, right


def facts(method: Method) -> dict[str, Any]:
    """Return what to report of a fitted method: temperature, penalty, and whether its search converged."""
    if not isinstance(method, Softmax):
        return {}
    scaling = method.scaling
    found: dict[str, Any] = {"converged": scaling.converged}
    if scaling.bias is None:
        found["temperature"] = 1 / float(scaling.weight)
    if scaling.penalty is not None:
        found["penalty"] = scaling.penalty
    return found
