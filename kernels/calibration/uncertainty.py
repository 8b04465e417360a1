"""Estimate what chance does to a calibration error: its bootstrap interval, and its size under perfect calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.calibration.reliability import BINS, Floats, Ints, debiased_square, equal_mass, equal_width

AT_ONCE = 1 << 19
"""Random numbers drawn at once: 4 MB."""


@dataclass(frozen=True)
class Noise:
    """An error's interval, and the error that a perfectly calibrated network would show with the same confidences.

    Attributes
    ----------
    low, high : 95 % bootstrap interval of the error.
    null_mean, null_high : mean and 95 % quantile of the error if each image is right with the probability that its
        confidence states.
    """

    low: float
    high: float
    null_mean: float
    null_high: float


def noise(confidence: NDArray, right: NDArray[np.bool_], draws: int, seed: int, bins: int = BINS) -> dict[str, Noise]:
    """Estimate the noise of the errors by bins of the confidence: `ece`, `ece_equal_mass` and `ece_debiased`.

    The function draws images with replacement, and labels from the confidences, `draws` times each.

    Resampled images overstate the error by about as much as the images themselves do, since noise adds to every gap.
    The interval is therefore the basic one: twice the error minus the quantiles of the resampled errors, and at least
    0. The interval of the debiased error is taken on its square. That error does not overstate, so the resampled ones
    are shifted to have it as their mean. Bins of equal mass keep the edges that they have on the original images.

    Everything follows from sums in bins, so a draw is a row of numbers, one per image, times a matrix of the images'
    bins.
    """
    images = len(confidence)
    held = np.concatenate([np.eye(bins)[of(confidence, bins)] for of in (equal_width, equal_mass)], axis=1)
    confidence = confidence.astype(np.float64)
    sums = np.concatenate([held, held * right[:, None], held * confidence[:, None]], axis=1)
    count, correct, stated = _in_three(sums.sum(0))
    generator = np.random.default_rng(seed)
    resampled, null = [], []
    step = max(1, AT_ONCE // images)
    for at in range(0, draws, step):
        some = min(step, draws - at)
        chosen = generator.integers(0, images, (some, images)) + images * np.arange(some)[:, None]
        times = np.bincount(chosen.ravel(), minlength=some * images).reshape(some, images)
        resampled.append(_errors(*_in_three(times.astype(np.float64) @ sums), bins))
        drawn = (generator.random((some, images)) < confidence).astype(np.float64) @ held
        null.append(_errors(np.broadcast_to(count, drawn.shape), drawn, stated, bins))
    found = _errors(count, correct, stated, bins)
    again, calibrated = np.concatenate(resampled), np.concatenate(null)
    again[:, 2] += found[2] - again[:, 2].mean()
    basic = np.maximum(0.0, 2 * found - np.quantile(again, [0.975, 0.025], axis=0))
    # The last column is a square.
    basic[:, 2], calibrated[:, 2] = np.sqrt(basic[:, 2]), np.sqrt(np.maximum(0.0, calibrated[:, 2]))
    columns = np.stack([*basic, calibrated.mean(0), np.quantile(calibrated, 0.95, axis=0)], axis=1)
    names = ("ece", "ece_equal_mass", "ece_debiased")
    return {name: Noise(*of.tolist()) for name, of in zip(names, columns, strict=True)}


def _in_three(sums: Floats) -> tuple[Floats, Floats, Floats]:
    count, correct, confidence = np.split(sums, 3, axis=-1)
    return count, correct, confidence


def _errors(count: Floats, correct: Floats, confidence: Floats, bins: int) -> Floats:
    """Compute ECE, equal-mass ECE and squared debiased ECE, (..., 3), from sums in both kinds of bins."""
    gaps = np.abs(correct - confidence)
    width = (..., slice(bins))
    return np.stack(
        [
            gaps[width].sum(-1) / count[width].sum(-1),
            gaps[..., bins:].sum(-1) / count[width].sum(-1),
            debiased_square(count[width], correct[width], np.broadcast_to(confidence, correct.shape)[width]),
        ],
        axis=-1,
    )


@dataclass
class ClasswiseNoise:
    """The noise of the classwise ECE, from sums over images in any number of parts.

    Resampling gives each image its own weight, a Poisson number of mean 1, so the parts need not know of each other;
    with many images this amounts to drawing with replacement. Labels are drawn from all probabilities of an image.

    Attributes
    ----------
    gap, resampled : (class x bin), (class x bin, draw), sums of (1 if the class is the label, else 0) - probability, by
        class and bin of the probability; unweighted and weighted.
    expected, drawn : (class x bin), (class x bin, draw), sums of probabilities, and counts of drawn labels.
    weight : (draw), sum of the weights.
    images : number of images.
    """

    gap: Floats
    resampled: Floats
    expected: Floats
    drawn: Floats
    weight: Floats
    images: int = 0

    @staticmethod
    def zeros(classes: int, draws: int, bins: int = BINS) -> ClasswiseNoise:
        cells = classes * bins
        several = cells, draws
        return ClasswiseNoise(np.zeros(cells), np.zeros(several), np.zeros(cells), np.zeros(several), np.zeros(draws))

    def update(self, probabilities: NDArray, labels: Ints, generator: np.random.Generator) -> None:
        """Add images: probabilities (image, class) and labels (image)."""
        from scipy.sparse import csr_array

        (images, classes), (cells, draws) = probabilities.shape, self.drawn.shape
        bins = cells // classes
        row = np.arange(images)[:, None]
        cell = equal_width(probabilities.ravel(), bins).reshape(images, classes) + bins * np.arange(classes)
        probabilities = probabilities.astype(np.float64, copy=False)
        gap = -probabilities
        gap[row[:, 0], labels] += 1
        weight = generator.poisson(1.0, (images, draws)).astype(np.float64)
        start = classes * np.arange(images + 1)
        self.resampled += csr_array((gap.ravel(), cell.ravel(), start), shape=(images, cells)).T @ weight
        self.weight += weight.sum(0)
        # Each row's cumulative probabilities end where the next row's begin, so one search serves all rows.
        ends = (np.minimum(probabilities.cumsum(1), 1) + row).ravel()
        found = np.searchsorted(ends, generator.random((images, draws)) + row, side="right") - classes * row
        label = np.clip(found, 0, classes - 1)
        np.add.at(self.drawn, (cell[row, label], np.arange(draws)), 1)
        self.gap += np.bincount(cell.ravel(), gap.ravel(), minlength=cells)
        self.expected += np.bincount(cell.ravel(), probabilities.ravel(), minlength=cells)
        self.images += images

    def merge(self, other: ClasswiseNoise) -> None:
        self.gap += other.gap
        self.resampled += other.resampled
        self.expected += other.expected
        self.drawn += other.drawn
        self.weight += other.weight
        self.images += other.images

    def noise(self, classes: int) -> Noise:
        again = np.abs(self.resampled).sum(0) / np.maximum(self.weight, 1) / classes
        null = np.abs(self.drawn - self.expected[:, None]).sum(0) / self.images / classes
        error = np.abs(self.gap).sum() / self.images / classes
        low, high = np.maximum(0.0, 2 * error - np.quantile(again, [0.975, 0.025])).tolist()
        return Noise(low, high, float(null.mean()), float(np.quantile(null, 0.95)))
