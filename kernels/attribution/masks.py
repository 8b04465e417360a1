"""Random masks: what a function is where a segment is shown, on average."""

from __future__ import annotations

import numpy as np


def shown(masks: np.ndarray, values: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Compute the mean of a function over the masks that show each feature, less its mean over all: (feature,), mean.

    Petsiuk et al., "RISE" (BMVC 2018), eq. 4, with whole segments as cells; the paper's map is the sum of both results.
    Numpy, float64, of one image: others change no bit.

    Parameters
    ----------
    masks : bool (sample, feature). values, weight : (sample,).
    """
    mean = float(weight @ values / weight.sum())
    present = weight @ masks
    found = (weight * (values - mean)) @ masks
    return np.divide(found, present, out=np.zeros_like(found), where=present > 0), mean
