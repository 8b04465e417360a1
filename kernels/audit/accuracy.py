"""Published measures of weakly supervised localisation, from the boxes and pixels of all images."""

from __future__ import annotations

import numpy as np


def box_accuracy(fits: np.ndarray, least: float) -> np.ndarray:
    """Return the share of images whose IoU reaches `least`, by threshold, from IoUs (image, threshold).

    Its maximum is MaxBoxAcc for the largest part's box and least = .5, and the mean of its maxima for .3, .5 and .7
    MaxBoxAccV2 for any part's: Choe et al., "Evaluating weakly supervised object localization methods right" (CVPR
    2020), section 4.1, and its extension (TPAMI 2022).
    """
    return (fits >= least).mean(0)


def crossed(fits: np.ndarray, half: np.ndarray, least: float) -> float:
    """Return the share of images whose IoU reaches `least` at the best threshold of the *other* half of the images.

    fits : IoUs (image, threshold). half : bool (image,). NaN where one half is empty.
    """
    if half.all() or not half.any():
        return float("nan")
    right = np.empty(len(fits), bool)
    for own in (half, ~half):
        right[own] = fits[own, int(box_accuracy(fits[~own], least).argmax())] >= least
    return float(right.mean())


def pixel_ap(inside: np.ndarray, outside: np.ndarray, total: int) -> float:
    """Return PxAP, the area under the curve of pixel precision over pixel recall, of all images together.

    Choe et al. (CVPR 2020), section 4.1.

    Parameters
    ----------
    inside, outside : pixels of all images at a threshold or above, (threshold,), thresholds ascending.
    total : pixels inside.
    """
    inside, outside = np.asarray(inside, np.float64)[::-1], np.asarray(outside, np.float64)[::-1]
    above = inside + outside
    precision = np.where(above > 0, inside / np.where(above > 0, above, 1), 0.0)
    recall = inside / total
    return float((precision * np.diff(recall, prepend=0.0)).sum())
