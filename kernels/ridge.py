"""Fit linear classifiers in closed form: ridge regression on class indicators, for any number of penalties at once.

Let z be an image's features minus their mean over the n training images, divided by their standard deviation, and let y
be its class as an indicator vector. The weights of penalty a minimise

    sum over images |y - mean(y) - Wᵀ z|² + n a |W|²,

so a means the same for any features and any number of images. The predicted class is the largest entry of Wᵀ z +
mean(y). A feature that is the same for all images has weight 0. The solution follows from sums that can be merged
(`Moments`), or from the images themselves if there are fewer images than features. One eigendecomposition serves all
penalties.

Dosovitskiy et al., "An image is worth 16 x 16 words" (ICLR 2021), section 4.1, describe few-shot probes of this kind.
The merge follows Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
(1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 4096  # images scored at once


@dataclass
class Moments:
    """Sums over images from which a ridge regression is solved, in float64 on one device.

    Attributes
    ----------
    count : (class), images of each class.
    mean : (feature).
    scatter : (feature, feature), sum of (x - mean)(x - mean)ᵀ.
    cross : (feature, class), sum of (x - mean)(y - mean of y)ᵀ, where y is the class indicator.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, features: int, classes: int, device: str = "cpu") -> Moments:
        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zero(classes), zero(features), zero(features, features), zero(features, classes))

    @classmethod
    def of(cls, x: Tensor, label: Tensor, classes: int) -> Moments:
        """Compute the moments of images x (image, feature) with labels (image) from 0 up.

        The first image is subtracted from all others beforehand, which is exact. Features whose mean is a thousand
        times their spread therefore keep their digits, and features that never change have a scatter of exactly 0.
        """
        if not len(x):
            return cls.zeros(x.shape[1], classes, str(x.device))
        first = x[0].double()
        x = x.double() - first
        offset = x.mean(0)
        x = x - offset
        count = torch.bincount(label, minlength=classes).double()
        # A product, because summing by index has no fixed order on a GPU.
        cross = x.T @ (_indicator(label, classes) - count / len(x))
        return cls(count, first + offset, x.T @ x, cross)

    def update(self, x: Tensor, label: Tensor) -> None:
        """Add images (image, feature) with labels (image)."""
        self.merge(Moments.of(x, label, len(self.count)))

    def merge(self, other: Moments) -> None:
        """Add the images of another; a different merge order changes the last digits."""
        ours, theirs = float(self.count.sum()), float(other.count.sum())
        if not theirs:
            return
        if not ours:
            self.count, self.mean, self.scatter, self.cross = other.count, other.mean, other.scatter, other.cross
            return
        both = ours + theirs
        apart = other.mean - self.mean
        classes_apart = other.count / theirs - self.count / ours
        factor = ours * theirs / both
        self.scatter = self.scatter + other.scatter + factor * torch.outer(apart, apart)
        self.cross = self.cross + other.cross + factor * torch.outer(apart, classes_apart)
        self.mean = self.mean + apart * (theirs / both)
        self.count = self.count + other.count

    @property
    def images(self) -> int:
        return int(self.count.sum())


@dataclass(frozen=True)
class Ridge:
    """The classifiers of all penalties, in an eigenbasis.

    Attributes
    ----------
    images : number of images in the fit.
    mean : (feature), subtracted first.
    basis : (feature, direction), for features that are not standardised.
    eigenvalue : (direction).
    coefficient : (direction, class).
    intercept : (class), share of each class.
    """

    images: int
    mean: Tensor
    basis: Tensor
    eigenvalue: Tensor
    coefficient: Tensor
    intercept: Tensor

    @classmethod
    def of_moments(cls, moments: Moments) -> Ridge:
        """Fit from sums: the method for more images than features."""
        n = moments.images
        if not n:
            raise ValueError("no image to fit on")
        one_by = _inverse(moments.scatter.diagonal() / n)
        eigenvalue, vectors = torch.linalg.eigh(moments.scatter * one_by[:, None] * one_by)
        coefficient = vectors.T @ (moments.cross * one_by[:, None])
        return cls(n, moments.mean, vectors * one_by[:, None], eigenvalue, coefficient, moments.count / n)

    @classmethod
    def of_images(cls, x: Tensor, label: Tensor, classes: int) -> Ridge:
        """Fit on images (image, feature) with labels (image); uses the dual form for fewer images than features."""
        n, features = x.shape
        if n >= features or not n:
            return cls.of_moments(Moments.of(x, label, classes))
        first = x[0].double()
        shifted = x.double() - first
        offset = shifted.mean(0)
        shifted = shifted - offset
        one_by = _inverse((shifted * shifted).mean(0))
        z = shifted * one_by
        eigenvalue, vectors = torch.linalg.eigh(z @ z.T)
        count = torch.bincount(label, minlength=classes).double()
        basis = (z * one_by).T @ vectors
        coefficient = vectors.T @ (_indicator(label, classes) - count / n)
        return cls(n, first + offset, basis, eigenvalue, coefficient, count / n)

    def weights(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Return weights (feature, class) and intercepts (class): the scores are (x - mean) @ weights + intercepts."""
        shrunk = self.coefficient / (self.eigenvalue + self.images * penalty)[:, None]
        return self.basis @ shrunk, self.intercept

    def right(self, x: Tensor, label: Tensor, penalties: Sequence[float]) -> Tensor:
        """Return (penalty, image) bool: whether the class of each image (image, feature) is predicted correctly."""
        weights = [self.weights(penalty) for penalty in penalties]
        found = torch.empty((len(penalties), len(x)), dtype=torch.bool, device=x.device)
        for start in range(0, len(x), ROWS):
            part = slice(start, start + ROWS)
            centred = x[part].double() - self.mean
            for at, (weight, intercept) in enumerate(weights):
                found[at, part] = (centred @ weight + intercept).argmax(1) == label[part]
        return found

    def choose(self, x: Tensor, label: Tensor, penalties: Sequence[float]) -> float:
        """Return the penalty that predicts the most images correctly; of equally good ones, the largest."""
        counts = self.right(x, label, penalties).sum(1).tolist()
        return max(zip(counts, penalties, strict=True))[1]


def _indicator(label: Tensor, classes: int) -> Tensor:
    """Return (image, class): 1 at the class of each image, else 0."""
    return torch.nn.functional.one_hot(label, classes).double()


def _inverse(variance: Tensor) -> Tensor:
    """Compute 1 / standard deviation (feature); 0 for a feature that never changes."""
    return torch.where(variance > 0, variance.clamp_min(torch.finfo(variance.dtype).tiny).rsqrt(), 0.0)


def wilson(successes: float, trials: int, quantile: float = 1.959963984540054) -> tuple[float, float]:
    """Compute the Wilson score interval of a share, by default at 95 %; NaN without trials.

    Source: Wilson, "Probable inference" (1927).
    """
    if trials == 0:
        return math.nan, math.nan
    share, square = successes / trials, quantile**2
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    half = quantile / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
