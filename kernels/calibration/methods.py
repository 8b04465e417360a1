"""Fit calibration methods by name on some images; they then turn the scores of other images into probabilities.

Scores are logits, or `Predictions` of a network that gave probabilities, which keep their own precision.

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
from kernels.calibration.reliability import BINS, Floats, Ints, Predictions, Reliability, blocks, softmax
from kernels.calibration.scaling import Scaling, fit_matrix, fit_regularised_matrix, fit_temperature, fit_vector
from kernels.calibration.uncertainty import ClasswiseNoise

UNCALIBRATED = "uncalibrated"

Scores = NDArray | Predictions
Map = Callable[[NDArray], Floats]
Calibrated = tuple[NDArray, Ints]
"""Probabilities (image, class) and predicted classes (image)."""


@dataclass(frozen=True)
class OneVersusRest:
    """One map per class."""

    maps: tuple[Map, ...]

    def __call__(self, scores: Scores) -> Calibrated:
        before = Predictions.of(scores).probabilities
        after = np.stack([each(before[:, c]) for c, each in enumerate(self.maps)], axis=1)
        total = after.sum(1, keepdims=True)
        # A row that gives no class any probability keeps the network's own probabilities.
        after = np.where(total > 0, after / np.where(total > 0, total, 1), before)
        return after, after.argmax(1)


@dataclass(frozen=True)
class TopLabel:
    """One map of the confidence."""

    map: Map

    def __call__(self, scores: Scores) -> Calibrated:
        given = Predictions.of(scores).probabilities
        row, predicted = np.arange(len(given)), given.argmax(1)
        confidence = self.map(given[row, predicted])
        before = given.astype(np.float64)
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

    def __call__(self, scores: Scores) -> Calibrated:
        said = Predictions.of(scores)
        scaled = self.scaling.scaled(said.logits)
        return softmax(scaled), said.predicted if self.scaling.bias is None else scaled.argmax(1)


Method = Callable[[Scores], Calibrated]
FitMap = Callable[[NDArray, Outcomes], Map]


def uncalibrated(scores: Scores) -> Calibrated:
    said = Predictions.of(scores)
    return said.probabilities, said.predicted


def _one_versus_rest(fit: FitMap, said: Predictions, labels: Ints) -> OneVersusRest:
    logits, given = said.logits, said.given
    if given is not None:
        return OneVersusRest(tuple(fit(given[:, c], labels == c) for c in range(given.shape[1])))
    largest = logits.max(1).astype(np.float64)
    total = np.empty(len(logits))
    for rows in blocks(*logits.shape):
        total[rows] = np.exp(logits[rows] - largest[rows, None]).sum(1)
    return OneVersusRest(
        tuple(fit(np.exp(logits[:, c] - largest) / total, labels == c) for c in range(logits.shape[1]))
    )


def _top_label(fit: FitMap, said: Predictions, labels: Ints) -> TopLabel:
    confidence = np.concatenate([said[rows].probabilities.max(1) for rows in blocks(said.shape[0], said.shape[1])])
    return TopLabel(fit(confidence, said.predicted == labels))


def _scaling(fit: Callable[[NDArray, Ints], Scaling], said: Predictions, labels: Ints) -> Softmax:
    return Softmax(fit(said.logits, labels))


def maps_of_confidence(bins: int = BINS) -> Mapping[str, FitMap]:
    """Return the fit function of each method that needs no more than the confidence, by name.

    It takes confidences (image) and whether the prediction is right (image), and returns a map of confidences.
    """
    return {
        "histogram_top": partial(histogram_equal_width, bins=bins),
        "histogram_mass_top": partial(histogram_equal_mass, bins=bins),
        "isotonic_top": isotonic,
        "bbq_top": bbq,
    }


def methods(bins: int = BINS, penalty: float | None = None) -> Mapping[str, Callable[[Predictions, Ints], Method]]:
    """Return each method's fit function by name; it takes predictions (image, class) and labels (image).

    Parameters
    ----------
    bins : number of bins of histogram binning.
    penalty : of the regularised matrix; None chooses it on some of the images.
    """
    maps = maps_of_confidence(bins)
    return {
        UNCALIBRATED: lambda said, labels: uncalibrated,
        "histogram": partial(_one_versus_rest, maps["histogram_top"]),
        "histogram_mass": partial(_one_versus_rest, maps["histogram_mass_top"]),
        "histogram_top": partial(_top_label, maps["histogram_top"]),
        "histogram_mass_top": partial(_top_label, maps["histogram_mass_top"]),
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


def fit(name: str, scores: Scores, labels: Ints, bins: int = BINS, penalty: float | None = None) -> Method:
    """Fit a method on images with finite scores (image, class) and labels (image).

    Raises
    ------
    ValueError
        If there are fewer images than classes.
    """
    images, classes = scores.shape
    if images < classes:
        raise ValueError(
            f"{images} images to calibrate on, and {classes} classes: there must be at least as many images"
        )
    return methods(bins, penalty)[name](Predictions.of(scores), labels)


def judge(
    method: Method, scores: Scores, labels: Ints, bins: int = BINS, chance: tuple[ClasswiseNoise, int] | None = None
) -> tuple[Reliability, NDArray, Outcomes]:
    """Measure a method on other images: sums, and (image) the confidence and whether the prediction is right.

    The confidence has the precision of the method's probabilities.

    `chance` is a counter that sees the same images, together with the seed of its random numbers.
    """
    generator = np.random.default_rng(chance[1]) if chance else None
    said = Predictions.of(scores)
    found = Reliability.zeros(said.shape[1], bins)
    confidence, right = [], np.empty(len(said), bool)
    for rows in blocks(said.shape[0], said.shape[1]):
        probabilities, predicted = method(said[rows])
        found.update(probabilities, labels[rows], predicted)
        if chance and generator:
            chance[0].update(probabilities, labels[rows], generator)
        confidence.append(probabilities[np.arange(len(predicted)), predicted])
        right[rows] = predicted == labels[rows]
    return found, np.concatenate(confidence), right


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
