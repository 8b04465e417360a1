"""Say how alike two maps of one image are."""

from __future__ import annotations

import numpy as np


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute Spearman's rank correlation of pairs of maps, float64 (image,), from two (image, position).

    Equal values share their mean rank. NaN where a map is constant or holds a NaN.
    """
    return (standard_ranks(a) * standard_ranks(b)).sum(1)


def standard_ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of each row with mean 0 and norm 1, float64: products of rows are rank correlations.

    Equal values share their mean rank. A row that is constant or holds a NaN is NaN.
    """
    ranks = _ranks(values)
    ranks -= ranks.mean(1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(1, keepdims=True))
    bad = (norms == 0) | np.isnan(values).any(1, keepdims=True)
    return np.where(bad, np.nan, ranks / np.where(norms == 0, 1, norms))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of each row from 0, equal values with their mean, float64."""
    order = np.argsort(values, axis=1, kind="stable")
    placed = np.take_along_axis(values, order, 1)
    count = values.shape[1]
    place = np.arange(count)
    begins = np.concatenate([np.ones((len(values), 1), bool), placed[:, 1:] != placed[:, :-1]], 1)
    first = np.maximum.accumulate(np.where(begins, place, 0), 1)
    ends = np.concatenate([begins[:, 1:], np.ones((len(values), 1), bool)], 1)
    last = np.flip(np.minimum.accumulate(np.flip(np.where(ends, place, count), 1), 1), 1)
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, 1)
    return ranks


def resized(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Interpolate maps (image, y, x) bilinearly to a size, with cells as areas (corners not aligned), float32."""
    import torch  # ranks are asked for where torch is not loaded

    values = torch.as_tensor(maps, dtype=torch.float32)[:, None]
    return torch.nn.functional.interpolate(values, size, mode="bilinear", align_corners=False)[:, 0].numpy()
