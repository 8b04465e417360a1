"""Relatives of CKA from the same Gram matrices: mutual nearest neighbours, and orthogonal Procrustes.

Both look at one minibatch of n images. CKA weighs pairs of images by how far apart they are, so that a few outliers may
decide it; mutual neighbours only ask which images are near each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.similarity.cka import Floats, unpack


def mutual_neighbours(packed: NDArray, k: int) -> Floats:
    """(layer, layer): the share of an image's k nearest other images that two layers agree on, averaged over images.

    Nearest by Euclidean distance of the features; of equal ones the earlier image. Independent layers share
    k / (n - 1) by chance. NaN for a layer that gives the same for all images. Huh et al., "The Platonic representation
    hypothesis" (ICML 2024), section 3, without its normalisation of the features.

    Parameters
    ----------
    packed : Gram matrices (layer, pair) as `kernels.similarity.cka.pack` makes them.
    k : below n.
    """
    gram = unpack(packed)
    n = gram.shape[-1]
    if not 0 < k < n:
        raise ValueError(f"{k} neighbours among the {n - 1} other images of a minibatch")
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
    """(layer, layer): how well an orthogonal map turns one layer's features into the other's, 0 to 1.

    The nuclear norm of Aᵀ B, where A and B are the features (image, feature), centred and of Frobenius norm 1: the
    squared Procrustes distance of the two is 2 minus twice this (Ding et al., "Grounding representation similarity with
    statistical testing", NeurIPS 2021, section 2). With more features than images much can be turned into anything:
    compare with `procrustes` of shuffled images. NaN for a layer that gives the same for all images.
    """
    roots, constant = _roots(packed)
    return _nuclear(roots, roots, constant, symmetric=True)


def procrustes_shuffled(packed: NDArray) -> Floats:
    """The same when the images of the second layer are another order, each the next one: what chance gives."""
    roots, constant = _roots(packed)
    return _nuclear(roots, np.roll(roots, 1, axis=-1), constant, symmetric=False)


def _roots(packed: NDArray) -> tuple[Floats, NDArray[np.bool_]]:
    """(layer, part, image): matrices R with RᵀR the centred Gram matrix of trace 1; and the constant layers."""
    gram = unpack(packed)
    mean = gram.mean(-1)
    mean -= mean.mean(-1, keepdims=True) / 2
    gram -= mean[..., :, None] + mean[..., None, :]
    trace = np.trace(gram, axis1=-2, axis2=-1)
    constant = ~(trace > 0)
    gram /= np.where(constant, 1, trace)[:, None, None]
    values, vectors = np.linalg.eigh(gram)
    # A Gram matrix has no negative eigenvalue but by rounding.
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
