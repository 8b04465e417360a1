"""Compute linear CKA from Gram matrices, over minibatches: estimators of HSIC, their ratio, and its uncertainty.

K and L are Gram matrices (image, image) of two layers for the same n images, and HSIC measures their dependence:

    unbiased  HSIC1 = sum_ij U(K)_ij U(L)_ij / (n (n - 3)), with the diagonal of K set to zero, r its row sums, s their
              sum, U(K)_ij = K_ij - (r_i + r_j) / (n - 2) + s / ((n - 1)(n - 2)), and the diagonal set to zero again
              (Székely and Rizzo, "Partial distance correlation with methods for dissimilarities", 2014, definition 2)
    biased    HSIC0 = vec(HKH) . vec(HLH) / (n - 1)^2, with H = I - 11ᵀ / n (Kornblith et al., "Similarity of neural
              network representations revisited", ICML 2019, equation 3)

CKA over minibatches is the ratio of averages, mean HSIC(K, L) / sqrt(mean HSIC(K, K) mean HSIC(L, L)) (Nguyen et al.,
"Do wide and deep networks learn the same things?", ICLR 2021), never the average of ratios. For independent layers,
HSIC1 is negative half of the time; nothing is clamped.

Gram matrices come packed by `pack`: the upper triangle with the diagonal, row by row. Everything is in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Estimator = Literal["unbiased", "biased"]

FEWEST = {"unbiased": 4, "biased": 2}  # images per minibatch


def pack(gram: NDArray) -> Floats:
    """Pack matrices (..., image, image) into (..., n (n + 1) / 2): the upper triangle with the diagonal, row by row."""
    n = gram.shape[-1]
    return np.asarray(gram.reshape(*gram.shape[:-2], n * n).take(_upper(n), -1), np.float64)


@functools.cache
def _upper(n: int) -> NDArray[np.int64]:
    """Return the flat indices of the upper triangle of an n x n matrix, row by row."""
    rows, columns = np.triu_indices(n)
    return rows * n + columns


def unpack(packed: NDArray) -> Floats:
    """Invert `pack`."""
    n = images_of(packed.shape[-1])
    rows, columns = np.triu_indices(n)
    gram = np.empty((*packed.shape[:-1], n, n))
    gram[..., rows, columns] = packed
    gram[..., columns, rows] = packed
    return gram


def images_of(pairs: int) -> int:
    """Return the number of images that have this many pairs, counting each image with itself."""
    n = (math.isqrt(8 * pairs + 1) - 1) // 2
    if n * (n + 1) // 2 != pairs:
        raise ValueError(f"{pairs} is not n (n + 1) / 2 for any number of images n")
    return n


def centred(packed: NDArray, estimator: Estimator) -> Floats:
    """Centre packed matrices (layer, pair) into vectors whose scalar product is HSIC of two layers.

    Raises
    ------
    ValueError
        If there are fewer than four images, for which the unbiased estimator is undefined (biased: fewer than two).
    """
    n = images_of(packed.shape[-1])
    if n < FEWEST[estimator]:
        raise ValueError(f"{n} images: the {estimator} estimator needs at least {FEWEST[estimator]}")
    gram = unpack(packed)
    # Each pair of different images stands for two entries of the matrix.
    if estimator == "unbiased":
        gram[..., range(n), range(n)] = 0
        mean = gram.sum(-1) / (n - 2)
        mean -= mean.sum(-1, keepdims=True) / (2 * (n - 1))
        gram -= mean[..., :, None] + mean[..., None, :]
        rows, columns = np.triu_indices(n, 1)
        return gram[..., rows, columns] * math.sqrt(2 / (n * (n - 3)))
    mean = gram.mean(-1)
    mean -= mean.mean(-1, keepdims=True) / 2
    found = pack(gram - mean[..., :, None] - mean[..., None, :])
    found *= math.sqrt(2) / (n - 1)
    diagonal = np.cumsum([0, *range(n, 1, -1)])
    found[..., diagonal] /= math.sqrt(2)
    return found


def hsic(packed: NDArray, estimator: Estimator) -> Floats:
    """Compute HSIC (layer, layer) of one minibatch from the Gram matrices (layer, pair) of all layers.

    The layers may belong to several networks.
    """
    vectors = centred(packed, estimator)
    return vectors @ vectors.T


@dataclass(frozen=True)
class Cka:
    """CKA of all pairs of layers.

    Attributes
    ----------
    cka : (layer, layer); NaN where undefined.
    standard_error : (layer, layer), by jackknife over minibatches; NaN if there is only one.
    influence : (layer, layer), the largest change of a cell when one minibatch is left out.
    most_influential : (layer, layer), that minibatch; -1 where undefined.
    constant : (layer), layers whose HSIC with themselves is zero: they give the same output for all images.
    """

    cka: Floats
    standard_error: Floats
    influence: Floats
    most_influential: NDArray[np.int64]
    constant: NDArray[np.bool_]


def cka(hsic: Floats, weight: NDArray, epoch: NDArray | None = None) -> Cka:
    """Compute linear CKA over minibatches.

    Parameters
    ----------
    hsic : (minibatch, layer, layer).
    weight : (minibatch), for example n (n - 3); any constant if all minibatches have one size.
    epoch : as for `jackknife`.
    """
    hsic = np.asarray(hsic, np.float64)
    whole, error = jackknife(ratio, hsic, weight, epoch)
    weighted = hsic * np.asarray(weight, np.float64)[:, None, None]
    total = weighted.sum(0)
    change = np.full((1, *whole.shape), np.nan)
    if len(hsic) > 1:
        change = np.stack([np.abs(ratio(total - each) - whole) for each in weighted])
    undefined = np.isnan(change).any(0)
    constant = ~(np.diagonal(total) > 0)
    return Cka(whole, error, change.max(0), np.where(undefined, -1, change.argmax(0)), constant)


def ratio(hsic: Floats) -> Floats:
    """Compute CKA (layer, layer) from HSIC summed or averaged over minibatches; NaN for a constant layer."""
    own = np.diagonal(hsic)
    # Separate roots, because the product of two small numbers may be zero.
    length = np.sqrt(np.where(own > 0, own, np.nan))
    found = hsic / np.outer(length, length)
    # A layer agrees with itself to the last digit.
    found[np.diag_indices_from(found)] = np.where(own > 0, 1.0, np.nan)
    return found


def jackknife(
    statistic: Callable[[Floats], Floats], hsic: Floats, weight: NDArray, epoch: NDArray | None = None
) -> tuple[Floats, Floats]:
    """Compute a statistic of summed HSIC, and its standard error by leaving out one minibatch at a time.

    The standard error is NaN if there is only one minibatch.

    Parameters
    ----------
    statistic : from HSIC (layer, layer), summed over minibatches, to numbers of any shape; it must not depend on scale.
    hsic, weight : (minibatch, layer, layer), or any sums over images of as many dimensions; (minibatch).
    epoch : (minibatch), the epoch of each; by default all are of one epoch. Minibatches of one epoch share no image.
        Each is left out within its epoch, and the variances of the epochs are averaged: shuffling the same images again
        does not reduce the standard error.
    """
    weighted = np.asarray(hsic, np.float64) * np.asarray(weight, np.float64)[:, None, None]
    epoch = np.zeros(len(weighted), int) if epoch is None else np.asarray(epoch)
    whole = np.asarray(statistic(weighted.sum(0)))
    variances = []
    for one in np.unique(epoch):
        own = weighted[epoch == one]
        if len(own) == 1:
            return whole, np.full(whole.shape, np.nan)
        total = own.sum(0)
        left = np.stack([statistic(total - each) for each in own])
        variances.append((len(own) - 1) * ((left - left.mean(0)) ** 2).mean(0))
    return whole, np.sqrt(np.mean(variances, axis=0))
