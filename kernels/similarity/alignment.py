"""Compute relatives of CKA from the same Gram matrices: mutual nearest neighbours, and orthogonal Procrustes.

Both look at one minibatch of n images. CKA weights pairs of images by their distance, so a few outliers may decide it;
mutual neighbours depend only on which images are near each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.similarity.cka import Floats, unpack


def mutual_neighbours(packed: NDArray, k: int) -> Floats:
    """Compute the share of an image's k nearest other images on which two layers agree: (layer, layer), image mean.

    Neighbours are nearest by Euclidean distance of the features; of equally near images the earlier one counts.
    Independent layers share k / (n - 1) by chance. NaN for a layer that gives the same output for all images. Source:
    Huh et al., "The Platonic representation hypothesis" (ICML 2024), section 3, without its normalisation of the
    features.

    Parameters
    ----------
    packed : Gram matrices (layer, pair) as `kernels.similarity.cka.pack` returns them.
    k : below n.
    """
    gram = unpack(packed)
    n = gram.shape[-1]
    if not 0 < k < n:
        raise ValueError(f"{k} neighbours among the {n - 1} other images of a minibatch; expected 1 to {n - 1}")
    own = np.diagonal(gram, axis1=-2, axis2=-1)
    distance = own[..., :, None] + own[..., None, :] - 2 * gram
    distance[..., range(n), range(n)] = np.inf
    nearest = np.argsort(distance, axis=-1, kind="stable")[..., :k]
    near = np.zeros(gram.shape, np.float32)
    np.put_along_axis(near, nearest, 1, axis=-1)
    flat = near.reshape(len(near), -1)
    found = (flat @ flat.T).astype(np.float64) / (n * k)
    constant = ~gram.any((-2, -1))
    found[constant] = np.nan
    found[:, constant] = np.nan
    return found


def procrustes(packed: NDArray) -> Floats:
    """Compute how well an orthogonal map turns one layer's features into another's, (layer, layer), from 0 to 1.

    The value is the nuclear norm of Aᵀ B, where A and B are the features (image, feature), centred and of Frobenius
    norm 1. The squared Procrustes distance of the two layers is 2 minus twice this value (Ding et al., "Grounding
    representation similarity with statistical testing", NeurIPS 2021, section 2). With more features than images, many
    layers can be turned into each other: compare with `procrustes_shuffled`. NaN for a layer that gives the same output
    for all images.
    """
    roots, constant = _roots(packed)
    return _nuclear(roots, roots, constant, symmetric=True)


def procrustes_shuffled(packed: NDArray) -> Floats:
    """Compute `procrustes` with the images of the second layer shifted by one: the level of chance."""
    roots, constant = _roots(packed)
    return _nuclear(roots, np.roll(roots, 1, axis=-1), constant, symmetric=False)


def _roots(packed: NDArray) -> tuple[Floats, NDArray[np.bool_]]:
    """Return matrices R (layer, part, image) with RᵀR the centred Gram matrix of trace 1; and the constant layers."""
    gram = unpack(packed)
    mean = gram.mean(-1)
    mean -= mean.mean(-1, keepdims=True) / 2
    gram -= mean[..., :, None] + mean[..., None, :]
    trace = np.trace(gram, axis1=-2, axis2=-1)
    constant = ~(trace > 0)
    gram /= np.where(constant, 1, trace)[:, None, None]
    values, vectors = np.linalg.eigh(gram)
    # A Gram matrix has negative eigenvalues only through rounding.
    roots = np.sqrt(np.maximum(values, 0))[..., :, None] * np.swapaxes(vectors, -1, -2)
    return roots, constant


def _nuclear(a: Floats, b: Floats, constant: NDArray[np.bool_], symmetric: bool) -> Floats:
    found = np.full((len(a), len(b)), np.nan)
    for i in np.flatnonzero(~constant):
        others = np.flatnonzero(~constant)
        if symmetric:
            others = others[others >= i]
        products = a[i] @ np.swapaxes(b[others], -1, -2)
        found[i, others] = np.linalg.svd(products, compute_uv=False).sum(-1)
        if symmetric:
            found[others, i] = found[i, others]
    return found
