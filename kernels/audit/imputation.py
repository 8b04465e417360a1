"""Fill removed pixels from their neighbours, so that their shape tells a network little: the fillings of ROAD.

Rong et al., "A consistent and efficient evaluation strategy for attribution methods" (ICML 2022).
"""

from __future__ import annotations

import numpy as np

NEIGHBOURS = {(y, x): 1 / 6 if 0 in (y, x) else 1 / 12 for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)}
"""Weights of the eight neighbours: direct ones count twice as much as diagonal ones, and all add up to 1."""


def imputed(image: np.ndarray, gone: np.ndarray, noise: float = 0.0, seed: int | list[int] = 0) -> np.ndarray:
    """Return an image in which each removed pixel is the weighted mean of its neighbours, removed ones among them.

    That is one system of linear equations, solved exactly; at the border the weights of the neighbours that exist count
    relative to their sum. Noise is added to the removed pixels alone.

    Parameters
    ----------
    image : (channel, y, x) float. gone : bool (y, x). noise : standard deviation, in the image's units.

    Raises
    ------
    ValueError
        No pixel is left: nothing determines the others.
    """
    from scipy.sparse import csc_matrix
    from scipy.sparse.linalg import splu

    if gone.all():
        raise ValueError("all pixels are removed: none is left to fill them from")
    values = np.array(image, np.float64)
    if not gone.any():
        return values
    count = int(gone.sum())
    number = np.full(gone.shape, -1, np.int64)
    number[gone] = np.arange(count)
    rows, columns = np.nonzero(gone)
    known = np.zeros((count, len(values)))
    weights = np.zeros(count)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for (down, right), weight in NEIGHBOURS.items():
        y, x = rows + down, columns + right
        inside = (y >= 0) & (y < gone.shape[0]) & (x >= 0) & (x < gone.shape[1])
        own = np.flatnonzero(inside)
        weights[own] += weight
        beside = number[y[own], x[own]]
        there = beside < 0
        known[own[there]] += weight * values[:, y[own[there]], x[own[there]]].T
        parts.append((own[~there], beside[~there], np.full(int((~there).sum()), -weight)))
    parts.append((np.arange(count), np.arange(count), weights))
    at, of, value = (np.concatenate(each) for each in zip(*parts, strict=True))
    system = csc_matrix((value, (at, of)), shape=(count, count))
    # Symmetric and diagonally dominant: no pivoting, and an order of elimination for such.
    factors = splu(system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    filled = factors.solve(known)
    if noise:
        filled = filled + noise * np.random.default_rng(seed).standard_normal(filled.shape)
    values[:, gone] = filled.T
    return values
