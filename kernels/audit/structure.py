"""Structural similarity of two maps of one image.

Wang et al., "Image quality assessment: from error visibility to structural similarity" (IEEE Transactions on Image
Processing, 2004).
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import conv2d

SIGMA, SIDE = 1.5, 11
K1, K2 = 0.01, 0.03


def scaled(maps: np.ndarray) -> np.ndarray:
    """Return maps (image, y, x) from 0, their least value, to 1, their greatest; NaN where they are constant."""
    values = np.asarray(maps, np.float64)
    low, high = values.min((1, 2), keepdims=True), values.max((1, 2), keepdims=True)
    spread = high - low
    return np.where(spread > 0, (values - low) / np.where(spread > 0, spread, 1), np.nan)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the mean structural similarity of pairs of maps (image, y, x) with values from 0 to 1, float64 (image,).

    The window is the paper's, a Gaussian of 11 x 11 pixels with a standard deviation of 1.5, cut to an odd side that
    fits a smaller map; only windows that lie inside the map count. NaN where a map holds a NaN.
    """
    first, second = (torch.as_tensor(np.asarray(each, np.float64))[:, None] for each in (a, b))
    side = min(SIDE, *(size - (1 - size % 2) for size in first.shape[2:]))
    place = torch.arange(side, dtype=torch.float64) - side // 2
    line = torch.exp(-(place**2) / (2 * SIGMA**2))
    line = line / line.sum()

    def mean(values: torch.Tensor) -> torch.Tensor:
        return conv2d(conv2d(values, line[None, None, :, None]), line[None, None, None, :])

    mean_a, mean_b = mean(first), mean(second)
    var_a, var_b = mean(first**2) - mean_a**2, mean(second**2) - mean_b**2
    covariance = mean(first * second) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    same = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    found = same / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return found.flatten(1).mean(1).numpy()
