"""Measure what classes lose when units are removed: prediction counts, the scores made from them, and sets of units.

Each score compares one class with the rest (Bau et al., "Understanding the role of individual units in a deep neural
network", PNAS 2020, section "Role of units in a network"): balanced accuracy is (recall + true negative rate) / 2. All
counts are integers, so the counts of parts of the images add up to those of all images, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TOP = 5


@dataclass
class Predictions:
    """Prediction counts over images, for any number of variants of a network (for example, one per removed unit).

    Attributes
    ----------
    images : (class), images labelled with the class.
    true_positives : (variant, class), images of the class that are predicted as such.
    predicted : (variant, class), images predicted as the class, whatever their label.
    in_top5 : (variant, class), images of the class with fewer than five classes above it.
    """

    images: Ints
    true_positives: Ints
    predicted: Ints
    in_top5: Ints

    @staticmethod
    def zeros(variants: int, classes: int) -> Predictions:
        shape = (variants, classes)
        return Predictions(np.zeros(classes, np.int64), *(np.zeros(shape, np.int64) for _ in range(3)))

    def update(self, label: NDArray, prediction: NDArray, above: NDArray) -> None:
        """Add images to the counts.

        Parameters
        ----------
        label : (image).
        prediction : (image, variant).
        above : (image, variant), the number of classes with a higher logit than the label's.
        """
        variants, classes = self.predicted.shape
        at = np.arange(variants) * classes
        cells = variants * classes

        def count(chosen: NDArray, mask: NDArray | None = None) -> Ints:
            flat = (at + chosen)[mask] if mask is not None else (at + chosen).ravel()
            return np.bincount(flat, minlength=cells).reshape(variants, classes)

        given = np.broadcast_to(label[:, None], prediction.shape)
        self.images += np.bincount(label, minlength=classes)
        self.true_positives += count(given, prediction == given)
        self.predicted += count(prediction)
        self.in_top5 += count(given, above < TOP)

    @property
    def recall(self) -> Floats:
        """Recall (variant, class); NaN for a class without images."""
        return _ratio(self.true_positives, self.images)

    @property
    def precision(self) -> Floats:
        """Precision (variant, class); NaN for a class that is never predicted."""
        return _ratio(self.true_positives, self.predicted)

    @property
    def balanced_accuracy(self) -> Floats:
        """Balanced accuracy (variant, class); NaN for a class with no images, or with all of them."""
        return balanced_accuracy(self.true_positives, self.predicted, self.images, int(self.images.sum()))

    @property
    def accuracy(self) -> Floats:
        """Top-1 accuracy (variant)."""
        return _ratio(self.true_positives.sum(-1), self.images.sum())

    @property
    def top5_accuracy(self) -> Floats:
        """Top-5 accuracy (variant)."""
        return _ratio(self.in_top5.sum(-1), self.images.sum())


def balanced_accuracy(true_positives: Ints, predicted: Ints, images: Ints, total: int) -> Floats:
    """Compute (recall + true negative rate) / 2 of one class against the rest, for arrays that end in (class)."""
    negatives = total - images
    return (_ratio(true_positives, images) + _ratio(negatives - (predicted - true_positives), negatives)) / 2


def _ratio(part: NDArray, whole: NDArray) -> Floats:
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def ranking(loss: Floats) -> Ints:
    """Rank the units of each class: (class, unit), from the largest loss (unit, class) down, ties by unit number.

    A class whose losses are undefined has -1 everywhere.
    """
    order = np.argsort(-loss.T, axis=1, kind="stable")
    return np.where(np.isnan(loss.T).any(1, keepdims=True), -1, order)


KINDS = ("remove_most", "keep_most", "remove_least")
RANDOM_KINDS = ("remove", "keep")


def ranked_sets(order: Ints, sizes: Sequence[int]) -> NDArray[np.bool_]:
    """Choose the units to remove by rank: (kind, size, class, unit) bool, in the order of `KINDS`.

    An undefined ranking removes no unit.
    """
    classes, units = order.shape
    place = np.full((classes, units), units)  # each unit's rank
    defined = order[:, 0] >= 0
    place[np.flatnonzero(defined)[:, None], order[defined]] = np.arange(units)
    size = np.asarray(sizes)[:, None, None]
    sets = np.stack([place < size, place >= size, place >= units - size])
    return sets & defined[:, None]


def random_sets(units: int, sizes: Sequence[int], draws: int, seed: int) -> NDArray[np.bool_]:
    """Draw random units to remove, or to keep alone: (draw, kind, size, unit) bool.

    Within a draw, each larger set contains the smaller ones.
    """
    rng = np.random.default_rng(seed)
    place = np.stack([rng.permutation(units) for _ in range(draws)]) if draws else np.empty((0, units), np.int64)
    removed = place[:, None] < np.asarray(sizes)[:, None]
    return np.stack([removed, ~removed], axis=1)


SERVED = 4


def classes_served(order: Ints, loss: Floats, among: int = SERVED) -> Ints:
    """Count the classes that each unit serves: (unit).

    A unit serves a class if it is among the `among` most important units of that class and its loss (unit, class) is
    positive.
    """
    classes, units = order.shape
    served = np.zeros(units, np.int64)
    for c in range(classes):
        best = order[c, :among]
        best = best[best >= 0]
        served[best[loss[best, c] > 0]] += 1
    return served
